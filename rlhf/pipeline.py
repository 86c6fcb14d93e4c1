"""Stages one after another, each in its own process; finished ones are skipped, a stopped one goes on."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rlhf import run_folder
from rlhf.errors import UserError

STATE = "pipeline.json"
PRODUCT = {"fit": "export/rlhf.json", "synthesize": "model/config.json", "report": "report.md"}


@dataclass(frozen=True)
class Stage:
    """One stage of a pipeline.

    Attributes:
        name: of its folder in the run folder.
        command: what to run, as on the command line.
        config: its YAML file in `config_dir`; of several, later ones win.
        takes: settings to override; `{run}` in a value stands for the run folder, so that
            `model.model_path: "{run}/sft/export"` takes the export of the stage `sft`.
    """

    name: str
    command: Literal["fit", "synthesize", "report"] = "fit"
    config: str | list[str] | None = None
    takes: dict[str, Any] = field(default_factory=dict)


def pipeline(
    stages: list[Stage],
    run_dir: str = "runs/pipeline",
    config_dir: str = ".",
    seed: int | None = None,
    arguments: list[str] | None = None,
) -> None:
    """Run stages one after another, each in its own process, and hand their exports on.

    Finished stages are skipped; a stopped one goes on from its last checkpoint. SIGTERM stops the stage that runs
    after it has saved.

    Args:
        stages: what to run, in order.
        run_dir: folder of the whole run; every stage gets a folder in it.
        config_dir: folder in which the configs of the stages lie.
        seed: of every stage, in place of the one in its config.
        arguments: further words for the command line of every training stage, for example `--trainer.devices=2`.
    """
    run = run_folder.claim(run_dir, resuming=True)
    runner = Runner(run, Path(config_dir), seed, arguments)
    started = time.monotonic()
    with forwarded_signals():
        for number, stage in enumerate(stages, 1):
            runner.run_stage(stage, f"[{number}/{len(stages)}]")
    print(f"Pipeline finished in {time.monotonic() - started:.0f} s: {run}")
    report = run / "report.md"
    if report.exists():
        print(f"Report:  {report}\nCurves:  tensorboard --logdir {run}")


class Runner:
    """Runs stages in one run folder, each in its own process; one at a time, or several from threads.

    Args:
        run: folder of the run.
        config_dir, seed, arguments: as of `pipeline`.
        base: folder of another, finished pipeline, for which `{base}` stands in what a stage takes.
        logged: a stage writes what it prints to `<name>.log` in the run folder.
    """

    def __init__(
        self,
        run: Path,
        config_dir: Path = Path("."),
        seed: int | None = None,
        arguments: list[str] | None = None,
        base: Path | None = None,
        logged: bool = False,
    ) -> None:
        self.run, self.config_dir, self.seed, self.base, self.logged = run, config_dir, seed, base, logged
        self.arguments = arguments or []
        self._state = _State(run)

    def run_stage(self, stage: Stage, title: str = "") -> None:
        """Run a stage, or go on with it; a finished one is skipped.

        Args:
            stage: what to run.
            title: what the lines about it begin with.

        Raises:
            UserError: it failed, its folder holds a run with other settings, or a stage of `base` is missing.
        """
        words, fingerprint, finished = self.plan(stage)
        title = f"{title} {stage.name}".strip()
        if finished:
            print(f"{title}: finished before, skipped", flush=True)
            return
        resuming = stage.command == "fit" and (self.run / stage.name / run_folder.CONFIG).exists()
        if resuming:
            words += ["--ckpt_path", "last"]
        print(f"{title}: {'going on' if resuming else 'train.py ' + ' '.join(words)}", flush=True)
        self._state.start(stage.name, fingerprint)
        seconds = _run(stage, words, self.run / f"{stage.name}.log") if self.logged else _run(stage, words)
        self._state.finish(stage.name, seconds)
        print(f"{title}: done in {seconds:.0f} s\n", flush=True)

    def plan(self, stage: Stage) -> tuple[list[str], str, bool]:
        """The command line of a stage, a fingerprint of all that it is made from, and whether it is finished.

        Raises:
            UserError: it can't run, see `run_stage`.
        """
        words = self._words(stage)
        fingerprint = _fingerprint(words, self._taken(stage))
        return words, fingerprint, self._state.finished(stage, fingerprint)

    def _words(self, stage: Stage) -> list[str]:
        words: list[str] = [stage.command]
        for name in [stage.config] if isinstance(stage.config, str) else stage.config or []:
            config = self.config_dir / name
            if not config.is_file():
                raise UserError(f"stages.{stage.name}.config: there is no file {config}.")
            words += ["--config", str(config)]
        folder = "run_dir" if stage.command == "fit" else "output"
        takes = {folder: "{run}" if stage.command == "report" else f"{{run}}/{stage.name}"} | stage.takes
        for key, value in takes.items():
            text = value if isinstance(value, str) else json.dumps(value)
            text = text.replace("{run}", str(self.run))
            words.append(f"--{key}={text if self.base is None else text.replace('{base}', str(self.base))}")
        if stage.command == "fit":
            words += self.arguments
        if self.seed is not None and stage.command != "report":
            words.append(f"--{'seed_everything' if stage.command == 'fit' else 'seed'}={self.seed}")
        return words

    def _taken(self, stage: Stage) -> dict[str, str]:
        """The identities of the stages that this one takes from."""
        takes = json.dumps(stage.takes)
        own = set(re.findall(r"\{run\}/([^/\"]+)", takes)) & set(self._state.stages)
        taken = {name: self._state.stages[name]["identity"] for name in own}
        if self.base is not None:
            bases = _State(self.base)
            for name in re.findall(r"\{base\}/([^/\"]+)", takes):
                known = bases.stages.get(name, {"finished": False})
                if not (known["finished"] and (self.base / name).is_dir()):
                    raise UserError(
                        f"base: {self.base} has no finished stage {name!r}; run its pipeline first, for the quickstart "
                        "with `python train.py pipeline --config configs/quickstart/pipeline.yaml`."
                    )
                taken[f"base/{name}"] = known["identity"]
        return taken


class _Signals:
    """Hands signals on to the stages that run, which save and stop."""

    def __init__(self) -> None:
        self.children: set[subprocess.Popen[bytes]] = set()
        self.received = 0

    def receive(self, number: int, frame: Any) -> None:
        """As the handler of a signal."""
        self.received = number
        for child in list(self.children):
            child.send_signal(number)

    def call(self, command: list[str], **settings: Any) -> int:
        """The exit status of a command."""
        with subprocess.Popen(command, **settings) as child:
            self.children.add(child)
            try:
                if self.received:
                    child.send_signal(self.received)
                return child.wait()
            except BaseException:
                child.kill()
                raise
            finally:
                self.children.discard(child)

    def check(self) -> None:
        """End this process, if it was sent a signal."""
        if self.received:
            print(f"Stopped by {signal.Signals(self.received).name}; the same command goes on from there.", flush=True)
            raise SystemExit(128 + self.received)


_signals = _Signals()


@contextmanager
def forwarded_signals() -> Iterator[None]:
    """Within, SIGTERM and SIGUSR1 go on to the stages that run. In the main thread only."""
    _signals.received = 0
    before = {number: signal.signal(number, _signals.receive) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run(stage: Stage, words: list[str], log: Path | None = None) -> float:
    start = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "rlhf", *words]
    if log is None:
        code = _signals.call(command, env=environment)
    else:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as output:
            code = _signals.call(command, env=environment, stdout=output, stderr=output)
    _signals.check()
    if code:
        seen = f", see {log}" if log is not None else ""
        raise UserError(f"the stage {stage.name} ended with status {code}{seen}; the same command goes on from there.")
    return time.monotonic() - start


def _fingerprint(words: list[str], taken: dict[str, str]) -> str:
    """Of everything that a stage is made from: its settings, and the earlier stages that it takes."""
    configs = [Path(value).read_text() for word, value in itertools.pairwise(words) if word == "--config"]
    return hashlib.sha256(json.dumps([words, "".join(configs), taken], sort_keys=True).encode()).hexdigest()


class _State:
    """What was run in a run folder, kept in `pipeline.json`."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.file = run / STATE
        self._lock = threading.Lock()
        self.stages: dict[str, dict[str, Any]] = json.loads(self.file.read_text()) if self.file.exists() else {}

    def finished(self, stage: Stage, fingerprint: str) -> bool:
        """Whether a stage is done; refuses one that was run with other settings."""
        known = self.stages.get(stage.name)
        folder = self.run if stage.command == "report" else self.run / stage.name
        if known is None and stage.command == "fit" and (folder / run_folder.CONFIG).exists():
            raise UserError(f"{folder} holds a run that this pipeline did not start; choose another --run_dir.")
        if known is None or not folder.exists():
            return False
        if known["fingerprint"] == fingerprint:
            return known["finished"] and (folder / PRODUCT[stage.command]).is_file()
        if stage.command == "report":  # made anew from what there is, nothing is lost
            return False
        raise UserError(
            f"{folder} holds a run of the stage {stage.name!r} with other settings or from other exports; choose "
            "another --run_dir, or delete that folder to run the stage again."
        )

    def start(self, name: str, fingerprint: str) -> None:
        self._set(name, {"fingerprint": fingerprint, "finished": False, "identity": uuid.uuid4().hex})

    def finish(self, name: str, seconds: float) -> None:
        self._set(name, self.stages[name] | {"finished": True, "seconds": round(seconds, 1)})

    def _set(self, name: str, entry: dict[str, Any]) -> None:
        partial = self.file.with_suffix(".partial")
        with self._lock:
            self.stages = {**self.stages, name: entry}
            partial.write_text(json.dumps(self.stages, indent=2) + "\n")
            partial.replace(self.file)
