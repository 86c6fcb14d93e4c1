"""Lets sides take turns: each is a process of its own, so that its peak memory is its own, in the same environment."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from throughput.fixtures import SHAPES
from throughput.record import Row, Task, TaskT

ROOT = Path(__file__).parent.parent.parent
SIDES = ("ours", "trl")


class Worker:
    """Runs a process with one side.

    Args:
        side: `ours` or `trl`.
        module: what runs it.
        task: what it does.
    """

    def __init__(self, side: str, module: str, task: Task) -> None:
        self.log = Path(task.folder) / f"{side}.log"
        with self.log.open("w") as errors:
            self.process: Any = subprocess.Popen(
                [sys.executable, "-m", module, json.dumps(asdict(task))],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment(task),
            )  # fmt: skip

    def turn(self) -> Row:
        """Returns the row of its next update."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{' '.join(self.process.args[:3])} failed:\n{self.log.read_text()[-3000:]}")
        return json.loads(line)

    def close(self) -> None:
        """Ends it; Lightning would make a milder signal wait for the end of the update."""
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


def environment(task: Task) -> dict[str, str]:
    """Returns the environment variables of both sides."""
    same = {name: str(task.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    same |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": f"{task.folder}/cache"}
    if task.device == "cpu":
        same["CUDA_VISIBLE_DEVICES"] = ""
    paths = [str(ROOT / "benchmarks"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, **same, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def make_fixtures(task: Task, shape: str, regime: str, lengths: list[int]) -> None:
    """Writes the fixtures, in a process of its own: this one stays small."""
    lora = getattr(task, "lora", None)
    settings = json.dumps({"shape": asdict(SHAPES[shape]), "regime": regime, "lengths": lengths, "lora": lora})
    command = [sys.executable, "-m", "throughput.fixtures", task.folder, settings]
    subprocess.run(command, check=True, env=environment(task))


def play(task: Task, sides: dict[str, str], apart: bool, seconds: float) -> dict[str, list[Row]]:
    """Plays one round: the updates of each side, equally many. The first one is not to be counted.

    Args:
        sides: name -> what runs it.
        apart: one side after the other; else they take turns.
        seconds: of the whole round; no update is begun after it, but the first counted one always is.
    """
    begun = time.monotonic()
    rows: dict[str, list[Row]] = {side: [] for side in sides}
    for together in [[side] for side in sides] if apart else [list(sides)]:
        workers = {side: Worker(side, sides[side], task) for side in together}
        try:
            for number in range(task.updates):
                if number > 1 and time.monotonic() - begun > seconds:
                    break
                for side, worker in workers.items():
                    rows[side].append(worker.turn())
                    shown = f"{side:4} update {number}: {rows[side][-1]['seconds']:.1f} s"
                    print(shown, "(not counted)" if number == 0 < task.updates - 1 else "", file=sys.stderr)
        finally:
            for worker in workers.values():
                worker.close()
    counted = min(len(side) for side in rows.values())
    return {side: own[:counted] for side, own in rows.items()}


def rounds(task: Task, modules: dict[str, str], options: argparse.Namespace) -> list[dict[str, list[Row]]]:
    """Plays all rounds.

    Args:
        modules: name of a side -> what runs it.
    """
    sides, seconds = {side: modules[side] for side in options.sides}, options.seconds / options.rounds
    return [play(task, sides, options.apart, seconds) for _ in range(options.rounds)]


def counted(played: list[dict[str, list[Row]]]) -> dict[str, list[Row]]:
    """Returns the rows of all rounds but the first of each, unless it is the only one."""
    return {side: [row for one in played for row in one[side][1:] or one[side]] for side in played[0]}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that every comparison has."""
    parser.add_argument("--shape", choices=SHAPES, default="tiny", help="default: tiny, 29M parameters")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--batch", type=int, default=64, help="examples per update (of PPO: episodes)")
    parser.add_argument(
        "--micro", type=int, default=8, help="rows of TRL's training micro-batches; must divide --batch"
    )
    parser.add_argument("--data", type=json.loads, default={}, help="JSON: settings of our DataModule")
    parser.add_argument(
        "--updates", type=int, default=4, help="per side and round, after one that is not counted; 0: that one is"
    )
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1e6, help="of a regime; what has begun is finished")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--precision", choices=["32-true", "bf16-mixed"], default="32-true")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--apart", action="store_true", help="one side in memory at a time; always so on a GPU")


def check(parser: argparse.ArgumentParser, options: argparse.Namespace, install: str) -> None:
    """Refuses options that do not fit.

    Args:
        install: the command that installs TRL's release for this comparison.
    """
    options.apart = options.apart or options.device == "cuda"
    if options.batch % options.micro:
        parser.error(f"--batch {options.batch} is no multiple of --micro {options.micro}.")
    if "trl" in options.sides and importlib.util.find_spec("trl") is None:
        parser.error(f"trl is not installed: {install}, or --sides ours.")


def has_ppo() -> bool:
    """Tells whether TRL is installed, and a release that has PPO."""
    found = importlib.util.find_spec("trl") is not None
    return found and tuple(map(int, importlib.metadata.version("trl").split(".")[:2])) <= (1, 12)


def task_of(kind: type[TaskT], options: argparse.Namespace, folder: str, **more: Any) -> TaskT:
    """Returns what both sides do."""
    same = ("batch", "micro", "data", "precision", "device", "threads")
    return kind(folder, updates=options.updates + 1, **{name: getattr(options, name) for name in same}, **more)


def header(options: argparse.Namespace, same: dict[str, Any]) -> dict[str, Any]:
    """Prints and returns the processor, the settings and the versions.

    Args:
        same: settings of both sides that are not chosen.
    """
    packages = ("torch", "transformers", "lightning", "trl")
    versions = {p: importlib.metadata.version(p) for p in packages if importlib.util.find_spec(p)}
    shown = {name: value for name, value in vars(options).items() if value not in (None, False)} | same
    print(f"{processor()}; {shown | versions}; TRL's other settings are its defaults")
    return {"processor": processor(), "settings": shown, "versions": versions}


def processor() -> str:
    """Returns the name of the CPU, and how many cores there are."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{[*names, platform.machine()][0]} x {os.cpu_count()}"
