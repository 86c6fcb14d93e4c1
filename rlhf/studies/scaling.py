"""Runs a scaling study: SFT, reward model, PPO and evaluation for several model sizes and seeds, and one report."""

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import Field, PositiveInt
from safetensors import safe_open

from rlhf import files
from rlhf.errors import Seed, UserError
from rlhf.report.lengths import Unit
from rlhf.report.report import report
from rlhf.report.runs import STAGES, Baseline, Run
from rlhf.studies.recipe import evaluation_stages
from rlhf.studies.runner import Runner, Settings, Stage, filled, run_jobs

SHARED, BASE = "shared", "base"


def scaling(
    sizes: Annotated[list[str], Field(min_length=1)],
    seeds: Annotated[list[Seed], Field(min_length=1)],
    stages: list[Stage],
    policies: Annotated[dict[str, str], Field(min_length=1)],
    evaluation: dict[str, Settings] | None = None,
    checkpoints: list[Stage] | None = None,
    shared: list[Stage] | None = None,
    base: list[Stage] | None = None,
    baselines: Sequence[Baseline] = (),
    lengths: Unit = "tokens",
    samples: int = 5,
    run_dir: str = "runs/scaling",
    config_dir: str = ".",
    arguments: list[str] | None = None,
    processes: PositiveInt = 1,
) -> None:
    """Runs SFT, reward model, PPO and their evaluation for every model size and seed, and writes one report.

    In stages, `{size}` is replaced by the size, `{run}` by the folder of this size and seed
    (`<run_dir>/<size>/seed-<seed>`), `{base}` by that of the size (`<run_dir>/<size>/base`) and `{shared}` by the one
    that all sizes share (`<run_dir>/shared`).

    Every stage has its own process and its own log. Finished stages are skipped; a stopped one is resumed from its last
    checkpoint; a run that fails does not stop the others. The report covers the runs that are finished.

    Args:
        sizes: names of the model sizes.
        seeds: seeds of the training stages; each size runs once with each.
        stages: what to run for every size and seed, in order, as in a pipeline.
        policies: label of a policy -> the stage that judges it against the reference.
        evaluation: what the stages of the evaluation take that run after that: command -> settings, such as the data
            of `generate` and `margins` and the judge of `judge`.
        checkpoints: what to run after that for every export that PPO made during training, with `{update}` for its
            number of updates; one stage takes `{run}/ppo/export-{update}`, and the last one judges.
        shared: what to run once for all sizes.
        base: what to run once for each size.
        baselines: results of others, for the report.
        lengths: what the report measures lengths in.
        samples: how many sample summaries the report shows.
        run_dir: folder of all runs and of the report.
        config_dir: folder of the configs of the stages.
        arguments: further arguments for the command line of every training stage.
        processes: how many stages to run at a time; they share the cores.
    """
    stages = [*stages, *(evaluation_stages(evaluation) if evaluation else [])]
    shared, base, checkpoints = shared or [], base or [], checkpoints or []
    groups = {"stages": [*stages, *checkpoints], "shared": shared, "base": base}
    _check_names(sizes, seeds, groups)
    _check_stages(stages, checkpoints, policies)
    out = Path(run_dir)
    with ExitStack() as owned:
        new = partial(Runner, config_dir=Path(config_dir), arguments=arguments or [], logged=True)
        commons = owned.enter_context(new(out / SHARED))
        jobs, members = [commons.job(SHARED, shared)], []
        for size in sizes:
            before, own, exports = (filled(group, size=size) for group in (base, stages, checkpoints))
            for stage in [*shared, *before, *own, *exports]:
                commons.words(stage)  # raises if a config file is missing
            bases = owned.enter_context(new(out / size / BASE, others={SHARED: commons.run}))
            jobs.append(bases.job(f"{size}/{BASE}", before, after=SHARED))
            for seed in seeds:
                others = {SHARED: commons.run, BASE: bases.run}
                runner = owned.enter_context(new(out / size / f"seed-{seed}", seed=seed, others=others))
                members.append(_Member(size, seed, runner, own, exports))
                jobs.append(runner.job(f"{size}/seed-{seed}", members[-1].every_stage(), after=f"{size}/{BASE}"))

        def finished() -> list[Run]:
            over = (member for member in members if all(map(member.runner.finished, member.stages)))
            return [member.result(policies) for member in over]

        def write_report(known: list[Run] | None = None) -> None:
            if (runs := finished()) and runs != known:
                report(str(out), runs, baselines, lengths, samples)
                print(f"Report:  {out / 'report.html'}, of {len(runs)} of {len(members)} runs")

        def write_so_far() -> None:
            write_report(shown[-1])
            shown.append(finished())

        shown = [finished()]
        run_jobs(jobs, processes, write_report, write_so_far)


def _check_names(sizes: list[str], seeds: list[int], groups: dict[str, list[Stage]]) -> None:
    """Refuses what is named twice, and sizes that cannot be folders."""
    names = {group: [stage.name for stage in of] for group, of in groups.items()}
    for setting, values in {"sizes": sizes, "seeds": map(str, seeds), **names}.items():
        if twice := [value for value, count in Counter(values).items() if count > 1]:
            raise UserError(f"{setting}: {twice[0]} is there more than once.")
    for size in sizes:
        if not re.fullmatch(r"\w[\w.-]*", size):
            raise UserError(f"sizes: {size!r} cannot be the name of a folder; use letters, digits, '.', '-' and '_'.")


def _check_stages(stages: list[Stage], checkpoints: list[Stage], policies: dict[str, str]) -> None:
    """Refuses stages that train nothing, or that do not judge what the report is to show."""
    judges = [stage.name for stage in stages if stage.command == "judge"]
    for label, name in policies.items():
        if name not in judges:
            raise UserError(f"policies.{label}: no stage {name!r} judges; those that do are: {', '.join(judges)}.")
    if not any(stage.command == "fit" for stage in stages):
        raise UserError("stages: none of them trains a model.")
    if checkpoints and not (_exporting(checkpoints) and checkpoints[-1].command == "judge"):
        raise UserError("checkpoints: one stage must take '{run}/ppo/export-{update}', and the last one must judge.")


def _exporting(checkpoints: list[Stage]) -> str | None:
    """Returns the name of the stage that makes the exports to evaluate."""
    found = re.search(r"\{run\}/([^/]+)/export-\{update\}", json.dumps([stage.takes for stage in checkpoints]))
    return found and found[1]


class _Member(NamedTuple):
    """One size and seed of a study."""

    size: str
    seed: int
    runner: Runner
    stages: list[Stage]
    checkpoints: list[Stage]

    def every_stage(self) -> Iterator[Stage]:
        """Yields its stages, then those of the checkpoints, which are known once PPO has run."""
        yield from self.stages
        evaluations = self.evaluations()
        yield from chain(*evaluations.values())
        if self.checkpoints and not evaluations:
            raise UserError(
                f"checkpoints: {self.runner.run / str(_exporting(self.checkpoints))} has no export-<n>; give the "
                "callback rlhf.callbacks.export.Export an every_n_epochs."
            )

    def evaluations(self) -> dict[int, list[Stage]]:
        """Returns the stages of each checkpoint: number of updates -> stages."""
        updates = exported_updates(self.runner.run / str(_exporting(self.checkpoints)))
        return {update: filled(self.checkpoints, update=update) for update in updates}

    def result(self, policies: dict[str, str]) -> Run:
        """Returns its part of the report."""
        run, trained = self.runner.run, next(stage.name for stage in self.stages if stage.command == "fit")
        products = {stage.name: str(self.runner.product(stage)) for stage in self.stages}
        judged = {update: stages[-1] for update, stages in self.evaluations().items()}
        return Run(
            size=self.size,
            parameters=count_parameters(run / trained / files.EXPORT),
            seed=self.seed,
            policies={label: products[name] for label, name in policies.items()},
            margins=next((products[stage.name] for stage in self.stages if stage.command == "margins"), None),
            stages={name: str(run / name) for name in STAGES if name in products},
            checkpoints={u: str(self.runner.product(s)) for u, s in judged.items() if self.runner.finished(s)},
        )


def exported_updates(run: Path) -> list[int]:
    """Lists after how many updates or epochs a run has exported its policy on its way."""
    exports = run.glob(f"{files.EXPORT}-*")
    return sorted(int(path.name.partition("-")[2]) for path in exports if files.is_complete(path))


def count_parameters(export: Path) -> int:
    """Counts the weights in the safetensors files of an export; reads only their headers."""
    total = 0
    for file in export.glob("*.safetensors"):
        with safe_open(file, framework="numpy") as tensors:
            total += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    return total
