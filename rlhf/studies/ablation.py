"""Ablations: PPO with small changes, over seeds, each against the default."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf import files
from rlhf.checks import at_least
from rlhf.errors import UserError
from rlhf.report.curve_files import read_curves
from rlhf.studies.pipeline import Job, Runner, Stage, run_jobs

if TYPE_CHECKING:
    import pandas as pd

DEFAULT = "default"
METRICS = {
    "score": "validation/score",
    "gold score": "validation/gold_scores",
    "KL": "objective/kl",
    "EOS": "rollout/eos_share",
    "length": "rollout/response_length",
}
PANELS = ("score", "gold score", "KL")
NOTE = """Mean over the last quarter of each run, averaged over the seeds, with the lowest and the highest seed in
parentheses; Δ is the mean difference to the default with the same seed. Score and gold score: of the responses to the
validation prompts, without the EOS trick. KL (nats per response), share of responses with EOS, and length in tokens: of
the responses sampled in training."""


def ablate(
    stage: Stage,
    ablations: list[str],
    seeds: list[int],
    base: str = "runs/quickstart",
    run_dir: str = "runs/ablations",
    config_dir: str = "configs/ablations",
    processes: int = 1,
) -> None:
    """Run PPO for the default and for each ablation, over seeds, and plot each ablation against the default.

    Every run has its own process, its own folder and its own log. Finished runs are skipped; a stopped one goes on from
    its last checkpoint. What is finished ends up in ablations.md, ablations.png and ablations.csv in the run folder.

    Args:
        stage: of PPO, as in a pipeline; `{base}` in what it takes stands for the folder of the finished pipeline.
        ablations: names of YAML files in `config_dir` (without `.yaml`), each with what differs from the default.
        seeds: each ablation and the default run once with each.
        base: folder of a finished pipeline, whose models and data the stage takes.
        run_dir: folder of all runs and of the result.
        config_dir: folder of the YAML files of the ablations.
        processes: how many runs at a time, which share the cores.
    """
    at_least("processes", processes, 1)
    at_least("the number of seeds", len(seeds), 1)
    names = list(dict.fromkeys([DEFAULT, *ablations]))
    stages = {
        (name, seed): _run_of(stage, name, seed, Path(config_dir)) for name in names for seed in dict.fromkeys(seeds)
    }
    out = files.claim(run_dir, resuming=True)
    runner = Runner(out, others={"base": Path(base)}, logged=True)
    for run in stages.values():
        runner.plan(run)  # raises before anything has run
    titles = [f"[{number}/{len(stages)}]" for number in range(1, len(stages) + 1)]
    work = zip(stages.values(), titles, strict=True)
    failed = run_jobs([Job(run.name, partial(runner.run_stage, run, title)) for run, title in work], processes)
    done = {key: out / run.name for key, run in stages.items() if files.is_complete(out / run.name / "export")}
    if any(name == DEFAULT for name, _ in done):
        points = read_points(done)
        write_result(points, out)
        print(f"Result:  {out / 'ablations.md'}\nPlot:    {out / 'ablations.png'}")
    if failed:
        raise UserError(f"{len(failed)} of {len(stages)} runs failed:\n" + "\n".join(failed.values()))


def _run_of(stage: Stage, name: str, seed: int, config_dir: Path) -> Stage:
    configs = [stage.config] if isinstance(stage.config, str) else list(stage.config or [])
    if name != DEFAULT:
        file = config_dir / f"{name}.yaml"
        if not file.is_file():
            raise UserError(f"ablations: there is no file {file}.")
        configs.append(str(file))
    takes = stage.takes | {"seed_everything": seed}
    return replace(stage, name=f"{name}/seed-{seed}", config=configs, takes=takes)


def read_points(runs: dict[tuple[str, int], Path]) -> pd.DataFrame:
    """The curves of runs, a row per point: `ablation`, `seed`, `metric`, `episodes`, `value`.

    Args:
        runs: (ablation, seed) -> folder of the run. Curves that a run does not have are left out.
    """
    import pandas as pd

    parts = []
    for (name, seed), folder in runs.items():
        curves = read_curves(folder)
        for metric, curve in METRICS.items():
            if curve in curves:
                points = curves[curve].rename_axis("episodes").rename("value").reset_index()
                parts.append(points.assign(ablation=name, seed=seed, metric=metric))
    if not parts:
        raise UserError(f"the runs have none of the curves of PPO that are compared: {', '.join(METRICS.values())}.")
    return pd.concat(parts, ignore_index=True)[["ablation", "seed", "metric", "episodes", "value"]]


def final_values(points: pd.DataFrame) -> pd.DataFrame:
    """Mean over the last quarter of each run: a row per `ablation` and `seed`, a column per metric."""
    last = points[points["episodes"] > 0.75 * points.groupby(["ablation", "seed"])["episodes"].transform("max")]
    table = last.pivot_table(index=["ablation", "seed"], columns="metric", values="value", sort=False)
    return table[[metric for metric in METRICS if metric in table]]


def markdown_table(finals: pd.DataFrame) -> str:
    """A row per ablation: each metric's mean and range over seeds, and the mean difference to the default's same seeds.

    Args:
        finals: as of `final_values`.
    """
    default = finals.loc[DEFAULT]
    heads = [head for metric in finals for head in ((metric, "Δ") if metric in PANELS else (metric,))]
    rows = [["ablation", "seeds", *heads], ["---"] * (2 + len(heads))]
    for name in finals.index.unique("ablation"):
        own = finals.loc[name]
        cells = [name, str(len(own))]
        for metric in finals:
            values = own[metric]
            spread = f" ({values.min():.2f} to {values.max():.2f})" if len(values) > 1 else ""
            cells.append(f"{values.mean():.2f}{spread}")
            if metric in PANELS:
                difference = (values - default[metric]).mean()  # by seed; NaN where the default lacks it
                cells.append("" if name == DEFAULT or difference != difference else f"{difference:+.2f}")
        rows.append(cells)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def write_result(points: pd.DataFrame, out: Path) -> None:
    """Write ablations.csv, ablations.png and ablations.md.

    Args:
        points: as of `read_points`, the default among them.
        out: the folder to write to.
    """
    from rlhf.report.figures import plot_ablations

    finals = final_values(points)
    points.to_csv(out / "ablations.csv", index=False)
    plot_ablations(points, DEFAULT, PANELS, out / "ablations.png")
    seeds = finals.groupby("ablation").size()
    sections = ["# Ablations", markdown_table(finals), NOTE.replace("\n", " ")]
    single = seeds[seeds == 1].index
    if len(single):
        which = "Every run has" if len(single) == len(seeds) else f"{', '.join(single)}:"
        sections.append(f"{which} one seed only; a difference may be nothing but chance.")
    sections.append("![ablations](ablations.png)")
    (out / "ablations.md").write_text("\n\n".join(sections) + "\n")
