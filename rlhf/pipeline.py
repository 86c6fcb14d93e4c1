"""Stages one after another, each in its own process; finished ones are skipped, a stopped one goes on."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import time
import uuid
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
        config: its YAML file in `config_dir`.
        takes: settings to override; `{run}` in a value stands for the run folder, so that
            `model.model_path: "{run}/sft/export"` takes the export of the stage `sft`.
    """

    name: str
    command: Literal["fit", "synthesize", "report"] = "fit"
    config: str | None = None
    takes: dict[str, Any] = field(default_factory=dict)


def pipeline(
    stages: list[Stage],
    run_dir: str = "runs/pipeline",
    config_dir: str = ".",
    seed: int | None = None,
    arguments: list[str] | None = None,
) -> None:
    """Run stages one after another, each in its own process, and hand their exports on.

    Finished stages are skipped; a stopped one goes on from its last checkpoint.

    Args:
        stages: what to run, in order.
        run_dir: folder of the whole run; every stage gets a folder in it.
        config_dir: folder in which the configs of the stages lie.
        seed: of every stage, in place of the one in its config.
        arguments: further words for the command line of every training stage, for example `--trainer.devices=2`.
    """
    run = run_folder.claim(run_dir, resuming=True)
    state = _State(run)
    started = time.monotonic()
    for number, stage in enumerate(stages, 1):
        words = _words(stage, run, Path(config_dir), seed, arguments or [])
        fingerprint = _fingerprint(words, stage, state)
        title = f"[{number}/{len(stages)}] {stage.name}"
        if state.finished(stage, fingerprint):
            print(f"{title}: finished before, skipped", flush=True)
            continue
        resuming = stage.command == "fit" and (run / stage.name / run_folder.CONFIG).exists()
        if resuming:
            words += ["--ckpt_path", "last"]
        print(f"{title}: {'going on' if resuming else 'train.py ' + ' '.join(words)}", flush=True)
        state.start(stage.name, fingerprint)
        seconds = _run(stage, words)
        state.finish(stage.name, seconds)
        print(f"{title}: done in {seconds:.0f} s\n", flush=True)
    print(f"Pipeline finished in {time.monotonic() - started:.0f} s: {run}")
    report = run / "report.md"
    if report.exists():
        print(f"Report:  {report}\nCurves:  tensorboard --logdir {run}")


def _words(stage: Stage, run: Path, config_dir: Path, seed: int | None, arguments: list[str]) -> list[str]:
    words: list[str] = [stage.command]
    if stage.config is not None:
        config = config_dir / stage.config
        if not config.is_file():
            raise UserError(f"stages.{stage.name}.config: there is no file {config}.")
        words += ["--config", str(config)]
    folder = "run_dir" if stage.command == "fit" else "output"
    takes = {folder: "{run}" if stage.command == "report" else f"{{run}}/{stage.name}"} | stage.takes
    for key, value in takes.items():
        text = value if isinstance(value, str) else json.dumps(value)
        words.append(f"--{key}={text.replace('{run}', str(run))}")
    if stage.command == "fit":
        words += arguments
    if seed is not None and stage.command != "report":
        words.append(f"--{'seed_everything' if stage.command == 'fit' else 'seed'}={seed}")
    return words


def _run(stage: Stage, words: list[str]) -> float:
    start = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])}
    code = subprocess.run([sys.executable, "-m", "rlhf", *words], env=environment).returncode
    if code:
        raise UserError(f"the stage {stage.name} ended with status {code}; the same command goes on from there.")
    return time.monotonic() - start


def _fingerprint(words: list[str], stage: Stage, state: _State) -> str:
    """Of everything that a stage is made from: its settings, and the earlier stages that it takes."""
    config = ""
    if "--config" in words:
        config = Path(words[words.index("--config") + 1]).read_text()
    sources = set(re.findall(r"\{run\}/([^/\"]+)", json.dumps(stage.takes)))
    taken = {name: identity for name, identity in state.identities().items() if name in sources}
    return hashlib.sha256(json.dumps([words, config, taken], sort_keys=True).encode()).hexdigest()


class _State:
    """What was run in a run folder, kept in `pipeline.json`."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.file = run / STATE
        self.stages: dict[str, dict[str, Any]] = json.loads(self.file.read_text()) if self.file.exists() else {}

    def identities(self) -> dict[str, str]:
        return {name: stage["identity"] for name, stage in self.stages.items()}

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
        self.stages[name] = {"fingerprint": fingerprint, "finished": False, "identity": uuid.uuid4().hex}
        self._write()

    def finish(self, name: str, seconds: float) -> None:
        self.stages[name] |= {"finished": True, "seconds": round(seconds, 1)}
        self._write()

    def _write(self) -> None:
        partial = self.file.with_suffix(".partial")
        partial.write_text(json.dumps(self.stages, indent=2) + "\n")
        partial.replace(self.file)
