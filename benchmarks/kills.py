"""Kills training runs at random moments and checks that they end as if nothing had happened.

    python benchmarks/kills.py --kills 50 --load 2

Each case is a stage (SFT, reward model, PPO) on one process, on two with DDP, or on two with ZeRO-2, started as a user
starts it. It runs once undisturbed; then again, killed at random moments (SIGKILL to all of its processes, or to one of
them, after which the others must end by themselves) and each time started by the same command with `--ckpt_path last`.
Its export must be the same byte by byte, and its curves number by number. Prints a row per case; ends with status 1 if
one differs.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import psutil
from rich.console import Console
from rich.progress import track
from rich.table import Table

ROOT = Path(__file__).parent.parent
LAYOUTS = {
    "one": ["--trainer.devices=1"],
    "ddp": ["--trainer.devices=2", "--trainer.strategy=ddp"],
    "zero2": ["--trainer.devices=2", "--trainer.strategy=zero2"],
}
STAGES = {
    "sft": ["--data.batch_size=8", "--trainer.max_epochs=2"],
    "reward": ["--data.batch_size=8"],
    "ppo": [
        "--data.batch_size=16", "--trainer.max_epochs=6", "--model.ppo.response_length=8",
        "--model.ppo.critic_warmup=2",
    ],
}  # fmt: skip
MACHINE = ("seconds", "memory", "eps", "tokens_per")  # curves that are of the machine, not of the run
DEADLINE = 900.0  # seconds that a run may take
PATIENCE = 120.0  # seconds until the processes beside a killed one must have ended


class Outcome(NamedTuple):
    """Counts what happened to a case."""

    kills: int
    with_checkpoint: int
    while_writing: int
    same: bool


def command(stage: str, layout: str, inputs: Path, run: Path) -> list[str]:
    """Returns the command of a case."""
    texts, pairs = inputs / "demonstrations", inputs / "comparisons"
    records = pairs if stage == "reward" else texts
    words = [
        "fit", f"--config={ROOT}/configs/quickstart/{stage}.yaml", f"--run_dir={run}", "--trainer.accelerator=cpu",
        f"--model.model_path={inputs}/model", f"--data.train.path={records}", f"--data.validation.path={records}",
        "--data.micro_batch_size=2", "--trainer.limit_val_batches=1", "--trainer.log_every_n_steps=1",
        "--trainer.callbacks+=rlhf.callbacks.last_checkpoint.LastCheckpoint", "--trainer.callbacks.every_n_steps=2",
    ]  # fmt: skip
    words += {
        "sft": ["--model.response_length=8"],
        "reward": [f"--data.demonstrations.path={texts}"],
        "ppo": [f"--model.reward_path={inputs}/reward"],
    }[stage]
    return [sys.executable, str(ROOT / "train.py"), *words, *STAGES[stage], *LAYOUTS[layout]]


def write_inputs(folder: Path) -> None:
    """Writes records, a model of a few thousand weights, and a reward model made of it."""
    from rlhf.models.scalar_model import ScalarModel
    from rlhf.models.tokenizers import load_tokenizer

    synthesize = [
        sys.executable, str(ROOT / "train.py"), "synthesize", f"--output={folder}", "--sizes.pretraining=500",
        "--sizes.train=64", "--sizes.validation=16", "--sizes.comparisons=64", "--sizes.comparisons_validation=16",
        "--sizes.comparisons_news=4", "--model.hidden_size=32", "--model.layers=2", "--model.heads=2",
    ]  # fmt: skip
    subprocess.run(synthesize, check=True, stdout=subprocess.DEVNULL)
    base = str(folder / "model")
    ScalarModel.from_policy(base, seed=3).save(folder / "reward", load_tokenizer(base))


@contextmanager
def load(processes: int) -> Iterator[None]:
    """Keeps some processes busy inside the block."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()


def live(words: list[str], log: Path) -> None:
    """Runs a command to its end.

    Raises:
        RuntimeError: if it fails, or does not end.
    """
    with started(words, log) as process:
        try:
            status = process.wait(DEADLINE)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"it did not end in {DEADLINE:.0f} s; see {log}") from None
    if status != 0:
        raise RuntimeError(f"it ended with status {status}; see {log}")


def die(words: list[str], log: Path, curves: Path, lines: int, dice: random.Random) -> bool:
    """Kills a command at about the time when its curves have some lines; tells whether it was still running.

    Raises:
        RuntimeError: if the processes that are left do not end.
    """
    with started(words, log) as process:
        deadline = time.monotonic() + dice.uniform(0, 20) if lines == 0 else math.inf
        while process.poll() is None and time.monotonic() < deadline and (lines == 0 or count(curves) < lines):
            time.sleep(0.02)
        time.sleep(dice.uniform(0, 1))
        if process.poll() is not None:
            return False
        family = [process.pid, *(p.pid for p in psutil.Process(process.pid).children(recursive=True))]
        victim = dice.choice([None, *family])
        os.kill(victim, signal.SIGKILL) if victim else os.killpg(process.pid, signal.SIGKILL)
        ended = time.monotonic() + PATIENCE
        while process.poll() is None or any(map(psutil.pid_exists, family[1:])):
            if time.monotonic() > ended:
                raise RuntimeError(f"a process stayed {PATIENCE:.0f} s after another was killed; see {log}")
            time.sleep(0.1)
    return True


@contextmanager
def started(words: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Starts a command in a session of its own, of which nothing is left after the block."""
    with log.open("a") as stream:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(words, stdout=stream, stderr=stream, env=environment, start_new_session=True)
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def count(file: Path) -> int:
    """Counts the lines of a file, 0 if there is none."""
    return file.read_bytes().count(b"\n") if file.exists() else 0


def result(run: Path) -> tuple[dict[str, bytes], list[dict[str, float]]]:
    """Reads the export and the curves of a run."""
    export = {str(f.relative_to(run)): f.read_bytes() for f in sorted((run / "export").rglob("*")) if f.is_file()}
    lines = map(json.loads, (run / "curves.jsonl").read_text().splitlines())
    return export, [{k: v for k, v in line.items() if not k.startswith(MACHINE)} for line in lines]


def case(stage: str, layout: str, kills: int, folder: Path, dice: random.Random) -> Outcome:
    """Runs a case twice, the second time with kills."""
    whole, killed = folder / f"{stage}-{layout}", folder / f"{stage}-{layout}-killed"
    live(command(stage, layout, folder, whole), whole.with_suffix(".log"))
    words, log = [*command(stage, layout, folder, killed), "--ckpt_path=last"], killed.with_suffix(".log")
    done, with_checkpoint, while_writing = 0, 0, 0
    for line in sorted(dice.randrange(count(whole / "curves.jsonl")) for _ in range(kills)):
        done += die(words, log, killed / "curves.jsonl", line, dice)
        names = {file.name for file in killed.glob("checkpoints/*")}
        with_checkpoint += "last.ckpt" in names
        while_writing += any(name.startswith(".") for name in names)
    live(words, log)
    return Outcome(done, with_checkpoint, while_writing, result(killed) == result(whole))


def main() -> None:
    """Runs all cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="of all cases together")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--load", type=int, default=0, help="processes that keep the machine busy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="for the runs and their logs; by default a temporary one")
    options = parser.parse_args()
    cases = [(stage, layout) for stage in options.stages for layout in options.layouts]
    table = Table("stage", "processes", "kills", "left a checkpoint", "left a partial one", "same bits")
    good, dice = True, random.Random(options.seed)
    with tempfile.TemporaryDirectory() as temporary, load(options.load):
        folder = options.folder or Path(temporary)
        write_inputs(folder)
        for number, (stage, layout) in enumerate(track(cases, console=Console(stderr=True))):
            share = options.kills * (number + 1) // len(cases) - options.kills * number // len(cases)
            outcome = case(stage, layout, share, folder, dice)
            table.add_row(stage, layout, *map(str, outcome[:3]), "yes" if outcome.same else "NO")
            good = good and outcome.same
    Console().print(table)
    sys.exit(not good)


if __name__ == "__main__":
    main()
