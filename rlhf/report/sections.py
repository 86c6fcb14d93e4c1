"""The sections of a report: each shows the tables that are there.

A section is left out where there is nothing to compare; where a table was not given, it says how to get it.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from rlhf.evaluation.statistics import over_seeds
from rlhf.report import figures
from rlhf.report.analysis import PANELS, Analysis
from rlhf.report.lengths import ENOUGH, Unit
from rlhf.report.page import Page
from rlhf.report.rouge import ROUGE
from rlhf.report.runs import Baseline, per_group
from rlhf.report.summary import ppo_gains, samples

STAGES = {
    "sft": ("Supervised fine-tuning", "optimizer steps"),
    "reward": ("Training of the reward model", "optimizer steps"),
    "ppo": ("PPO", "episodes"),
}
WIN_RATES = (
    "A win counts 1, a tie one half; intervals are 95%, Wilson's. Invalid rows, on which the judge gave no answer, "
    "count in no rate. Position bias is 0 for a judge that looks at the texts alone and 1 for one that always prefers "
    "the first text."
)


def _one_size(table: pd.DataFrame) -> bool:
    return table["size"].nunique() == 1


def _add_over_seeds(page: Page, name: str, table: pd.DataFrame, value: str) -> None:
    means = over_seeds(table, [value], ["size", "parameters", "policy"])
    if (means["seeds"] > 1).any():
        page.table(name, means)


def add_summary(page: Page, found: Analysis) -> None:
    """Adds a row for each policy and the reference, and what PPO gained."""
    rows = found.evidence.rows
    page.add(f"## {', '.join(rows['policy'].unique())} and the reference")
    page.table("summary", found.summary)
    judges = ", ".join(map(str, rows["judge"].dropna().unique())) if "judge" in rows else ""
    gains = ppo_gains(rows)
    page.add("\n".join(f"- {line}" for line in gains) if len(gains) > 1 else "".join(gains))
    page.add(f"Win rates are against the reference{f', judge: {judges}' if judges else ''}. {WIN_RATES}")


def add_claims(page: Page, found: Analysis) -> None:
    """Adds the paper's claims with their verdicts, those that can be tested."""
    if found.claims.empty:
        return
    page.add("## Claims")
    page.table("claims", found.claims)
    page.add(
        "A claim holds where the 95% interval of each of its differences lies above 0, does not hold where one lies "
        "below 0, and is undecided otherwise. That of every length holds where PPO is at or above SFT in each bin. "
        "Intervals tell what other queries would give with the same models, not what other seeds would."
    )


def add_win_rates(page: Page, found: Analysis, baselines: Sequence[Baseline]) -> None:
    """Adds win rates with counts, paired differences, and the main figure."""
    page.add("## Win rate against the reference")
    page.table("win_rates", found.rates)
    _add_over_seeds(page, "win_rates_over_seeds", found.rates, "win_rate")
    if baselines or not _one_size(found.rates):
        panels = {"win_rate": "Win rate against the reference"}
        page.figure(
            "win_rate_by_size", figures.plot_against_size, found.rates, panels, "policy", "win rate",
            baselines=baselines, level=0.5,
        )  # fmt: skip
    if len(found.differences):
        page.add("Differences between policies over the queries that both answered, by the paired bootstrap:")
        page.table("differences", found.differences)


def add_lengths(page: Page, found: Analysis, unit: Unit) -> None:
    """Adds win rate against length, and at equal length."""
    page.add("## Win rate and length")
    if found.bins.empty:
        hint = "; `lengths: characters` needs no token counts" if unit == "tokens" else ""
        page.add(f"The judged tables have no lengths in {unit}{hint}.")
        return
    if len(found.left_out):
        page.add(f"Left out: {len(found.left_out)} rows in which a text is empty or its length unknown.")
    page.table("mean_lengths", found.mean_lengths)
    page.figure("win_rate_by_length", figures.plot_mean_lengths, found.mean_lengths, unit)
    together = " `all` takes the seeds together." if (found.fits["seed"] == "all").any() else ""
    page.add(
        f"Lengths in {unit}. `adjusted` is the win rate at the length of the reference, by a logistic fit of all rows "
        f"on log(length / reference length); `slope` is its log-odds per unit.{together}"
    )
    page.table("length_adjusted", found.fits)
    if found.fits["adjusted"].isna().any():
        page.add("Where `adjusted` is empty no fit exists: one length ratio only, or outcomes without overlap.")
    page.figure("length_controlled", figures.plot_length_controlled, found.bins, found.fits)
    page.numbers("length_bins", found.bins)
    if len(found.bin_differences):
        page.add(f"Win rate of PPO minus SFT in each bin with {ENOUGH} queries or more of both:")
        page.table("length_bin_differences", found.bin_differences)


def add_reward(page: Page, found: Analysis) -> None:
    """Adds accuracy, calibration, and agreement of the reward model with the judge."""
    page.add("## Reward model")
    if found.accuracy.empty:
        page.add("For accuracy and calibration give the table of the command `margins` as `margins`.")
    else:
        _add_accuracy(page, found)
        page.add(
            "### Calibration",
            "A reward model says that the better response wins with probability sigmoid(|margin|). `ece` is the "
            "expected calibration error: the mean of |accuracy - confidence| over ten bins of confidence, by their "
            "pairs.",
        )
        page.table("calibration_error", found.errors)
        page.figure("calibration", figures.plot_calibration, found.calibration)
        page.numbers("calibration", found.calibration)
    page.add("### Agreement with the judge")
    if found.agreement.empty:
        page.add("For scores in the judged tables give the command `generate` a `reward`.")
        return
    page.add(
        "How often the reward model prefers the text that the judge prefers, policy or reference, without the judge's "
        "ties (`undecided`)."
    )
    page.table("reward_agreement", found.agreement)
    _add_over_seeds(page, "reward_agreement_over_seeds", found.agreement, "agreement")
    if not _one_size(found.agreement):
        panels = {"agreement": "Agreement of the reward model with the judge"}
        page.figure(
            "reward_agreement", figures.plot_against_size, found.agreement, panels, "policy", "agreement", level=0.5
        )


def _add_accuracy(page: Page, found: Analysis) -> None:
    page.add("Accuracy on validation pairs. `news` is out of distribution.")
    is_whole = found.accuracy["group"] == "all"
    whole, parts = found.accuracy[is_whole].drop(columns=["group", "value"]), found.accuracy[~is_whole]
    page.table("reward_accuracy_by_split", whole)
    if len(parts):
        several = parts["seed"].nunique() > 1
        page.add(f"Per batch and confidence{', mean over seeds (lowest to highest)' if several else ''}:")
        page.table("reward_accuracy_by_group", _by_group(parts))
    page.numbers("reward_accuracy", found.accuracy, "Everything, of every run")
    if not _one_size(whole):
        named = whole.assign(series=whole["split"] + ", " + whole["labels"])
        panels = {"accuracy": "Accuracy of the reward model"}
        page.figure("reward_accuracy", figures.plot_against_size, named, panels, "series", "accuracy", level=0.5)


def _by_group(parts: pd.DataFrame) -> pd.DataFrame:
    keys = ["split", "group", "value"]
    parts = parts.assign(value=[value if isinstance(value, str) else f"{value:g}" for value in parts["value"]])
    order = parts.groupby(keys, sort=False).ngroup().sort_values(kind="stable").index
    groups = parts.loc[order].groupby([*keys, "size"], sort=False)
    if groups.size().max() == 1:
        return groups[["pairs", "accuracy", "low", "high"]].first().reset_index()
    accuracy = {"accuracy": ("accuracy", "mean"), "lowest": ("accuracy", "min"), "highest": ("accuracy", "max")}
    return groups.agg(pairs=("pairs", "max"), **accuracy).reset_index()


def add_seeds(page: Page, found: Analysis) -> None:
    """Adds the runs side by side and the agreement between seeds, where a size has several seeds."""
    if found.rates.groupby("size")["seed"].nunique().max() == 1:
        return
    page.add("## Seeds", "The runs side by side; KL, length and EOS share are means over the last quarter of PPO.")
    page.table("seeds", found.side_by_side)
    if len(found.seeds):
        page.add(
            "Whether the seeds win, tie and lose on the same queries: `pairwise` is the share of equal outcomes of two "
            "seeds, `unanimous` the share of queries on which all seeds are equal; `cohen` (mean over pairs) and "
            "`fleiss` are kappas, 0 by chance and 1 at best; the interval is that of Fleiss' kappa."
        )
        page.table("seed_agreement", found.seeds)
    if len(found.reward_seeds):
        page.add("The same of the reward models: whether they prefer the same response of a comparison.")
        page.table("reward_seed_agreement", found.reward_seeds)


def add_course(page: Page, found: Analysis) -> None:
    """Adds proxy score, gold score and win rate over the course of PPO, where more than the proxy is known."""
    course = found.evidence.course
    if course.empty:
        return
    start = ", which is the point at 0" if (course["update"] == 0).any() else ""
    page.add(
        "## Over-optimisation",
        f"What the policy gains as it moves away from where PPO started{start}. Over-optimisation is a score of the "
        "reward model that still rises where gold score or win rate fall.",
    )
    over = {"update": "updates"} if "episodes" in course else {}
    page.figure("over_optimisation", figures.plot_course, course, {**over, "sqrt_kl": "√KL (√nats)"})
    page.table("over_optimisation", course)
    page.add("Where each measure was highest, and what it was in the end:")
    page.table("over_optimisation_best", found.turns)


def add_rouge(page: Page, found: Analysis) -> None:
    """Adds ROUGE per run."""
    page.add("## ROUGE", "Mean over the split, with bootstrap intervals in the CSV.")
    page.table("rouge_means", found.rouge[["size", "parameters", "seed", "policy", "rows", *ROUGE]])
    page.numbers("rouge", found.rouge, "With intervals")
    if not _one_size(found.rouge):
        titles = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}
        page.figure("rouge", figures.plot_against_size, found.rouge, titles, "policy", "F-measure")


def add_curves(page: Page, found: Analysis) -> None:
    """Adds the curves of those of the three stages that have any, and what must hold in PPO."""
    for stage, (title, x_label) in STAGES.items():
        curves = found.evidence.curves[found.evidence.curves["stage"] == stage]
        if curves.empty:
            continue
        page.add(f"## {title}")
        if curves["curve"].isin([name for names in PANELS[stage].values() for name in names]).any():
            page.figure(stage, figures.plot_curves, curves, PANELS[stage], x_label)
        page.numbers(f"{stage}_curves", curves)
        if stage == "ppo":
            page.add("What must hold and what PPO costs, over its updates:")
            page.table("invariants", per_group(curves, ["size", "seed"], _invariants))


def _invariants(curves: pd.DataFrame) -> dict[str, float]:
    own = {name: points["value"] for name, points in curves.groupby("curve")}
    row = {}
    if "val/ratio_max_deviation" in own:
        row["largest |ratio - 1| before the first step"] = own["val/ratio_max_deviation"].max()
    if "objective/kl" in own:
        kl = own["objective/kl"]
        row |= {"first KL": kl.iloc[0], "last KL": kl.iloc[-1], "highest KL": kl.max()}
    if "rollout/eos_share" in own:
        row["EOS share in the last update"] = own["rollout/eos_share"].iloc[-1]
    return row


def add_samples(page: Page, found: Analysis, count: int) -> None:
    """Adds the first queries with all responses."""
    if count:
        page.add("## Samples", samples(found.evidence.rows, count))
