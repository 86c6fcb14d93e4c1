"""Measures episodes per second of our PPO and of TRL's PPOTrainer, with the same models and prompts, in alternation.

    python benchmarks/ppo_throughput.py --shape tiny --threads 2                                   # any CPU
    python benchmarks/ppo_throughput.py --shape tiny --threads 2 --precision bf16-mixed
    python benchmarks/ppo_throughput.py --shape 1b --device cuda --precision bf16-mixed --batch 512 --rounds 3
    python benchmarks/ppo_throughput.py --shape tiny --threads 2 --lengths --batch 8 --updates 2   # over lengths
    python benchmarks/ppo_throughput.py --shape tiny --threads 2 --profile trace.json
    python benchmarks/ppo_throughput.py --shape 160m --threads 2 --batch 4 --lora '{"rank": 16}'   # our adapters

Needs `pip install rlhf[bench]`: TRL removed PPO in 1.13, so 1.12.0 is the last release that can be measured. Models are
random ones of a Pythia's shape, prompts are as long as TL;DR's, responses run to 53 tokens (regime `full`) or end early
(`early`, 20 on average). Each side is a process of its own, so that its peak memory is its own; they take turns, one
update each, and the first turn is not counted. With `--apart`, always on a GPU, a side runs all its updates before the
other one starts, and `--rounds` repeats that.

Prints tables of medians over the updates (peaks: the highest), with the ratio of neighbouring updates, and on the last
line everything as JSON. Lightning, TRL and transformers run as they are; nothing is patched but by a clock.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from throughput import results, turns
from throughput.fixtures import SHAPES, prompt_lengths
from throughput.record import PPOTask

MODULES = {"ours": "throughput.ours", "trl": "throughput.trl_side"}
INSTALL = "pip install 'rlhf[bench]'"
QUERIES, RESPONSES = (64, 128, 256, 512), (13, 26, 53)


def compare(options: argparse.Namespace, regime: str) -> dict[str, Any]:
    """Measures one regime, and draws its table."""
    with tempfile.TemporaryDirectory() as folder:
        task = task_of(options, folder)
        turns.make_fixtures(task, options.shape, regime, prompt_lengths(options.batch))
        rows = turns.counted(turns.rounds(task, MODULES, options))
    full = {side: [results.complete(row, task) for row in own] for side, own in rows.items()}
    if options.device == "cuda":
        limits = (SHAPES[options.shape], options.peak_tflops, options.peak_bandwidth)
        for side, own in rows.items():
            full[side] = [{**a, **results.on_device(b, task, *limits)} for a, b in zip(full[side], own, strict=True)]
    return results.show(f"{options.shape}, {regime}", f"episodes, {task.precision}", full, task)


def lengths(options: argparse.Namespace) -> dict[str, Any]:
    """Measures our cost per episode over a grid of lengths; responses always run to their length."""
    cells = {}
    for query in QUERIES:
        for response in RESPONSES:
            with tempfile.TemporaryDirectory() as folder:
                task = replace(task_of(options, folder), response_length=response)
                turns.make_fixtures(task, options.shape, "full", [query] * options.batch)
                rows = turns.play(task, {"ours": MODULES["ours"]}, False, options.seconds)["ours"][1:]
            cells[query, response] = results.medians([results.complete(row, task) for row in rows])["seconds"]
    cells = {lengths: seconds / options.batch for lengths, seconds in cells.items()}
    table, fit = results.lengths_table(cells)
    Console(width=120).print(table)
    return {"fit": fit, "cells": [[*lengths, seconds] for lengths, seconds in cells.items()]}


def profile(options: argparse.Namespace, regime: str) -> None:
    """Prints the operators that take most of one of our updates, and writes its trace."""
    with tempfile.TemporaryDirectory() as folder:
        task = replace(task_of(options, folder), updates=2)
        turns.make_fixtures(task, options.shape, regime, prompt_lengths(options.batch))
        words = [json.dumps(asdict(task)), str(Path(options.profile).absolute())]
        subprocess.run([sys.executable, "-m", MODULES["ours"], *words], check=True, env=turns.environment(task))


def task_of(options: argparse.Namespace, folder: str) -> PPOTask:
    """Returns what both sides do."""
    ours = {name: getattr(options, name) for name in ("ppo", "lora", "quantization")}
    return turns.task_of(PPOTask, options, folder, **ours)


def parse() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    turns.add_options(parser)
    parser.add_argument("--regime", choices=["full", "early", "both"], default="both")
    parser.add_argument("--ppo", type=json.loads, default={}, help='JSON: settings of our PPO, {"cuda_graphs": false}')
    parser.add_argument("--lora", type=json.loads, help='JSON: settings of adapters on one base, {"rank": 16}')
    parser.add_argument("--quantization", choices=["nf4", "int8"], help="of the base of the adapters")
    parser.add_argument("--peak_tflops", type=float, default=989.0, help="of the GPU (default: H100 SXM, bf16)")
    parser.add_argument("--peak_bandwidth", type=float, default=3350.0, help="GB/s of the GPU (default: H100 SXM)")
    parser.add_argument("--lengths", action="store_true", help="our cost over query and response lengths instead")
    parser.add_argument("--profile", metavar="FILE", help="profile one of our updates instead; FILE: a Chrome trace")
    options = parser.parse_args()
    if options.lengths or options.profile or options.lora is not None:
        options.sides = ["ours"]
    turns.check(parser, options, INSTALL)
    if "trl" in options.sides and not turns.has_ppo():
        parser.error(f"trl {importlib.metadata.version('trl')} has no PPO, 1.12.0 is the last that has: {INSTALL}.")
    return options


def main() -> None:
    """Measures, and prints."""
    options = parse()
    same = {"temperature": 0.7, "response_length": 53, "ppo_epochs": 4, "minibatches": 1, "learning_rate": 3e-6}
    header = turns.header(options, same)
    regimes = ["full", "early"] if options.regime == "both" else [options.regime]
    if options.profile:
        profile(options, regimes[0])
        return
    measured = lengths(options) if options.lengths else {regime: compare(options, regime) for regime in regimes}
    print(json.dumps({**header, **measured}))


if __name__ == "__main__":
    main()
