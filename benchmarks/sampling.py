"""Measures tokens per second of our sampling and of transformers' `generate`, on the same model and prompts.

    python benchmarks/sampling.py --shape tiny --threads 2
    python benchmarks/sampling.py --shape 1b --device cuda --precision bf16 --rows 64

All sample at temperature 0.7 from the full distribution, up to 53 tokens, and stop when all responses have ended.
`graph` is ours with `cuda_graphs`: a cache of fixed size, and on a GPU one captured step. `vllm`, where it is there, is
`sampler vllm` with the hand-over of all weights; its CPU seconds are in another process. Prints a row per regime and
way: seconds (CPU seconds of all threads), tokens per second, the share of what the memory's bandwidth allows, and how
many times as fast as `generate`; medians over the rounds. On the last line everything as JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import torch
from rich.console import Console
from rich.table import Table
from throughput.fixtures import SHAPES, TEMPERATURE, Regime, Shape, prompt_lengths, write
from throughput.needs import decoding_bytes
from torch import Tensor

from rlhf.models.loading import load_causal_lm
from rlhf.models.tokenizers import load_tokenizer
from rlhf.ops.sequences import pad_sequences, response_lengths
from rlhf.sampling.cuda_graphs import sample_in_graph
from rlhf.sampling.sampler import Decoding, sample, uniforms
from rlhf.sampling.vllm_sampler import VLLMSampler

LENGTH = 53
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def measured(draw: Callable[[], Tensor], device: torch.device) -> tuple[float, float, Tensor]:
    """Draws, and returns seconds, CPU seconds of all threads, and the responses."""
    start, cpu = time.perf_counter(), time.process_time()
    responses = draw()
    torch.get_device_module(device).synchronize()
    return time.perf_counter() - start, time.process_time() - cpu, responses


def compare(folder: Path, shape: Shape, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Measures one regime; returns way -> its figures."""
    device = torch.device(options.device)
    model: Any = load_causal_lm(str(folder / "policy"), dtype=PRECISIONS[options.precision]).to(device)  # type: ignore[arg-type]
    tokenizer = load_tokenizer(str(folder / "policy"))
    prompts = [json.loads(line)["prompt"] for line in (folder / "prompts.jsonl").open()]
    ids, mask = pad_sequences([tokenizer(p)["input_ids"] for p in prompts], tokenizer.pad_token_id, "left")
    ids, mask = ids.to(device), mask.to(device)
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    numbers = uniforms(options.rows, LENGTH, torch.Generator(device).manual_seed(0))

    def theirs() -> Tensor:
        torch.manual_seed(0)
        return model.generate(  # type: ignore[no-any-return]
            input_ids=ids, attention_mask=mask, max_new_tokens=LENGTH, do_sample=True, temperature=TEMPERATURE, top_k=0,
            eos_token_id=eos, pad_token_id=pad,
        )[:, ids.shape[1] :]  # fmt: skip

    decoding = Decoding(TEMPERATURE, (eos,), pad)
    ways: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: sample(model, ids, mask, numbers, decoding),
        "graph": lambda: sample_in_graph(model, ids, mask, numbers, decoding),
        "generate": theirs,
    }
    if find_spec("vllm") is not None:
        engine = VLLMSampler(options.vllm_cache_gib, ("sampler", "--vllm_cache_gib"), "or fewer --rows")
        ways["vllm"] = lambda: engine(model, ids, mask, numbers, decoding)[0]
    times = [{way: measured(draw, device) for way, draw in ways.items()} for _ in range(options.rounds + 1)][1:]
    figures = {}
    for way in ways:
        seconds, cpu = (statistics.median(turn[way][kind] for turn in times) for kind in (0, 1))
        tokens = response_lengths(times[0][way][2], (eos,))[0].tolist()
        least = decoding_bytes(shape, mask.sum(1).tolist(), tokens, PRECISIONS[options.precision].itemsize)
        ratio = statistics.median(turn["generate"][0] / turn[way][0] for turn in times)
        share = least / (options.peak_bandwidth * 1e9) / seconds
        figures[way] = {
            "seconds": seconds, "cpu_seconds": cpu, "tokens_per_second": sum(tokens) / seconds,
            "share_of_bandwidth": share, "times_generate": ratio,
        }  # fmt: skip
    return figures


def main() -> None:
    """Measures both regimes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of the weights")
    parser.add_argument("--vllm_cache_gib", type=float, default=4.0, help="of vLLM's keys and values")
    parser.add_argument("--peak_bandwidth", type=float, default=3350.0, help="GB/s (default: H100 SXM)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    title = f"{options.shape}, {options.rows} rows, {options.precision}, {options.threads} threads"
    table = Table("regime", "way", "seconds", "CPU s", "tokens/s", "of the bandwidth", "times generate", title=title)
    found = {}
    for regime in get_args(Regime):
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), SHAPES[options.shape], regime, prompt_lengths(options.rows))
            found[regime] = compare(Path(folder), SHAPES[options.shape], options)
        for way, figures in found[regime].items():
            table.add_row(regime, way, *(f"{x:.3g}" for x in figures.values()))
    Console(width=120).print(table)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
