"""Everything that a report shows, as tables: for notebooks, and for the page that `report` writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas as pd

from rlhf.evaluation import statistics
from rlhf.report import agreement, calibration, claims, lengths, overoptimisation, rouge, summary
from rlhf.report.curve_files import curve_rows
from rlhf.report.runs import PPO, RUN, SFT, Run, check_shared_queries, judged_rows, margin_rows, ordered

SFT_PANELS = {
    "Loss": ["loss/sft_step", "validation/loss"],
    "ROUGE on validation": ["validation/rouge1", "validation/rouge2", "validation/rougeL"],
}
REWARD_PANELS = {
    "Loss": ["loss/reward_step", "validation/loss"],
    "Accuracy": ["validation/accuracy", "validation_cnndm/accuracy"],
}
PPO_PANELS = {
    "Score of the reward model": ["objective/scores", "validation/score"],
    "KL to the reference (nats per response)": ["objective/kl"],
    "Ratio": ["val/ratio"],
    "Largest |ratio - 1| before the first step": ["val/ratio_max_deviation"],
    "Gold score on validation": ["validation/gold_scores"],
    "Length of a response (tokens)": ["rollout/response_length", "validation/length"],
    "Share of responses with EOS": ["rollout/eos_share", "validation/eos"],
}
PANELS = {"sft": SFT_PANELS, "reward": REWARD_PANELS, "ppo": PPO_PANELS}


@dataclass(frozen=True)
class Evidence:
    """What the runs left behind, as tables; empty ones where there is nothing.

    Attributes:
        rows: as returned by `runs.judged_rows`.
        margins: as returned by `runs.margin_rows`.
        course: as returned by `overoptimisation.course`, with the SFT policy as update 0; where no run has checkpoints,
            as returned by `overoptimisation.validated_course`.
        curves: as returned by `curve_files.curve_rows`, those of PANELS and all of validation.
    """

    rows: pd.DataFrame
    margins: pd.DataFrame
    course: pd.DataFrame
    curves: pd.DataFrame


@dataclass(frozen=True)
class Analysis:
    """The tables of a report; empty ones where data lack. `analyse` names the function behind each."""

    evidence: Evidence
    summary: pd.DataFrame
    rates: pd.DataFrame
    differences: pd.DataFrame
    mean_lengths: pd.DataFrame
    bins: pd.DataFrame
    fits: pd.DataFrame
    bin_differences: pd.DataFrame
    agreement: pd.DataFrame
    seeds: pd.DataFrame
    reward_seeds: pd.DataFrame
    side_by_side: pd.DataFrame
    accuracy: pd.DataFrame
    calibration: pd.DataFrame
    errors: pd.DataFrame
    turns: pd.DataFrame
    rouge: pd.DataFrame
    claims: pd.DataFrame
    left_out: pd.DataFrame


def gather(runs: Sequence[Run]) -> Evidence:
    """Reads all tables and curves of runs.

    Raises:
        UserError: a file or column is missing, tables share no query, sizes cannot be ordered, or checkpoints have no
            curve of KL, or too short a one.
    """
    runs = ordered(runs)
    rows, checkpoints = judged_rows(runs), judged_rows(runs, "update")
    check_shared_queries(rows)
    names = [name for panels in PANELS.values() for names in panels.values() for name in names]
    curves = curve_rows(runs, [*names, f"{overoptimisation.VALIDATION}*"])
    if len(checkpoints):
        starts = rows[rows["policy"] == SFT].drop(columns="policy").assign(update=0)
        starts = starts.merge(checkpoints[["size", "seed"]].drop_duplicates(), on=["size", "seed"])
        course = overoptimisation.course(pd.concat([starts, checkpoints], ignore_index=True), curves)
    else:
        course = overoptimisation.validated_course(rows[RUN].drop_duplicates(), curves)
    return Evidence(rows, margin_rows(runs), course, curves)


def analyse(evidence: Evidence, unit: lengths.Unit = "tokens") -> Analysis:
    """Computes all tables of a report.

    Args:
        evidence: as returned by `gather`.
        unit: of lengths.
    """

    def known(compute: Callable[[pd.DataFrame], pd.DataFrame], table: pd.DataFrame) -> pd.DataFrame:
        return compute(table) if len(table) else pd.DataFrame()

    rows, margins = evidence.rows, evidence.margins
    with_lengths = lengths.with_lengths(rows, unit)
    bins = lengths.length_bins(with_lengths)
    bin_differences = lengths.bin_differences(bins, PPO, SFT)
    rates, differences = statistics.win_rates(rows), statistics.policy_differences(rows)
    scores, seeds = rouge.rouge_rows(rows), agreement.seed_agreement(rows)
    accuracy = known(calibration.accuracy_rows, margins)
    found = [
        *claims.ppo_beats_sft(differences),
        *claims.ahead_at_every_length(bin_differences),
        *claims.rouge_rises(scores),
        *claims.accuracy_rises(accuracy),
        *claims.seeds_agree(seeds),
    ]
    return Analysis(
        evidence=evidence,
        summary=summary.summarise(rows, scores),
        rates=rates,
        differences=differences,
        mean_lengths=lengths.mean_lengths(with_lengths),
        bins=bins,
        fits=lengths.length_fits(with_lengths),
        bin_differences=bin_differences,
        agreement=agreement.reward_agreement(rows),
        seeds=seeds,
        reward_seeds=known(agreement.reward_seed_agreement, margins),
        side_by_side=summary.side_by_side(rates, evidence.curves),
        accuracy=accuracy,
        calibration=known(calibration.calibration_bins, margins),
        errors=known(calibration.calibration_errors, margins),
        turns=known(overoptimisation.turning_points, evidence.course),
        rouge=rouge.rouge_table(scores),
        claims=pd.DataFrame(found, columns=list(claims.Claim._fields)),
        left_out=with_lengths[with_lengths["log_ratio"].isna()],
    )
