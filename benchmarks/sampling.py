"""Tokens per second of our sampling and of transformers' `generate`, on the same model and prompts, in alternation.

    python benchmarks/sampling.py --shape tiny --threads 2

Both sample at temperature 0.7 from the full distribution, up to 53 tokens, and stop when all responses have ended.
Prints a line per regime: CPU seconds of all threads, seconds, and their ratios; medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch
from rich.console import Console
from rich.table import Table
from throughput.fixtures import SHAPES, TEMPERATURE, Regime, prompt_lengths, write
from torch import Tensor

from rlhf.models.loading import load_causal_lm
from rlhf.models.tokenizers import load_tokenizer
from rlhf.ops.sequences import pad_sequences
from rlhf.sampling.sampler import Decoding, sample, uniforms

LENGTH = 53


def measured(draw: Callable[[], Tensor], device: torch.device) -> tuple[float, float]:
    """Seconds, and CPU seconds of all threads."""
    start, cpu = time.perf_counter(), time.process_time()
    draw()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, time.process_time() - cpu


def compare(folder: Path, rows: int, rounds: int, device: torch.device) -> list[str]:
    """A row of the table."""
    model: Any = load_causal_lm(str(folder / "policy")).to(str(device))  # type: ignore[arg-type]
    tokenizer = load_tokenizer(str(folder / "policy"))
    prompts = [json.loads(line)["prompt"] for line in (folder / "prompts.jsonl").open()]
    ids, mask = pad_sequences([tokenizer(p)["input_ids"] for p in prompts], tokenizer.pad_token_id, "left")
    ids, mask = ids.to(device), mask.to(device)
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id

    def ours() -> Tensor:
        numbers = uniforms(rows, LENGTH, torch.Generator(device).manual_seed(0))
        return sample(model, ids, mask, numbers, Decoding(TEMPERATURE, (eos,), pad))

    def theirs() -> Tensor:
        torch.manual_seed(0)
        return model.generate(  # type: ignore[no-any-return]
            input_ids=ids, attention_mask=mask, max_new_tokens=LENGTH, do_sample=True, temperature=TEMPERATURE, top_k=0,
            eos_token_id=eos, pad_token_id=pad,
        )  # fmt: skip

    times = [[measured(draw, device) for draw in (ours, theirs)] for _ in range(rounds + 1)][1:]
    seconds, cpu = ([statistics.median(pair[side][kind] for pair in times) for side in (0, 1)] for kind in (0, 1))
    ratio = statistics.median(pair[1][0] / pair[0][0] for pair in times)
    return [f"{x:.2f}" for x in (*cpu, cpu[1] / cpu[0], *seconds, ratio)]


def main() -> None:
    """Measure both regimes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    columns = ("CPU s, ours", "CPU s, generate", "ratio", "seconds, ours", "seconds, generate", "ratio")
    table = Table("regime", *columns, title=f"{options.shape}, {options.rows} rows, {options.threads} threads")
    for regime in get_args(Regime):
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), SHAPES[options.shape], regime, prompt_lengths(options.rows))
            table.add_row(regime, *compare(Path(folder), options.rows, options.rounds, torch.device(options.device)))
    Console().print(table)


if __name__ == "__main__":
    main()
