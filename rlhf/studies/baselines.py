"""Compares methods: how far each moves the policy from SFT, and what reward and gold score it has there."""

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Annotated, NamedTuple

import pandas as pd
from pydantic import Field, PositiveInt

from rlhf import files
from rlhf.errors import Seed, UserError
from rlhf.evaluation.tables import read_table, write_table
from rlhf.report.page import markdown
from rlhf.studies.ablation import mean_and_range
from rlhf.studies.runner import Runner, Settings, Stage, run_jobs
from rlhf.studies.scaling import SHARED, exported_updates

SFT, REWARD, BEST_OF = "{run}/sft/export", "{run}/reward/export", "best-of-n"
MEASURES = {"gold": "gold score", "score": "reward"}
NOTE = """Mean over the seeds, with the lowest and the highest in parentheses, of the responses to the validation \
prompts. KL to the SFT model in nats per response: of a trained policy the mean log-ratio of its own responses, which \
can come out below 0; of best-of-n the upper bound log n - (n - 1) / n. `point`: after how many updates or epochs, \
or n."""


def baselines(
    seeds: Annotated[list[Seed], Field(min_length=1)],
    stages: list[Stage],
    methods: Annotated[dict[str, Stage], Field(min_length=1)],
    samples: Settings,
    best_of: Annotated[list[PositiveInt], Field(min_length=1)],
    shared: list[Stage] | None = None,
    run_dir: str = "runs/baselines",
    config_dir: str = ".",
    processes: PositiveInt = 1,
) -> None:
    """Trains a policy by each method, over seeds, and plots gold score and reward against the KL to the SFT model.

    The methods of a seed start from one SFT model and have one reward model, and best-of-n samples from the former and
    chooses by the latter. Every stage has its own process and its own log; finished stages are skipped. The results of
    the seeds that are finished are in baselines.md, baselines.png and baselines.csv in the run folder.

    Args:
        seeds: seeds of the training stages.
        stages: what the methods of a seed share, in order; among them `sft` and `reward`, which train the SFT model and
            the reward model.
        methods: label of a method -> the stage that trains it, with the callback Export and its `every_n_epochs`: each
            export is a point of the figure.
        samples: settings of `generate`, with which all policies answer.
        best_of: values of n; 1 is the SFT model itself.
        shared: what to run once for all seeds, in the folder `shared` of the run folder, `{shared}` in what a stage
            takes; `{run}` is the folder of the seed.
        run_dir: folder of all runs and of the result.
        config_dir: folder of the configs of the stages.
        processes: how many stages to run at a time; they share the cores.
    """
    if missing := {"sft", "reward"} - {stage.name for stage in stages}:
        raise UserError(f"stages: {' and '.join(sorted(missing))} must be among them; the methods start from there.")
    out = Path(run_dir)
    with ExitStack() as owned:
        new = partial(Runner, config_dir=Path(config_dir), logged=True)
        commons = owned.enter_context(new(out / SHARED))
        jobs, members = [commons.job(SHARED, shared or [])], []
        for stage in [*(shared or []), *stages, *methods.values()]:
            commons.words(stage)  # raises if a config file is missing
        for seed in dict.fromkeys(seeds):
            runner = owned.enter_context(new(out / f"seed-{seed}", seed=seed, others={SHARED: commons.run}))
            members.append(_Member(seed, runner, stages, methods, samples, sorted({*best_of})))
            jobs.append(runner.job(f"seed-{seed}", members[-1].every_stage(), after=SHARED))

        def write_finished() -> None:
            if done := [rows for member in members if (rows := member.result())]:
                write_result(pd.DataFrame(chain(*done)), out)
                print(f"Result:  {out / 'baselines.md'}, of {len(done)} of {len(members)} seeds")

        run_jobs(jobs, processes, write_finished, write_finished)


class _Member(NamedTuple):
    """One seed of a study."""

    seed: int
    runner: Runner
    stages: list[Stage]
    methods: dict[str, Stage]
    samples: Settings
    best_of: list[int]

    def every_stage(self) -> Iterator[Stage]:
        """Yields its stages, then those in which exports answer, which are known once a method has run."""
        yield from self.stages
        for method in (BEST_OF, *self.methods):
            if method in self.methods:
                yield self.methods[method]
            if not (found := self.answers(method)):
                raise UserError(
                    f"methods.{method}: {self.runner.place(self.methods[method])} has no export-<n>; give the callback "
                    "rlhf.callbacks.export.Export an every_n_epochs."
                )
            yield from found.values()

    def answers(self, method: str) -> dict[int, Stage]:
        """Returns the stages in which the exports of a method answer: number of epochs, or n -> stage."""
        takes: dict[int, Settings]
        if method == BEST_OF:
            name = "best_of"
            takes = {n: {"model": SFT, **({"best_of": n} if n > 1 else {"reference": SFT})} for n in self.best_of}
        else:
            name, place = self.methods[method].name, self.runner.place(self.methods[method])
            export = f"{{run}}/{name}/{files.EXPORT}"
            takes = {n: {"model": f"{export}-{n}", "reference": SFT} for n in exported_updates(place)}
        common = {"reward": REWARD, "seed": "{seed}", **self.samples}
        return {n: Stage(f"{name}_{n}", "generate", takes=common | own) for n, own in takes.items()}

    def result(self) -> list[dict[str, str | float]]:
        """Returns `method`, `seed`, `point`, `kl`, `score`, and `gold` of embedded data; nothing until all is done."""
        rows: list[dict[str, str | float]] = []
        for method in (BEST_OF, *self.methods):
            found = self.answers(method)
            if not found or not all(map(self.runner.finished, found.values())):
                return []
            for point, stage in found.items():
                table = read_table(self.runner.product(stage), stage.name, ("query", "kl", "score"))
                means = {name: table[name].mean() for name in ("kl", *MEASURES) if name in table}
                rows.append({"method": method, "seed": self.seed, "point": point, **means})
        return rows


def summary(points: pd.DataFrame) -> pd.DataFrame:
    """Formats a row per method and point: mean and range of KL, reward and gold score over the seeds."""
    groups = points.groupby(["method", "point"], sort=False)
    table = groups.size().to_frame("seeds")
    for name, title in {"kl": "KL", **MEASURES}.items():
        if name in points:
            table[title] = groups[name].agg(mean_and_range)
    return table.reset_index()


def write_result(points: pd.DataFrame, out: Path) -> None:
    """Writes baselines.csv, baselines.png and baselines.md."""
    from rlhf.report import charts  # which imports Altair

    write_table(points, out / "baselines.csv")
    panels = charts.against_kl(points, {name: title for name, title in MEASURES.items() if name in points})
    charts.save_png(panels, out / "baselines.png")
    sections = ["# Methods compared", markdown(summary(points)), NOTE, "![methods](baselines.png)"]
    files.write_text(out / "baselines.md", "\n\n".join(sections) + "\n")
