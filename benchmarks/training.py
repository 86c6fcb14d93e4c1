"""Measures forward and backward of policy and critic together, for some sizes of micro-batches.

    python benchmarks/training.py --shape tiny --threads 2 --micro 4 8
    python benchmarks/training.py --shape 1b --device cuda

Float32 weights under autocast to bfloat16, as `bf16-mixed` on one device has them, queries as long as TL;DR's and
responses of 53 tokens. There is no optimizer, and the loss is a sum. Prints a row per size, with activations kept and
with activations that are computed again: seconds of a micro-batch (the median over the rounds), the share of the
device's peak FLOPs, which leaves out what is computed again, and the peak memory against the estimate of
`rlhf.models.memory`. A copy and a product of matrices show what the machine itself reaches. The last line has
everything as JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins import MixedPrecision
from rich.console import Console
from rich.table import Table
from throughput.fixtures import SHAPES, TEMPERATURE, Shape, prompt_lengths, write
from throughput.needs import training_flops
from torch import Tensor

from rlhf.hardware import GIB
from rlhf.models.actor_critic import ActorCritic
from rlhf.models.loading import checkpoint_activations
from rlhf.models.memory import Workload, estimate
from rlhf.models.networks import Networks
from rlhf.modules.ppo_models import load_actor_critic
from rlhf.ops.sequences import pad_sequences

LENGTH = 53
REPEATS = 4  # micro-batches in a row, as in an optimizer step: the CPU runs ahead of a GPU


def seconds_of(work: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Returns the median of the seconds that some work takes, after a first time that is not counted."""
    seconds = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        work()
        torch.get_device_module(device).synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def limits(device: torch.device, rounds: int) -> dict[str, float]:
    """Measures what the machine reaches: GB/s that a copy reads and writes, and TFLOP/s of a product in bfloat16."""
    size, width = (2**30, 8192) if device.type == "cuda" else (2**24, 512)
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    matrix = torch.randn(width, width, dtype=torch.bfloat16, device=device)
    return {
        "copy_gigabytes_per_second": 2e-9 * size / seconds_of(lambda: target.copy_(source), device, rounds),
        "product_tflops": 2e-12 * width**3 / seconds_of(lambda: matrix @ matrix, device, rounds),
    }


def episodes(shape: Shape, rows: int, device: torch.device) -> tuple[list[int], tuple[Tensor, ...]]:
    """Makes random episodes; returns the lengths of their queries, and ids and masks, which stay on the CPU."""
    lengths = prompt_lengths(rows)
    queries, query_mask = pad_sequences([torch.randint(1, shape.pad_id, (n,)).tolist() for n in lengths], 0, "left")
    responses = torch.randint(1, shape.pad_id, (rows, LENGTH))
    return lengths, (queries.to(device), query_mask, responses.to(device), torch.ones_like(responses).bool())


def measure(
    models: ActorCritic, shape: Shape, rows: int, recompute: bool, options: argparse.Namespace
) -> dict[str, float]:
    """Measures micro-batches of one size; an error of memory is left to the caller."""
    device = torch.device(options.device)
    lengths, batch = episodes(shape, rows, device)
    precision = MixedPrecision("bf16-mixed", options.device)

    def train() -> None:
        for _ in range(REPEATS):
            with precision.forward_context():
                now = models(*batch, TEMPERATURE)
                loss = now.logprobs.sum() + now.entropy.sum() + now.values.sum()
            loss.backward()

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = seconds_of(train, device, options.rounds) / REPEATS
    flops = training_flops(shape, lengths, [LENGTH] * rows, 1)
    found = {"seconds": seconds, "mfu": flops / (seconds * options.peak_tflops * 1e12)}
    if device.type == "cuda":
        found["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
    run = Workload("ppo", "single", "bf16-mixed", 1, rows, 1, max(lengths), LENGTH, None, None, False, recompute)
    phase = estimate(models.policy.config, run)["training"]
    return found | {"estimated_gib": (phase.total - phase.optimizer_states) / GIB}


def cases(folder: Path, shape: Shape, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures all sizes, first with activations kept, then with activations that are computed again."""
    device, found = torch.device(options.device), []
    paths = str(folder / "policy"), str(folder / "reward")
    models = load_actor_critic(Networks(torch.float32, device, 1), *paths, False, True).train()
    for recompute in (False, True):
        if recompute:
            checkpoint_activations(models.policy)
            checkpoint_activations(models.critic.model)
        for rows in options.micro:
            case: dict[str, Any] = {"micro": rows, "recompute": recompute}
            try:
                case |= measure(models, shape, rows, recompute, options)
            except torch.OutOfMemoryError:
                case["failure"] = "out of memory"
            found.append(case)
            models.zero_grad()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return found


def table(options: argparse.Namespace, found: list[dict[str, Any]]) -> Table:
    """Draws the table."""
    drawn = Table("rows", "activations", "s", "MFU", "peak GiB", "estimated GiB", title=f"{options.shape}, training")
    for case in found:
        numbers = [f"{case[key]:.3g}" if key in case else "" for key in ("seconds", "mfu", "peak_gib", "estimated_gib")]
        kind = "again" if case["recompute"] else "kept"
        drawn.add_row(str(case["micro"]), kind, *([case["failure"]] if "failure" in case else numbers))
    return drawn


def main() -> None:
    """Measures, and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--micro", type=int, nargs="+", default=[16, 32, 64], help="rows of a micro-batch")
    parser.add_argument("--rounds", type=int, default=3, help=f"of {REPEATS} micro-batches each")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--peak_tflops", type=float, default=989.0, help="of the device (default: H100 SXM, bf16)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    reached = limits(torch.device(options.device), options.rounds)
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), SHAPES[options.shape], "full", prompt_lengths(4))
        found = cases(Path(folder), SHAPES[options.shape], options)
    Console(width=120).print(table(options, found))
    print(json.dumps({"limits": reached, "cases": found}))


if __name__ == "__main__":
    main()
