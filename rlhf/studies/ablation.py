"""Runs ablations: PPO with small changes, over seeds, each compared with the default."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated

import pandas as pd
from pydantic import Field, PositiveInt

from rlhf import files
from rlhf.errors import Seed, UserError
from rlhf.evaluation.tables import write_table
from rlhf.report.curve_files import last_quarter, read_curves
from rlhf.report.page import markdown
from rlhf.studies.runner import Job, Runner, Stage, run_jobs

DEFAULT = "default"
METRICS = {
    "score": "validation/score",
    "gold score": "validation/gold_scores",
    "KL": "objective/kl",
    "EOS": "rollout/eos_share",
    "length": "rollout/response_length",
}
PANELS = ("score", "gold score", "KL")
NOTE = """Mean over the last quarter of each run, averaged over the seeds, with the lowest and the highest seed in \
parentheses; Δ is the mean difference to the default with the same seed. Score and gold score: of the responses to the \
validation prompts, without the EOS trick. KL (nats per response), share of responses with EOS, and length in tokens: \
of the responses sampled in training."""


def ablate(
    stage: Stage,
    ablations: list[str],
    seeds: Annotated[list[Seed], Field(min_length=1)],
    base: str = "runs/quickstart",
    run_dir: str = "runs/ablations",
    config_dir: str = "configs/ablations",
    processes: PositiveInt = 1,
    redo: Sequence[str] = (),
) -> None:
    """Runs PPO for the default and for each ablation, over seeds, and plots each ablation against the default.

    Every run has its own process, its own folder and its own log. Finished runs are skipped; a stopped one is resumed
    from its last checkpoint. The results of finished runs are in ablations.md, ablations.png and ablations.csv in the
    run folder.

    Args:
        stage: the stage of PPO, as in a pipeline; `{base}` in what it takes is replaced by the folder `base`.
        ablations: names of YAML files in `config_dir` (without `.yaml`), each with what differs from the default.
        seeds: seeds with which the default and each ablation run once.
        base: folder of a finished pipeline that has the models and data which the stage takes.
        run_dir: folder of all runs and of the result.
        config_dir: folder of the YAML files of the ablations.
        processes: how many runs to have at a time; they share the cores.
        redo: runs to make again, such as default/seed-1; what they have made is moved aside.
    """
    keys = product(dict.fromkeys([DEFAULT, *ablations]), seeds)
    runs = {(name, seed): _run_of(stage, name, seed, Path(config_dir)) for name, seed in keys}
    out = Path(run_dir)
    runner = Runner(out, others={"base": Path(base)}, logged=True, redo=redo)
    jobs = [
        Job(run.name, partial(runner.run_stage, run, f"[{number}/{len(runs)}]"))
        for number, run in enumerate(runs.values(), 1)
    ]

    def write_finished() -> None:
        done = {key: out / run.name for key, run in runs.items() if files.is_complete(out / run.name / files.EXPORT)}
        if any(name == DEFAULT for name, _ in done):
            write_result(read_points(done), out)
            print(f"Result:  {out / 'ablations.md'}\nPlot:    {out / 'ablations.png'}")

    with runner:
        runner.prepare([*runs.values()])
        run_jobs(jobs, processes, write_finished)
        runner.finish()


def _run_of(stage: Stage, name: str, seed: int, config_dir: Path) -> Stage:
    file = config_dir / f"{name}.yaml"
    if name != DEFAULT and not file.is_file():
        raise UserError(f"ablations: there is no file {file}.")
    configs = stage.configs if name == DEFAULT else [*stage.configs, str(file)]
    return replace(stage, name=f"{name}/seed-{seed}", config=configs, takes=stage.takes | {"seed_everything": seed})


def read_points(runs: dict[tuple[str, int], Path]) -> pd.DataFrame:
    """Reads the curves of runs, (ablation, seed) -> folder; those that a run does not have are left out.

    Returns:
        A row per point: `ablation`, `seed`, `metric`, `episodes`, `value`.
    """
    points: dict[tuple[str, int, str], pd.Series] = {}
    for (name, seed), folder in runs.items():
        curves = read_curves(folder)
        points |= {(name, seed, metric): curves[curve] for metric, curve in METRICS.items() if curve in curves}
    if not points:
        raise UserError(f"the runs have none of the curves of PPO that are compared: {', '.join(METRICS.values())}.")
    return pd.concat(points, names=["ablation", "seed", "metric", "episodes"]).rename("value").reset_index()


def final_values(points: pd.DataFrame) -> pd.DataFrame:
    """Averages the last quarter of each run: a row per `ablation` and `seed`, a column per metric."""
    last = last_quarter(points, ["ablation", "seed"], "episodes")
    table = last.pivot_table(index=["ablation", "seed"], columns="metric", values="value", sort=False)
    return table[[metric for metric in METRICS if metric in table]]


def markdown_table(finals: pd.DataFrame) -> str:
    """Formats a row per ablation: mean and range of each metric, and the mean difference to the default by seed."""
    groups = finals.groupby("ablation", sort=False)
    differences = finals.sub(finals.loc[DEFAULT], level="seed").groupby("ablation").mean().drop(DEFAULT)
    table = groups.size().to_frame("seeds")
    for metric in finals:
        table[metric] = groups[metric].agg(mean_and_range)
        if metric in PANELS:
            texts = differences[metric].map("{:+.2f}".format, na_action="ignore")  # NaN without a common seed
            table.insert(table.shape[1], "Δ", texts, allow_duplicates=True)
    return markdown(table.reset_index())


def mean_and_range(values: pd.Series) -> str:
    """Formats a mean with the lowest and the highest value in parentheses."""
    spread = f" ({values.min():.2f} to {values.max():.2f})" if len(values) > 1 else ""
    return f"{values.mean():.2f}{spread}"


def write_result(points: pd.DataFrame, out: Path) -> None:
    """Writes ablations.csv, ablations.png and ablations.md of points with the default among them."""
    from rlhf.report import charts  # which imports Altair

    finals = final_values(points)
    write_table(points, out / "ablations.csv")
    metrics = [name for name in PANELS if name in finals]
    charts.save_png(charts.ablations(points, DEFAULT, metrics), out / "ablations.png", len(metrics))
    sections = ["# Ablations", markdown_table(finals), NOTE]
    seeds = finals.groupby("ablation").size()
    if (single := seeds == 1).any():
        which = "Every run has" if single.all() else f"{', '.join(seeds.index[single])}:"
        sections.append(f"{which} one seed only; a difference may be nothing but chance.")
    sections.append("![ablations](ablations.png)")
    files.write_text(out / "ablations.md", "\n\n".join(sections) + "\n")
