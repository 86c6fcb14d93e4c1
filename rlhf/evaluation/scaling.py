"""The scaling study: SFT, reward model, PPO and evaluation for several model sizes and seeds, and one report."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Literal

from rlhf import run_folder
from rlhf.callbacks.export import is_complete
from rlhf.checks import at_least
from rlhf.errors import UserError
from rlhf.evaluation.runs import Baseline, Run
from rlhf.pipeline import Job, Runner, Stage, run_jobs

SHARED = "shared"
BASE = "base"
CURVES = ("sft", "reward", "ppo")
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
    lengths: Literal["tokens", "characters"] = "tokens",
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
    out = run_folder.claim(run_dir, resuming=True)
    study = _Study(out, Path(config_dir), arguments, sizes, seeds, stages, checkpoints or [], shared or [], base or [])
    failed = run_jobs(study.jobs(), processes)
    runs = [study.result(size, seed, policies) for size in sizes for seed in seeds if study.finished(size, seed)]
    if runs:
        from rlhf.evaluation.report import report

        report(str(out), runs, baselines or [], lengths, samples)
        print(f"Report:  {out / 'report.md'}, of {len(runs)} of {len(sizes) * len(seeds)} runs")
    if failed:
        raise UserError(
            f"{len(sizes) * len(seeds) - len(runs)} of {len(sizes) * len(seeds)} runs are not finished; the same "
            "command goes on with them:\n" + "\n".join(failed.values())
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


class _Study:
    """The stages of a study, and where they run."""

    def __init__(
        self,
        out: Path,
        config_dir: Path,
        arguments: list[str] | None,
        sizes: list[str],
        seeds: list[int],
        stages: list[Stage],
        checkpoints: list[Stage],
        shared: list[Stage],
        base: list[Stage],
    ) -> None:
        self.out, self.stages, self.checkpoints, self.shared, self.base = out, stages, checkpoints, shared, base
        self.sizes, self.seeds = sizes, seeds
        new = partial(Runner, config_dir=config_dir, arguments=arguments, logged=True)
        self.commons = new(self._folder(SHARED))
        others = {"shared": self.commons.run}
        self.bases = {size: new(self._folder(size, BASE), others=others) for size in sizes}
        self.runners = {
            (size, seed): new(
                self._folder(size, f"seed-{seed}"), seed=seed, others=others | {"base": self.bases[size].run}
            )
            for size in sizes
            for seed in seeds
        }

    def _folder(self, *names: str) -> Path:
        return run_folder.claim(str(self.out.joinpath(*names)), resuming=True)

    def jobs(self) -> list[Job]:
        """Of all folders, those that others take from first."""
        jobs = [Job(SHARED, partial(self._run, SHARED, self.commons, self.shared))]
        for size in self.sizes:
            stages = [_with(stage, size=size) for stage in self.base]
            jobs.append(Job(f"{size}/{BASE}", partial(self._run, f"{size}/{BASE}", self.bases[size], stages), SHARED))
        for (size, seed), runner in self.runners.items():
            name = f"{size}/seed-{seed}"
            jobs.append(Job(name, partial(self._run_seed, name, runner, size), f"{size}/{BASE}"))
            for stage in self.stages:
                runner.words(_with(stage, size=size))  # raises before anything has run
        return jobs

    def _run(self, name: str, runner: Runner, stages: list[Stage]) -> None:
        for stage in stages:
            runner.run_stage(stage, f"{name}:")

    def _run_seed(self, name: str, runner: Runner, size: str) -> None:
        self._run(name, runner, [_with(stage, size=size) for stage in self.stages])
        updates = self._updates(runner)
        if self.checkpoints and not updates:
            raise UserError(
                f"checkpoints: {runner.run / str(_exporting(self.checkpoints))} has no export-<n>; give the callback "
                "rlhf.callbacks.export.Export an every_n_epochs."
            )
        for update in updates:
            self._run(name, runner, [_with(stage, size=size, update=update) for stage in self.checkpoints])

    def _updates(self, runner: Runner) -> list[int]:
        """After which updates PPO was exported."""
        if not self.checkpoints:
            return []
        folder = runner.run / str(_exporting(self.checkpoints))
        return sorted(int(path.name.partition("-")[2]) for path in folder.glob("export-*") if is_complete(path))

    def finished(self, size: str, seed: int) -> bool:
        """Whether all stages of a run are, those of checkpoints aside."""
        return all(self.runners[size, seed].finished(_with(stage, size=size)) for stage in self.stages)

    def result(self, size: str, seed: int, policies: dict[str, str]) -> Run:
        """What a finished run hands to the report."""
        runner = self.runners[size, seed]
        stages = {stage.name: _with(stage, size=size) for stage in self.stages}
        margins = [str(runner.product(stage)) for stage in stages.values() if stage.command == "margins"]
        judged = {update: _with(self.checkpoints[-1], size=size, update=update) for update in self._updates(runner)}
        trained = next(name for name, stage in stages.items() if stage.command == "fit")
        return Run(
            size=size,
            parameters=count_parameters(runner.run / trained / "export"),
            seed=seed,
            policies={label: str(runner.product(stages[name])) for label, name in policies.items()},
            margins=margins[0] if margins else None,
            stages={name: str(runner.run / name) for name in CURVES if name in stages},
            checkpoints={u: str(runner.product(stage)) for u, stage in judged.items() if runner.finished(stage)},
        )


def count_parameters(export: Path) -> int:
    """Number of weights in the safetensors files of an export; their headers are read and nothing else."""
    from safetensors import safe_open

    total = 0
    for file in export.glob("*.safetensors"):
        with safe_open(file, framework="numpy") as tensors:
            total += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    return total
