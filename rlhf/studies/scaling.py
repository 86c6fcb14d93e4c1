"""The scaling study: SFT, reward model, PPO and evaluation for several model sizes and seeds, and one report."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from rlhf import files
from rlhf.checks import at_least
from rlhf.errors import UserError
from rlhf.report.lengths import Unit
from rlhf.report.report import report
from rlhf.report.runs import STAGES, Baseline, Run
from rlhf.studies.pipeline import Job, Runner, Stage, run_jobs

SHARED = "shared"
BASE = "base"
EXPORTS = re.compile(r"\{run\}/([^/]+)/export-\{update\}")


def scaling(
    sizes: list[str],
    seeds: list[int],
    stages: list[Stage],
    policies: dict[str, str],
    checkpoints: list[Stage] | None = None,
    shared: list[Stage] | None = None,
    base: list[Stage] | None = None,
    baselines: list[Baseline] | None = None,
    lengths: Unit = "tokens",
    samples: int = 5,
    run_dir: str = "runs/scaling",
    config_dir: str = ".",
    arguments: list[str] | None = None,
    processes: int = 1,
) -> None:
    """Run SFT, reward model, PPO and their evaluation for every model size and seed, and write one report.

    In the names of config files and in what stages take, `{size}` stands for the size, `{run}` for the folder of this
    size and seed (`<run_dir>/<size>/seed-<seed>`), `{base}` for that of the size (`<run_dir>/<size>/base`) and
    `{shared}` for the one that all sizes share (`<run_dir>/shared`).

    Every stage has its own process and its own log. Finished stages are skipped; a stopped one goes on from its last
    checkpoint; a run that fails does not stop the others. The report is made of the runs that are finished.

    Args:
        sizes: names of the model sizes.
        seeds: of the training stages; each size runs once with each.
        stages: what to run for every size and seed, in order, as in a pipeline.
        policies: label of a policy -> the stage that judges it against the reference.
        checkpoints: what to run for every export that PPO has made on its way, after `stages`: `{update}` stands for
            the number of updates, and the last of them judges. They take `{run}/ppo/export-{update}`.
        shared: what to run once for all sizes.
        base: what to run once for each size.
        baselines: results of others, for the report.
        lengths: what the report measures lengths in.
        samples: how many sample summaries the report shows.
        run_dir: folder of all runs and of the report.
        config_dir: folder in which the configs of the stages lie.
        arguments: further words for the command line of every training stage.
        processes: how many stages run at a time; they share the cores.
    """
    _check(sizes, seeds, stages, policies, checkpoints or [])
    at_least("processes", processes, 1)
    out = files.claim(run_dir, resuming=True)
    new = partial(Runner, config_dir=Path(config_dir), arguments=arguments, logged=True)
    commons = new(_claim(out, SHARED))
    jobs = [_job(SHARED, commons, shared or [])]
    members = []
    for size in sizes:
        others = {SHARED: commons.run}
        common = new(_claim(out, size, BASE), others=others)
        jobs.append(_job(f"{size}/{BASE}", common, [_with(stage, size=size) for stage in base or []], SHARED))
        for seed in seeds:
            runner = new(_claim(out, size, f"seed-{seed}"), seed=seed, others={**others, BASE: common.run})
            own = [[_with(stage, size=size) for stage in part] for part in (stages, checkpoints or [])]
            members.append(_Member(size, seed, runner, *own))
    jobs += [member.job() for member in members]
    failed = run_jobs(jobs, processes)
    finished = [member for member in members if member.finished()]
    if finished:
        report(str(out), [member.result(policies) for member in finished], baselines or (), lengths, samples)
        print(f"Report:  {out / 'report.md'}, of {len(finished)} of {len(members)} runs")
    if failed:
        raise UserError(
            f"{len(failed)} of {len(jobs)} parts of the study failed; the same command goes on with them:\n"
            + "\n".join(failed.values())
        )


def _check(
    sizes: list[str], seeds: list[int], stages: list[Stage], policies: dict[str, str], checkpoints: list[Stage]
) -> None:
    """Refuse what can't be run, before anything does."""
    for setting, values in (("sizes", sizes), ("seeds", seeds)):
        at_least(f"the number of {setting}", len(values), 1)
        double = [value for value, count in Counter[object](values).items() if count > 1]
        if double:
            raise UserError(f"{setting}: {double[0]} stands there more than once.")
    for size in sizes:
        if not re.fullmatch(r"\w[\w.-]*", size):
            raise UserError(f"sizes: {size!r} is no name for a folder; use letters, digits, '.', '-' and '_'.")
    at_least("the number of policies", len(policies), 1)
    judges = [stage.name for stage in stages if stage.command == "judge"]
    for label, name in policies.items():
        if name not in judges:
            raise UserError(
                f"policies.{label}: there is no stage {name!r} that judges; there are: {', '.join(judges)}."
            )
    if not any(stage.command == "fit" for stage in stages):
        raise UserError("stages: none of them trains a model.")
    if checkpoints and not (_exporting(checkpoints) and checkpoints[-1].command == "judge"):
        raise UserError("checkpoints: one stage must take '{run}/ppo/export-{update}', and the last one must judge.")


def _exporting(checkpoints: Sequence[Stage]) -> str | None:
    """The stage whose exports are evaluated."""
    found = EXPORTS.search(json.dumps([stage.takes for stage in checkpoints]))
    return found and found[1]


def _with(stage: Stage, **values: object) -> Stage:
    """A stage with values in the place of `{name}`, wherever it stands."""
    text = json.dumps(asdict(stage))
    for name, value in values.items():
        text = text.replace(f"{{{name}}}", str(value))
    return Stage(**json.loads(text))


def _claim(out: Path, *names: str) -> Path:
    return files.claim(str(out.joinpath(*names)), resuming=True)


def _job(name: str, runner: Runner, stages: list[Stage], after: str | None = None) -> Job:
    """Stages one after another.

    Raises:
        UserError: one of their config files is missing.
    """
    for stage in stages:
        runner.words(stage)

    def run() -> None:
        for stage in stages:
            runner.run_stage(stage, f"{name}:")

    return Job(name, run, after)


@dataclass(frozen=True)
class _Member:
    """One size and seed of a study.

    Attributes:
        size, seed: which.
        runner: of its folder.
        stages: its own.
        checkpoints: what runs for every export that PPO has made on its way, with `{update}`.
    """

    size: str
    seed: int
    runner: Runner
    stages: list[Stage]
    checkpoints: list[Stage]

    def job(self) -> Job:
        """Its stages, then those of the checkpoints."""
        name = f"{self.size}/seed-{self.seed}"
        trained = _job(name, self.runner, self.stages, f"{self.size}/{BASE}")
        _job(name, self.runner, self.checkpoints)

        def run() -> None:
            trained.run()
            if self.checkpoints and not self.updates():
                raise UserError(
                    f"checkpoints: {self.runner.run / str(_exporting(self.checkpoints))} has no export-<n>; give the "
                    "callback rlhf.callbacks.export.Export an every_n_epochs."
                )
            for update in self.updates():
                _job(name, self.runner, [_with(stage, update=update) for stage in self.checkpoints]).run()

        return Job(name, run, trained.after)

    def updates(self) -> list[int]:
        """The numbers of updates after which PPO was exported."""
        if not self.checkpoints:
            return []
        folder = self.runner.run / str(_exporting(self.checkpoints))
        return sorted(int(path.name.partition("-")[2]) for path in folder.glob("export-*") if files.is_complete(path))

    def finished(self) -> bool:
        """Whether all stages are, those of checkpoints aside."""
        return all(self.runner.finished(stage) for stage in self.stages)

    def result(self, policies: dict[str, str]) -> Run:
        """What it hands to the report, when it is finished."""
        stages = {stage.name: stage for stage in self.stages}
        trained = next(stage.name for stage in self.stages if stage.command == "fit")
        judged = {update: _with(self.checkpoints[-1], update=update) for update in self.updates()}
        margins = [str(self.runner.product(stage)) for stage in self.stages if stage.command == "margins"]
        return Run(
            size=self.size,
            parameters=count_parameters(self.runner.run / trained / "export"),
            seed=self.seed,
            policies={label: str(self.runner.product(stages[name])) for label, name in policies.items()},
            margins=margins[0] if margins else None,
            stages={name: str(self.runner.run / name) for name in STAGES if name in stages},
            checkpoints={u: str(self.runner.product(s)) for u, s in judged.items() if self.runner.finished(s)},
        )


def count_parameters(export: Path) -> int:
    """Number of weights in the safetensors files of an export; their headers are read and nothing else."""
    from safetensors import safe_open

    total = 0
    for file in export.glob("*.safetensors"):
        with safe_open(file, framework="numpy") as tensors:
            total += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    return total
