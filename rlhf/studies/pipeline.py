"""Stages one after another, each in its own process; finished ones are skipped, a stopped one goes on."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rlhf import files
from rlhf.errors import UserError
from rlhf.studies.processes import Ended, stage_processes

STATE = "pipeline.json"
PRODUCT = {"fit": "export/rlhf.json", "synthesize": "synthesize.json", "report": "report.md"}
TABLES = ("generate", "judge", "margins")  # the product of such a stage is one file
TABLE_SUFFIX = ".parquet"
DEFAULT_SEED = 44413  # of training stages, where neither config nor command line says another
SEED = {"fit": "seed_everything", "synthesize": "seed"}


@dataclass(frozen=True)
class Stage:
    """One stage of a pipeline.

    Attributes:
        name: of its folder in the run folder; a stage that writes a table writes `<name>.parquet`.
        command: what to run, as on the command line.
        config: its YAML file in `config_dir`; of several, later ones win.
        takes: settings to override; `{run}` in a value stands for the run folder, so that
            `model.model_path: "{run}/sft/export"` takes the export of the stage `sft`; `{configs}` is the folder of
            the configs, and `{seed}` the pipeline's seed.
    """

    name: str
    command: Literal["fit", "synthesize", "generate", "judge", "margins", "report"] = "fit"
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

    Finished stages are skipped; a stopped one goes on from its last checkpoint. Tables and reports are made anew when
    a stage that they are made from was. SIGTERM stops the stage that runs after it has saved.

    Args:
        stages: what to run, in order.
        run_dir: folder of the whole run; every stage gets a folder in it.
        config_dir: folder in which the configs of the stages lie.
        seed: of the data and of every training stage, in place of the one in its config.
        arguments: further words for the command line of every training stage, for example `--trainer.devices=2`.
    """
    run = files.claim(run_dir, resuming=True)
    runner = Runner(run, Path(config_dir), seed, arguments)
    started = time.monotonic()
    with stage_processes.forwarded_signals():
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
        others: folders of other pipelines by name; in what a stage takes, `{name}` stands for its folder.
        logged: a stage writes what it prints to `<name>.log` in the run folder.
    """

    def __init__(
        self,
        run: Path,
        config_dir: Path = Path("."),
        seed: int | None = None,
        arguments: list[str] | None = None,
        others: dict[str, Path] | None = None,
        logged: bool = False,
    ) -> None:
        self.run, self.config_dir, self.seed, self.logged = run, config_dir, seed, logged
        self.arguments, self.others = arguments or [], others or {}
        self._state = _State(run)

    def run_stage(self, stage: Stage, title: str = "") -> None:
        """Run a stage, or go on with it; a finished one is skipped.

        Args:
            stage: what to run.
            title: what the lines about it begin with.

        Raises:
            UserError: it failed, it was run with other settings, or a stage of another pipeline is missing.
        """
        words, made_from, finished = self.plan(stage)
        title = f"{title} {stage.name}".strip()
        if finished:
            print(f"{title}: finished before, skipped", flush=True)
            return
        if self._state.outdated(stage, made_from):
            _delete_table(self.product(stage))
        resuming = stage.command == "fit" and (self.run / stage.name / files.CONFIG).exists()
        if resuming:
            words += ["--ckpt_path", "last"]
        print(f"{title}: {'going on' if resuming else 'train.py ' + ' '.join(words)}", flush=True)
        self._state.start(stage.name, made_from)
        log = self.run / f"{stage.name}.log" if self.logged else None
        ended = _run(stage, words, log)
        self._state.finish(stage.name, ended)
        print(f"{title}: done in {ended.seconds:.0f} s, {ended.peak_gib:.1f} GiB at most\n", flush=True)

    def plan(self, stage: Stage) -> tuple[list[str], dict[str, str], bool]:
        """The command line of a stage, fingerprints of all that it is made from, and whether it is finished.

        Raises:
            UserError: it can't run, see `run_stage`.
        """
        words = self.words(stage)
        made_from = _fingerprints(words, self._taken(stage))
        return words, made_from, self._state.finished(stage, made_from, self.product(stage))

    def product(self, stage: Stage) -> Path:
        """The file that a finished stage has written last."""
        if stage.command in TABLES:
            return Path(self._filled(stage.takes.get("output", f"{{run}}/{stage.name}{TABLE_SUFFIX}")))
        folder = self.run if stage.command == "report" else self.run / stage.name
        return folder / PRODUCT[stage.command]

    def finished(self, stage: Stage) -> bool:
        """Whether a stage was run to its end."""
        known = self._state.stages.get(stage.name)
        return known is not None and known["finished"] and self.product(stage).is_file()

    def words(self, stage: Stage) -> list[str]:
        """The command line of a stage.

        Raises:
            UserError: one of its config files is missing.
        """
        words: list[str] = [stage.command]
        for name in [stage.config] if isinstance(stage.config, str) else stage.config or []:
            config = self.config_dir / name
            if not config.is_file():
                raise UserError(f"stages.{stage.name}.config: there is no file {config}.")
            words += ["--config", str(config)]
        output = "run_dir" if stage.command == "fit" else "output"
        place = self.product(stage) if stage.command in TABLES else self.run / stage.name
        takes = {output: str(self.run if stage.command == "report" else place)} | stage.takes
        for key, value in takes.items():
            words.append(f"--{key}={self._filled(value if isinstance(value, str) else json.dumps(value))}")
        if stage.command == "fit":
            words += self.arguments
        if self.seed is not None and stage.command in SEED:
            words.append(f"--{SEED[stage.command]}={self.seed}")
        return words

    def _filled(self, text: str) -> str:
        seed = str(DEFAULT_SEED if self.seed is None else self.seed)
        text = text.replace('"{seed}"', seed).replace("{seed}", seed)  # a number in JSON, too
        for name, folder in {"run": self.run, "configs": self.config_dir, **self.others}.items():
            text = text.replace(f"{{{name}}}", str(folder))
        return text

    def _taken(self, stage: Stage) -> dict[str, str]:
        """The identities of the stages that this one takes from."""
        takes = json.dumps(stage.takes)

        def names(placeholder: str) -> set[str]:
            found = re.findall(rf"\{{{placeholder}\}}/([^/\"]+)", takes)
            return {name.removesuffix(TABLE_SUFFIX) for name in found}

        taken = {name: self._state.stages[name]["identity"] for name in names("run") & set(self._state.stages)}
        for other, folder in self.others.items():
            theirs = _State(folder)
            for name in names(other):
                known = theirs.stages.get(name, {"finished": False})
                if not (known["finished"] and (folder / name).is_dir()):
                    raise UserError(
                        f"{other}: {folder} has no finished stage {name!r}; run its pipeline first, for the quickstart "
                        "with `python train.py pipeline --config configs/quickstart/pipeline.yaml`."
                    )
                taken[f"{other}/{name}"] = known["identity"]
        return taken


@dataclass(frozen=True)
class Job:
    """Work that other jobs can run beside.

    Attributes:
        name: in messages.
        run: does it; raises `UserError` when it fails.
        after: name of the job that must have ended well before this one begins.
    """

    name: str
    run: Callable[[], None]
    after: str | None = None


def run_jobs(jobs: list[Job], processes: int) -> dict[str, str]:
    """Run jobs, `processes` at a time, which share the cores; one that fails stops only those that come after it.

    Returns:
        Names of the jobs that failed or could not begin, and why.
    """
    if processes > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    waiting, running = list(jobs), dict[Future[None], Job]()
    done, failed = set[str | None]([None]), dict[str, str]()
    with stage_processes.forwarded_signals(), ThreadPoolExecutor(processes) as pool:
        try:
            while waiting or running:
                failed |= {
                    job.name: f"{job.name}: not run, for {job.after} failed" for job in waiting if job.after in failed
                }
                waiting = [job for job in waiting if job.name not in failed]
                running |= {pool.submit(job.run): job for job in waiting if job.after in done}
                waiting = [job for job in waiting if job.after not in done]
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    job, error = running.pop(future), future.exception()
                    if error is None:
                        done.add(job.name)
                    elif isinstance(error, UserError):
                        print(f"failed: {error}", flush=True)
                        failed[job.name] = str(error)
                    else:
                        raise error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failed


def _run(stage: Stage, words: list[str], log: Path | None = None) -> Ended:
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
    ended = stage_processes.run(words, log)
    stage_processes.check()
    if ended.status:
        seen = f", see {log}" if log is not None else ""
        raise UserError(
            f"the stage {stage.name} ended with status {ended.status}{seen}; the same command goes on from there."
        )
    return ended


def _delete_table(table: Path) -> None:
    """With its settings and parts; the answers of a judge stay."""
    table.unlink(missing_ok=True)
    table.with_name(f"{table.name}{files.NOTES}").unlink(missing_ok=True)
    shutil.rmtree(table.with_name(f"{table.name}{files.PARTS}"), ignore_errors=True)


def _fingerprints(words: list[str], taken: dict[str, str]) -> dict[str, str]:
    """Of the settings of a stage alone, and with the earlier stages that it takes."""
    configs = "".join(Path(value).read_text() for word, value in itertools.pairwise(words) if word == "--config")

    def digest(*parts: Any) -> str:
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    return {"settings": digest(words, configs), "fingerprint": digest(words, configs, taken)}


class _State:
    """What was run in a run folder, kept in `pipeline.json`."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.file = run / STATE
        self._lock = threading.Lock()
        self.stages: dict[str, dict[str, Any]] = json.loads(self.file.read_text()) if self.file.exists() else {}

    def finished(self, stage: Stage, made_from: dict[str, str], product: Path) -> bool:
        """Whether a stage is done; refuses one that was run with other settings."""
        known = self.stages.get(stage.name)
        place = product if stage.command in TABLES else self.run / stage.name
        if known is None and stage.command == "fit" and (place / files.CONFIG).exists():
            raise UserError(f"{place} holds a run that this pipeline did not start; choose another --run_dir.")
        if known is None or not (place.exists() or stage.command == "report"):
            return False
        if known["fingerprint"] == made_from["fingerprint"]:
            return known["finished"] and product.is_file()
        if stage.command == "report" or self.outdated(stage, made_from):
            return False  # made anew from what there is
        raise UserError(
            f"{place} holds a run of the stage {stage.name!r} with other settings or from other exports; choose "
            "another --run_dir, or delete it to run the stage again."
        )

    def outdated(self, stage: Stage, made_from: dict[str, str]) -> bool:
        """Whether a table, or its parts, was made with these settings from stages that were run again since."""
        known = self.stages.get(stage.name)
        if known is None or stage.command not in TABLES:
            return False
        return known["settings"] == made_from["settings"] and known["fingerprint"] != made_from["fingerprint"]

    def start(self, name: str, made_from: dict[str, str]) -> None:
        self._set(name, {**made_from, "finished": False, "identity": uuid.uuid4().hex})

    def finish(self, name: str, ended: Ended) -> None:
        measured = {"seconds": round(ended.seconds, 1), "peak_gib": round(ended.peak_gib, 2)}
        self._set(name, self.stages[name] | {"finished": True, **measured})

    def _set(self, name: str, entry: dict[str, Any]) -> None:
        partial = self.file.with_suffix(".partial")
        with self._lock:
            self.stages = {**self.stages, name: entry}
            partial.write_text(json.dumps(self.stages, indent=2) + "\n")
            partial.replace(self.file)
