"""The sections of a report. Each shows the tables that are there, or says how to get those that were not given."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from rlhf.report import charts
from rlhf.report.analysis import PANELS
from rlhf.report.lengths import ENOUGH, Unit
from rlhf.report.page import FILES, Page
from rlhf.report.rouge_means import ROUGE
from rlhf.report.run_folders import FINISHED
from rlhf.report.runs import REFERENCE, Baseline, reference_name
from rlhf.report.summary import ppo_gains

STAGES = {
    "sft": ("Supervised fine-tuning", "optimizer steps"),
    "reward": ("Training of the reward model", "optimizer steps"),
    "dpo": ("DPO", "optimizer steps"),
    "ppo": ("PPO", "episodes"),
}


def add_findings(page: Page) -> None:
    """Adds what speaks against the runs, before any of their numbers."""
    found = page.tables["findings"]
    if found.empty:
        return
    several = found[["size", "seed"]].drop_duplicates().shape[0] > 1
    places = [f"size {row.size}, seed {row.seed}, {row.stage}" if several else row.stage for row in found.itertuples()]
    page.section("Findings")
    page.add(
        "These runs have signs of having learnt nothing; mend them before you believe any number below.",
        "\n".join(f"- **{place}:** {text}" for place, text in zip(places, found["finding"], strict=True)),
        short=True,
    )
    page.numbers("findings")


def add_summary(page: Page, rows: pd.DataFrame) -> None:
    """Adds a row for each policy and the reference, what PPO gained, and the verdicts on the paper's claims."""
    name = f"the {REFERENCE}" if (given := reference_name(rows)) == REFERENCE else given
    page.section(f"{', '.join(rows['policy'].unique())} and {name}")
    page.table("summary", short=True)
    gains = ppo_gains(rows)
    page.add("\n".join(f"- {line}" for line in gains) if len(gains) > 1 else "".join(gains), short=True)
    judges = ", ".join(map(str, rows["judge"].dropna().unique())) if "judge" in rows else ""
    page.add(
        f"Win rates are against {name}{f', judge: {judges}' if judges else ''}. A win counts 1, a tie one half; "
        "intervals are 95%, Wilson's. Invalid rows, on which the judge gave no answer, count in no rate. Position bias "
        "is 0 for a judge that looks at the texts alone and 1 for one that always prefers the first text."
    )
    page.section("Claims")
    page.table(
        "claims",
        "A claim holds where the 95% interval of each of its differences lies above 0, does not hold where one lies at "
        "or below 0, and is undecided otherwise. That of every length holds where PPO is at or above SFT in each bin, "
        "and in one of them the interval lies above 0. "
        "Intervals tell what other queries would give with the same models, not what other seeds would.",
        short=True,
    )


def add_comparison(page: Page) -> None:
    """Adds what tells several runs apart, in their settings, their curves, and what their policies gained."""
    page.section("Comparison of the runs")
    page.table("settings", "Settings that differ, by the configs that the runs saved:", short=True)
    page.table(
        "curve_ends",
        "Mean of the last quarter of each curve, averaged over seeds:",
        short="summary" not in page.tables,
    )
    page.table(
        "run_differences",
        "Each policy minus the same policy of the first run, over the queries that both answered, by the paired "
        "bootstrap:",
        short=True,
    )


def add_progress(page: Page) -> None:
    """Adds how far runs are that are not finished."""
    page.section("Stages so far")
    if "summary" not in page.tables:
        page.add("No policy is judged yet: what follows is what training has logged so far.", short=True)
    if "progress" in page.tables and (page.tables["progress"]["state"] != FINISHED).any():
        page.table(
            "progress",
            "Steps that are logged so far, of all; those of PPO are episodes:",
            short="summary" not in page.tables,
        )


def add_win_rates(page: Page, baselines: Sequence[Baseline]) -> None:
    """Adds win rates with counts, paired differences, and the main figure."""
    page.section("Win rate against the reference")
    page.table("win_rates")
    page.table("win_rates_over_seeds")
    panels = {"win_rate": "Win rate against the reference"}
    _add_against_size(page, "win_rate_by_size", page.tables["win_rates"], panels, True, baselines=baselines)
    if page.tables["win_rates"]["parameters"].nunique() == 1:
        page.figure("win_rates", charts.win_rates(page.tables["win_rates"]))
    page.table("differences", "Differences over the queries that both policies answered, by the paired bootstrap:")


def _add_against_size(
    page: Page, name: str, table: pd.DataFrame, panels: dict[str, str], short: bool = False, **settings: Any
) -> None:
    if table["parameters"].nunique() > 1 or settings.get("baselines"):
        page.figure(name, charts.against_size(table, panels, **settings), short)


def add_lengths(page: Page, unit: Unit) -> None:
    """Adds win rate against length, and at equal length."""
    page.section("Win rate and length")
    bins, fits, left_out = (page.tables[name] for name in ("length_bins", "length_adjusted", "left_out"))
    if bins.empty:
        hint = "; `lengths: characters` needs no token counts" if unit == "tokens" else ""
        page.add(f"The judged tables have no lengths in {unit}{hint}.")
        return
    if len(left_out):
        page.add(f"Left out: {len(left_out)} rows in which a text is empty or its length unknown.")
    page.table("mean_lengths")
    page.figure("win_rate_by_length", charts.mean_lengths(page.tables["mean_lengths"], unit))
    page.table(
        "length_adjusted",
        f"Lengths in {unit}. `adjusted` is the win rate at the length of the reference, by a logistic fit of all rows "
        "on log(length / reference length), where one exists; `slope` is its log-odds per unit.",
    )
    page.figure("length_controlled", charts.length_controlled(bins, fits))
    page.table("length_bins")
    page.table("length_bin_differences", f"Win rate of PPO minus SFT per bin with {ENOUGH} queries or more of both:")


def add_reward(page: Page) -> None:
    """Adds accuracy, calibration, and agreement of the reward model with the judge."""
    page.section("Reward model")
    if page.tables["reward_accuracy"].empty:
        page.add("For accuracy and calibration give the table of the command `margins` as `margins`.")
    else:
        _add_accuracy(page)
    agreement = page.tables["reward_agreement"]
    page.add("### Agreement with the judge")
    if agreement.empty:
        page.add("For scores in the judged tables give the command `generate` a `reward`.")
        return
    page.table(
        "reward_agreement", "How often the reward model agrees with the judge; `undecided` counts the judge's ties:"
    )
    page.table("reward_agreement_over_seeds")
    panels = {"agreement": "Agreement of the reward model with the judge"}
    _add_against_size(page, "reward_agreement", agreement, panels)


def _add_accuracy(page: Page) -> None:
    whole = page.tables["reward_accuracy_by_split"]
    page.table("reward_accuracy_by_split", "Accuracy on validation pairs. `news` is out of distribution.")
    over_seeds = ", mean over seeds (lowest to highest)" if whole["seed"].nunique() > 1 else ""
    page.table("reward_accuracy_by_group", f"Per batch and confidence{over_seeds}:")
    page.table("reward_accuracy")
    named = whole.assign(series=whole["split"] + ", " + whole["labels"])
    panels = {"accuracy": "Accuracy of the reward model"}
    _add_against_size(page, "reward_accuracy", named, panels, series="series")
    page.add("### Calibration")
    page.table(
        "calibration_error",
        "A reward model says that the better response wins with probability sigmoid(|margin|). `ece` is the expected "
        "calibration error: the mean of |accuracy - confidence| over ten bins of confidence, by their pairs.",
    )
    if len(page.tables["calibration"]):
        page.figure("calibration", charts.calibration(page.tables["calibration"]))
    page.table("calibration")


def add_seeds(page: Page) -> None:
    """Adds the runs side by side and the agreement between seeds, where a size has several seeds."""
    page.section("Seeds")
    page.table("seeds", "KL, length and EOS share are means over the last quarter of PPO.")
    page.table(
        "seed_agreement",
        "Whether the seeds win, tie and lose on the same queries: `pairwise` is the share of equal outcomes of two "
        "seeds, `unanimous` the share of queries on which all seeds are equal; `cohen` (mean over pairs) and "
        "`fleiss` are kappas, 0 by chance and 1 at best; the interval is that of Fleiss' kappa.",
    )
    page.table("reward_seed_agreement", "Whether the reward models prefer the same response of a comparison:")


def add_course(page: Page) -> None:
    """Adds proxy score, gold score and win rate over the course of PPO, where more than the proxy is known."""
    course = page.tables["over_optimisation"]
    if course.empty:
        return
    start = ", which is the point at 0" if (course["update"] == 0).any() else ""
    page.section("Over-optimisation")
    page.add(
        f"What the policy gains as it moves away from where PPO started{start}. Over-optimisation is a score of the "
        "reward model that still rises where gold score or win rate fall.",
        short=True,
    )
    page.figure("over_optimisation", charts.course(course), short=True)
    page.table("over_optimisation")
    page.table("over_optimisation_best", "Where each measure was highest, and what it was in the end:")


def add_rouge(page: Page) -> None:
    """Adds ROUGE per run."""
    columns = ["size", "seed", "policy", "rows", *ROUGE]
    page.section("ROUGE")
    page.table("rouge", "Mean over the split, with bootstrap intervals in the CSV.", columns=columns)
    titles = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}
    _add_against_size(page, "rouge", page.tables["rouge"], titles)


def add_curves(page: Page) -> None:
    """Adds the curves of those of the three stages that have any, and what must hold in PPO."""
    for stage, (title, x_label) in STAGES.items():
        curves = page.tables[f"{stage}_curves"]
        page.section(title)
        if len(curves):
            if panels := charts.curves(curves, PANELS[stage], x_label):
                page.figure(stage, panels)
            page.numbers(f"{stage}_curves")
            page.add(f"All points: `{FILES}/{stage}_curves.csv`")
    page.table("invariants", "What must hold and what PPO costs, over its updates:")
