"""Runs the stages of a pipeline, each in its own process, and jobs of several stages side by side."""

from __future__ import annotations

import json
import os
import re
import threading
import uuid
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from typing_extensions import Self

from rlhf import files
from rlhf.errors import UserError
from rlhf.seeding import DEFAULT_SEED
from rlhf.studies.processes import stage_processes

REDO = "--redo"  # in the state: what a command with --redo has begun
PRODUCT = {"fit": f"{files.EXPORT}/{files.MANIFEST}", "synthesize": "synthesize.json", "report": "report.md"}
TABLES = ("generate", "judge", "margins")  # the product of such a stage is one file
TABLE_SUFFIX = ".parquet"
SEED = {"fit": "seed_everything", "synthesize": "seed"}
PATIENCE = 60.0  # seconds that the stage of a pipeline that was killed may need to save
if TYPE_CHECKING:
    Setting = Any
else:  # as it is typed: with Any, jsonargparse would make an object of everything that has a `class_path`
    Setting = bool | int | float | str | list | dict | None
Settings = dict[str, Setting]  # nested, as in a YAML file; or of a stage: dotted key -> value


@dataclass(frozen=True)
class Stage:
    """One stage of a pipeline.

    Attributes:
        name: name of its folder in the run folder; a stage that writes a table writes `<name>.parquet`.
        command: command of train.py to run.
        config: YAML file in `config_dir`, or several, of which later ones win.
        takes: settings to override. In a value, `{run}` is replaced by the run folder, so that
            `model.model_path: "{run}/sft/export"` takes the export of the stage `sft`; `{configs}` is replaced by the
            folder of the configs, and `{seed}` by the pipeline's seed.
        settings: settings that override these, word for word.
    """

    name: str
    command: Literal["fit", "synthesize", "generate", "judge", "margins", "report"] = "fit"
    config: str | list[str] | None = None
    takes: Settings = field(default_factory=dict)
    settings: Settings = field(default_factory=dict)

    @property
    def configs(self) -> list[str]:
        """All of its YAML files."""
        return [self.config] if isinstance(self.config, str) else self.config or []


def filled(stages: Iterable[Stage], **values: object) -> list[Stage]:
    """Replaces `{name}` by a value, everywhere in stages."""
    text = json.dumps([asdict(stage) for stage in stages])
    for name, value in values.items():
        text = text.replace(f"{{{name}}}", str(value))
    return [Stage(**stage) for stage in json.loads(text)]


@dataclass
class Runner:
    """Runs stages in one run folder, each in its own process; one at a time, or several from threads.

    It owns the folder until it is closed, as a context manager is.
    """

    run: Path  # its file `pipeline.json` records what was run
    config_dir: Path = Path()
    seed: int | None = None  # of the data and of every training stage, instead of the one in the config
    arguments: Sequence[str] = ()  # for the command line of every training stage
    others: dict[str, Path] = field(default_factory=dict)  # folders of other pipelines, for `{name}` in `takes`
    logged: bool = False  # whether a stage writes what it prints to `<name>.log` in the run folder
    redo: Sequence[str] | None = None  # stages to make again, with all that is made from them; None: no such setting
    writes: bool = True  # else it owns nothing, and only looks

    def __post_init__(self) -> None:
        self._owned = ExitStack()
        if self.writes:
            self._owned.enter_context(files.owned(self.run))
        self._lock = threading.Lock()
        self._recorded = read_state(self.run)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self._owned.__exit__(*error)

    def prepare(self, stages: Sequence[Stage]) -> None:
        """Moves aside what `redo` names and all that is made from it, and refuses what has other settings.

        Args:
            stages: all stages that are to run, in their order.

        Raises:
            UserError: `redo` names no stage, or results of other settings are in the way.
        """
        self.move_aside(stages, self.made_again(stages))

    def made_again(self, stages: Sequence[Stage]) -> set[str]:
        """Returns the names of the stages that `redo` names and of those that are made from them.

        Raises:
            UserError: see `prepare`.
        """
        redo, renewed, refused = set(self.redo or ()), set[str](), list[Stage]()
        if redo and self._recorded.get(REDO) == self._begun(stages):
            redo = set()  # what this command began before is resumed
        if unknown := redo - {stage.name for stage in stages}:
            names = ", ".join(stage.name for stage in stages)
            raise UserError(f"redo: there is no stage {min(unknown)!r}; the stages are {names}.")
        for stage in stages:
            with self._alone(stage):
                taken = _names("run", json.dumps(stage.takes)) - {stage.name}
            if stage.name in redo or taken & redo:
                redo.add(stage.name)
            elif self._blocks(stage, self._made_from(stage), renewed):
                refused.append(stage)
            elif not taken & renewed and self.check(stage):
                continue
            renewed.add(stage.name)
        if refused:
            raise self._refusal(refused)
        return redo

    def move_aside(self, stages: Sequence[Stage], redo: set[str]) -> None:
        """Moves aside what some stages, given by their names, have made, and records that they are made again."""
        if not redo:
            return
        for stage in stages:
            if stage.name in redo and self._holds(stage):
                with self._alone(stage):
                    print(f"redo: {self.place(stage)} is now {files.set_aside(self.place(stage))}", flush=True)
        self._write(
            {name: entry for name, entry in self._recorded.items() if name not in redo} | {REDO: self._begun(stages)}
        )

    def finish(self) -> None:
        """Records that all stages are finished: nothing more is to come, and `redo` means a new time again."""
        recorded = {name: entry for name, entry in self._recorded.items() if name != REDO}
        self._write(recorded | {files.ENDED: {"finished": True}})

    def _begun(self, stages: Sequence[Stage]) -> dict[str, Any]:
        settings = [self._made_from(stage)["settings"] for stage in stages]
        return {"stages": sorted(self.redo or ()), "settings": files.fingerprint(settings)}

    def run_stage(self, stage: Stage, title: str = "") -> None:
        """Runs or resumes a stage, and skips a finished one.

        Raises:
            UserError: it failed, it was run with other settings, or something that it takes is missing.
        """
        title = f"{title} {stage.name}".strip()
        words, made_from, place = self.words(stage), self._made_from(stage), self.place(stage)
        with self._alone(stage):
            finished = self.check(stage)
        if finished:
            print(f"{title}: finished before, skipped", flush=True)
            return
        if self._outdated(stage, made_from):
            for suffix in ("", files.NOTES, files.PARTS):  # the answers of a judge stay
                files.remove(place.with_name(place.name + suffix))
        resuming = stage.command == "fit" and files.holds_run(place)
        if resuming:
            words += ["--ckpt_path", "last"]
        print(f"{title}: {'resuming' if resuming else 'train.py ' + ' '.join(words)}", flush=True)
        entry = {**made_from, "finished": False, "identity": uuid.uuid4().hex}
        self._record(stage, entry)
        log = self.run / f"{stage.name}.log" if self.logged else None
        ended = stage_processes.run(words, log)
        stage_processes.check()
        if ended.status:
            status = f"{ended.status}, see {log}" if log else ended.status
            raise UserError(f"the stage {stage.name} ended with status {status}; the same command resumes it.")
        measured = {"seconds": round(ended.seconds, 1), "peak_gib": round(ended.peak_gib, 2)}
        self._record(stage, entry | {"finished": True, **measured})
        print(f"{title}: done in {ended.seconds:.0f} s, {ended.peak_gib:.1f} GiB at most\n", flush=True)

    def job(self, name: str, stages: Iterable[Stage], after: str | None = None) -> Job:
        """Returns a job that runs stages one after another."""

        def run() -> None:
            for stage in stages:
                self.run_stage(stage, f"{name}:")
            self.finish()

        return Job(name, run, after)

    def check(self, stage: Stage) -> bool:
        """Tells whether a stage is finished, with these settings and from these exports.

        Raises:
            UserError: it cannot run: something that it takes is missing, or there is a run with other settings.
        """
        made_from = self._made_from(stage)
        if self._blocks(stage, made_from):
            raise self._refusal([stage])
        return self._same(stage, made_from) and self.finished(stage)

    def _same(self, stage: Stage, made_from: dict[str, Any]) -> bool:
        return made_from.items() <= self._recorded.get(stage.name, {}).items()

    def _blocks(self, stage: Stage, made_from: dict[str, Any], renewed: Iterable[str] = ()) -> bool:
        """Tells whether a stage has results of other settings, or from stages that are made again, that nobody gave up.

        Tables of these settings are made again without a question, and so is what has neither checkpoint nor export.
        """
        known = self._recorded.get(stage.name)
        if not self._holds(stage) or (known is None and stage.command != "fit"):
            return False
        if known is not None and stage.command in TABLES and known.get("settings") == made_from["settings"]:
            return False
        return not self._same(stage, made_from) or not made_from["taken"].keys().isdisjoint(renewed)

    def _holds(self, stage: Stage) -> bool:
        """Tells whether a stage has made something that took time."""
        place = self.place(stage)
        if stage.command == "fit":
            return files.holds_run(place)
        if stage.command in TABLES:
            return place.exists() or place.with_name(place.name + files.PARTS).exists()
        return stage.command != "report" and self.product(stage).exists()

    def _refusal(self, stages: Sequence[Stage]) -> UserError:
        names = [stage.name for stage in stages]
        how = f"move aside with --redo {' '.join(names)}" if self.redo is not None else "move away"
        return UserError(
            f"{self.run} holds results of {', '.join(names)} with other settings or from other exports, which you can "
            f"{how} to make them again; or choose another --run_dir."
        )

    def _alone(self, stage: Stage) -> AbstractContextManager[None]:
        """Owns what a stage writes, once what a killed pipeline has left running there has saved and stopped."""
        place, table = self.place(stage), stage.command in TABLES
        there = table or (stage.command == "fit" and place.exists())
        return files.owned(place, patience=PATIENCE, beside=table) if there else nullcontext()

    def finished(self, stage: Stage) -> bool:
        """Tells whether a stage was run to its end, with whatever settings."""
        return self._recorded.get(stage.name, {}).get("finished", False) and self.product(stage).is_file()

    def place(self, stage: Stage) -> Path:
        """Returns the folder or the table that a stage writes."""
        if stage.command in TABLES:
            return Path(self._filled(stage.takes.get("output", f"{{run}}/{stage.name}{TABLE_SUFFIX}")))
        return self.run if stage.command == "report" else self.run / stage.name

    def product(self, stage: Stage) -> Path:
        """Returns the file that a stage writes last."""
        return self.place(stage) / PRODUCT.get(stage.command, "")

    def words(self, stage: Stage) -> list[str]:
        """Returns the command line of a stage."""
        words: list[str] = [stage.command]
        for config in self._configs(stage):
            words += ["--config", str(config)]
        output = "run_dir" if stage.command == "fit" else "output"
        filled = {key: self._filled(as_word(value)) for key, value in stage.takes.items()}
        settings = {key: as_word(value) for key, value in stage.settings.items()}
        words += [f"--{key}={text}" for key, text in ({output: str(self.place(stage))} | filled | settings).items()]
        if stage.command == "fit":
            words += self.arguments
        if self.seed is not None and stage.command in SEED:
            words.append(f"--{SEED[stage.command]}={self.seed}")
        return words

    def _configs(self, stage: Stage) -> list[Path]:
        paths = [self.config_dir / name for name in stage.configs]
        for path in paths:
            if not path.is_file():
                raise UserError(f"stages.{stage.name}.config: there is no file {path}.")
        return paths

    def _filled(self, text: str) -> str:
        seed = str(DEFAULT_SEED if self.seed is None else self.seed)
        text = text.replace('"{seed}"', seed).replace("{seed}", seed)  # a number in JSON, too
        for name, folder in {"run": self.run, "configs": self.config_dir, **self.others}.items():
            text = text.replace(f"{{{name}}}", str(folder))
        return text

    def _made_from(self, stage: Stage) -> dict[str, Any]:
        """Returns a fingerprint of a stage's settings, without paths, and identities of the stages it takes from."""
        takes = json.dumps(stage.takes, sort_keys=True)
        own = json.dumps(stage.settings, sort_keys=True) if stage.settings else ""
        settings = [stage.command, takes, own, *(config.read_text(errors="replace") for config in self._configs(stage))]
        if stage.command == "fit":
            settings += self.arguments
        if stage.command in SEED or "{seed}" in takes:
            settings.append(str(self.seed))
        names = _names("run", takes) - {stage.name}
        taken = {name: entry["identity"] for name, entry in self._recorded.items() if name in names}
        for other, folder in self.others.items():
            theirs = read_state(folder)
            for name in _names(other, takes):
                if not (theirs.get(name, {}).get("finished") and (folder / name).is_dir()):
                    raise UserError(
                        f"{other}: {folder} has no finished stage {name!r}; run its pipeline first, for the quickstart "
                        "with `python train.py pipeline --config configs/quickstart/pipeline.yaml`."
                    )
                taken[f"{other}/{name}"] = theirs[name]["identity"]
        return {"settings": files.fingerprint(settings), "taken": taken}

    def _outdated(self, stage: Stage, made_from: dict[str, Any]) -> bool:
        """Tells whether a table, or its parts, was made with these settings from stages that were run again since."""
        known = self._recorded.get(stage.name, {})
        same_settings = known.get("settings") == made_from["settings"]
        return stage.command in TABLES and same_settings and known["taken"] != made_from["taken"]

    def _record(self, stage: Stage, entry: dict[str, Any]) -> None:
        with self._lock:
            kept = {name: known for name, known in self._recorded.items() if name != files.ENDED or entry["finished"]}
            self._write({**kept, stage.name: entry})

    def _write(self, recorded: dict[str, dict[str, Any]]) -> None:
        self._recorded = recorded
        files.write_text(self.run / files.STATE, json.dumps(recorded, indent=2) + "\n")


def as_word(value: Any) -> str:
    """Returns a value as it is typed on a command line."""
    return value if isinstance(value, str) else json.dumps(value)


def read_state(run: Path) -> dict[str, dict[str, Any]]:
    """Returns what was recorded of the stages that ran in a run folder, by name."""
    file = run / files.STATE
    return json.loads(file.read_text()) if file.exists() else {}


def _names(placeholder: str, takes: str) -> set[str]:
    """Returns the names of the stages that a stage takes from a folder."""
    return {name.removesuffix(TABLE_SUFFIX) for name in re.findall(rf"\{{{placeholder}\}}/([^/\"]+)", takes)}


class Job(NamedTuple):
    """Work that can run beside other jobs, once the job named `after` has succeeded."""

    name: str
    run: Callable[[], None]
    after: str | None = None


def run_jobs(
    jobs: Sequence[Job], processes: int, write_result: Callable[[], None], so_far: Callable[[], None] | None = None
) -> None:
    """Runs jobs, `processes` at a time, calls `so_far` after each, and writes the result of those that are finished.

    A job that fails stops only the jobs that come after it, which are listed behind it.

    Raises:
        UserError: some jobs failed.
    """
    if processes > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    failed: dict[str | None, str] = {}
    pool = ThreadPoolExecutor(processes)
    with stage_processes.forwarded_signals():
        try:
            running = {pool.submit(job.run): job for job in jobs if job.after is None}
            while running:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    job = running.pop(future)
                    try:
                        future.result()
                        running |= {pool.submit(later.run): later for later in jobs if later.after == job.name}
                    except UserError as error:
                        print(f"failed: {error}", flush=True)
                        failed[job.name] = str(error)
                if running and so_far:
                    with suppress(UserError):  # it comes again in the end
                        so_far()
        finally:
            pool.shutdown(cancel_futures=True)
    for job in jobs:
        if job.after in failed:
            failed[job.name] = f"{job.name}: not run, because {job.after} failed"
    write_result()
    if failed:
        head = f"{len(failed)} of {len(jobs)} jobs failed; the same command resumes them:"
        raise UserError("\n".join([head, *failed.values()]))
