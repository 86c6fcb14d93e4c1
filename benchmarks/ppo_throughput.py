"""Episodes per second of our PPO and of TRL's PPOTrainer, with the same models and prompts, in alternation.

    python benchmarks/ppo_throughput.py --shape tiny --threads 2                                   # any CPU
    python benchmarks/ppo_throughput.py --shape tiny --threads 2 --precision bf16-mixed
    python benchmarks/ppo_throughput.py --shape 1b --device cuda --precision bf16-mixed --batch 512 --rounds 3
    python benchmarks/ppo_throughput.py --shape tiny --threads 2 --lengths --batch 8 --updates 2   # over lengths
    python benchmarks/ppo_throughput.py --shape tiny --threads 2 --profile trace.json

Needs `pip install rlhf[bench]`. Models are random ones of a Pythia's shape, prompts are as long as TL;DR's, responses
run to 53 tokens (regime `full`) or end early (`early`, 20 on average). Each side is a process of its own, so that its
peak memory is its own; they take turns, one update each, and the first turn is not counted. With `--apart`, always on a
GPU, a side runs all its updates before the other one starts, and `--rounds` repeats that.

Prints tables of medians over the updates (peaks: the highest), with the ratio of neighbouring updates, and on the last
line everything as JSON. Lightning, TRL and transformers run as they are; nothing is patched but by a clock.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from throughput import results
from throughput.fixtures import SHAPES, prompt_lengths
from throughput.record import Row, Task

ROOT = Path(__file__).parent.parent
MODULES = {"ours": "throughput.ours", "trl": "throughput.trl_side"}
QUERIES, RESPONSES = (64, 128, 256, 512), (13, 26, 53)


class Worker:
    """A process with one side.

    Args:
        side: `ours` or `trl`.
        task: what it does.
        words: more arguments.
    """

    def __init__(self, side: str, task: Task) -> None:
        self.log = Path(task.folder) / f"{side}.log"
        with self.log.open("w") as errors:
            self.process: Any = subprocess.Popen(
                [sys.executable, "-m", MODULES[side], json.dumps(asdict(task))],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment(task),
            )  # fmt: skip

    def turn(self) -> Row:
        """The row of its next update."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{' '.join(self.process.args[:3])} failed:\n{self.log.read_text()[-3000:]}")
        return json.loads(line)

    def close(self) -> None:
        """End it; Lightning would make a milder signal wait for the end of the update."""
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


def environment(task: Task) -> dict[str, str]:
    """Of both sides alike."""
    same = {name: str(task.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    same |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": f"{task.folder}/cache"}
    if task.device == "cpu":
        same["CUDA_VISIBLE_DEVICES"] = ""
    paths = [str(ROOT / "benchmarks"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, **same, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def make_fixtures(task: Task, shape: str, regime: str, lengths: list[int]) -> None:
    """Write them, in a process of its own: this one stays small."""
    settings = json.dumps({"shape": asdict(SHAPES[shape]), "regime": regime, "lengths": lengths})
    command = [sys.executable, "-m", "throughput.fixtures", task.folder, settings]
    subprocess.run(command, check=True, env=environment(task))


def play(task: Task, sides: list[str], apart: bool, seconds: float) -> dict[str, list[Row]]:
    """One round: the counted updates of each side, equally many.

    Args:
        apart: one side after the other; else they take turns.
        seconds: of the whole round; no update is begun after it, but the first counted one always is.
    """
    begun = time.monotonic()
    rows: dict[str, list[Row]] = {side: [] for side in sides}
    for together in [[side] for side in sides] if apart else [sides]:
        workers = {side: Worker(side, task) for side in together}
        try:
            for number in range(task.updates):
                if number > 1 and time.monotonic() - begun > seconds:
                    break
                for side, worker in workers.items():
                    rows[side].append(worker.turn())
                    shown = f"{side:4} update {number}: {rows[side][-1]['seconds']:.1f} s"
                    print(shown, "(not counted)" if number == 0 else "", file=sys.stderr)
        finally:
            for worker in workers.values():
                worker.close()
    counted = min(len(side) for side in rows.values())
    return {side: own[1:counted] for side, own in rows.items()}


def compare(options: argparse.Namespace, regime: str) -> dict[str, Any]:
    """Measure one regime, and draw its table."""
    rows: dict[str, list[Row]] = {side: [] for side in options.sides}
    with tempfile.TemporaryDirectory() as folder:
        task = task_of(options, folder)
        make_fixtures(task, options.shape, regime, prompt_lengths(options.batch))
        for _ in range(options.rounds):
            one = play(task, options.sides, options.apart, options.seconds / options.rounds)
            rows = {side: rows[side] + one[side] for side in rows}
    full = {side: [results.complete(row, task) for row in own] for side, own in rows.items()}
    if options.device == "cuda":
        limits = (SHAPES[options.shape], options.peak_tflops, options.peak_bandwidth)
        for side, own in rows.items():
            full[side] = [{**a, **results.on_device(b, task, *limits)} for a, b in zip(full[side], own, strict=True)]
    ratio = results.ratios(full["ours"], full["trl"]) if len(full) == 2 else None
    medians = {side: results.medians(own) for side, own in full.items()}
    updates = len(full[options.sides[0]])
    title = f"{options.shape}, {regime}: medians of {updates} updates of {options.batch} episodes"
    Console(width=120).print(results.table(title, medians, ratio))
    return {"medians": medians, "ratio": ratio, "updates": full}


def lengths(options: argparse.Namespace) -> dict[str, Any]:
    """Our cost per episode over a grid of lengths; responses always run to their length."""
    cells = {}
    for query in QUERIES:
        for response in RESPONSES:
            with tempfile.TemporaryDirectory() as folder:
                task = replace(task_of(options, folder), response_length=response)
                make_fixtures(task, options.shape, "full", [query] * options.batch)
                rows = play(task, ["ours"], False, options.seconds)["ours"]
            cells[query, response] = results.medians([results.complete(row, task) for row in rows])["seconds"]
    cells = {lengths: seconds / options.batch for lengths, seconds in cells.items()}
    table, fit = results.lengths_table(cells)
    Console(width=120).print(table)
    return {"fit": fit, "cells": [[*lengths, seconds] for lengths, seconds in cells.items()]}


def profile(options: argparse.Namespace, regime: str) -> None:
    """Print the operators that take most of one of our updates, and write its trace."""
    with tempfile.TemporaryDirectory() as folder:
        task = replace(task_of(options, folder), updates=2)
        make_fixtures(task, options.shape, regime, prompt_lengths(options.batch))
        words = [json.dumps(asdict(task)), str(Path(options.profile).absolute())]
        subprocess.run([sys.executable, "-m", MODULES["ours"], *words], check=True, env=environment(task))


def task_of(options: argparse.Namespace, folder: str) -> Task:
    """What both sides do."""
    return Task(
        folder, options.batch, options.updates + 1, options.micro, options.data, options.ppo, options.precision,
        options.device, options.threads,
    )  # fmt: skip


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny", help="default: tiny, 29M parameters")
    parser.add_argument("--regime", choices=["full", "early", "both"], default="both")
    parser.add_argument("--sides", nargs="+", choices=MODULES, default=list(MODULES))
    parser.add_argument("--batch", type=int, default=64, help="episodes per update")
    parser.add_argument(
        "--micro", type=int, default=8, help="rows of TRL's training micro-batches; must divide --batch"
    )
    parser.add_argument("--data", type=json.loads, default={}, help="JSON: settings of our DataModule")
    parser.add_argument("--ppo", type=json.loads, default={}, help='JSON: settings of our PPO, {"cuda_graphs": false}')
    parser.add_argument("--updates", type=int, default=4, help="per side and round, after one that is not counted")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1e6, help="of a regime; what has begun is finished")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--precision", choices=["32-true", "bf16-mixed"], default="32-true")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--apart", action="store_true", help="one side in memory at a time; always so on a GPU")
    parser.add_argument("--peak_tflops", type=float, default=989.0, help="of the GPU (default: H100 SXM, bf16)")
    parser.add_argument("--peak_bandwidth", type=float, default=3350.0, help="GB/s of the GPU (default: H100 SXM)")
    parser.add_argument("--lengths", action="store_true", help="our cost over query and response lengths instead")
    parser.add_argument("--profile", metavar="FILE", help="profile one of our updates instead; FILE: a Chrome trace")
    options = parser.parse_args()
    options.apart = options.apart or options.device == "cuda"
    if options.batch % options.micro:
        parser.error(f"--batch {options.batch} is no multiple of --micro {options.micro}.")
    alone = options.lengths or options.profile
    if not alone and "trl" in options.sides and importlib.util.find_spec("trl") is None:
        parser.error("trl is not installed: pip install 'rlhf[bench]', or --sides ours.")
    return options


def processor() -> str:
    """The name of the CPU, and how many cores there are."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{[*names, platform.machine()][0]} x {os.cpu_count()}"


def main() -> None:
    """Measure, and print."""
    options = parse()
    packages = ("torch", "transformers", "lightning", "trl")
    versions = {p: importlib.metadata.version(p) for p in packages if importlib.util.find_spec(p)}
    shown = {name: value for name, value in vars(options).items() if value not in (None, False)}
    same = {"temperature": 0.7, "response_length": 53, "ppo_epochs": 4, "minibatches": 1, "learning_rate": 3e-6}
    print(f"{processor()}; {shown | same | versions}; TRL's other settings are its defaults")
    regimes = ["full", "early"] if options.regime == "both" else [options.regime]
    if options.profile:
        profile(options, regimes[0])
        return
    measured = lengths(options) if options.lengths else {regime: compare(options, regime) for regime in regimes}
    print(json.dumps({"processor": processor(), "settings": shown | same, "versions": versions, **measured}))


if __name__ == "__main__":
    main()
