"""Everything that a report shows, as tables: for notebooks, and for the page that `report` writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf.evaluation import statistics
from rlhf.report import agreement, calibration, claims, collapse, overlap, overoptimisation, summary
from rlhf.report import lengths as at_length
from rlhf.report.curve_files import curve_rows
from rlhf.report.runs import Run, check_folders, check_shared_queries, checkpoint_rows, judged_rows, margin_rows

if TYPE_CHECKING:
    import pandas as pd

SFT_PANELS = [
    ("Loss", ["loss/sft_step", "validation/loss"]),
    ("ROUGE on validation", ["validation/rouge1", "validation/rouge2", "validation/rougeL"]),
]
REWARD_PANELS = [
    ("Loss", ["loss/reward_step", "validation/loss"]),
    ("Accuracy", ["validation/accuracy", "validation_cnndm/accuracy"]),
]
PPO_PANELS = [
    ("Score of the reward model", ["objective/scores", "validation/score"]),
    ("KL to the reference (nats per response)", ["objective/kl"]),
    ("Ratio", ["val/ratio"]),
    ("Largest |ratio - 1| before the first step", ["val/ratio_max_deviation"]),
    ("Gold score on validation", ["validation/gold_scores"]),
    ("Length of a response (tokens)", ["rollout/response_length", "validation/length"]),
    ("Share of responses with EOS", ["rollout/eos_share", "validation/eos"]),
]
PANELS = {"sft": SFT_PANELS, "reward": REWARD_PANELS, "ppo": PPO_PANELS}


@dataclass(frozen=True)
class Evidence:
    """What the runs left behind, as tables; empty ones where there is nothing.

    Attributes:
        rows: as of `runs.judged_rows`.
        margins: as of `runs.margin_rows`.
        course: as of `overoptimisation.course`, with the SFT policy as update 0; where no run has checkpoints, as of
            `overoptimisation.validated_course`.
        curves: as of `curves.curve_rows`, the ones of PANELS and all of validation.
    """

    rows: pd.DataFrame
    margins: pd.DataFrame
    course: pd.DataFrame
    curves: pd.DataFrame


@dataclass(frozen=True)
class Analysis:
    """The tables of a report, each as of the function of `rlhf.evaluation` named here; empty ones where data lack."""

    summary: pd.DataFrame  # summary.summarise
    rates: pd.DataFrame  # statistics.win_rates
    differences: pd.DataFrame  # statistics.policy_differences
    mean_lengths: pd.DataFrame  # lengths.mean_lengths
    bins: pd.DataFrame  # lengths.length_bins
    fits: pd.DataFrame  # lengths.length_fits
    bin_differences: pd.DataFrame  # lengths.bin_differences
    agreement: pd.DataFrame  # agreement.reward_agreement
    seeds: pd.DataFrame  # agreement.seed_agreement
    reward_seeds: pd.DataFrame  # agreement.reward_seed_agreement
    accuracy: pd.DataFrame  # calibration.accuracy_rows
    calibration: pd.DataFrame  # calibration.calibration_bins
    errors: pd.DataFrame  # calibration.calibration_errors
    course: pd.DataFrame  # overoptimisation.course or validated_course
    turns: pd.DataFrame  # overoptimisation.turning_points
    rouge: pd.DataFrame  # overlap.rouge_table
    collapse: pd.DataFrame  # collapse.with_signs
    claims: pd.DataFrame  # claims.claims_table
    left_out: pd.DataFrame  # rows without a length ratio


def gather(runs: Sequence[Run]) -> Evidence:
    """Read all tables and curves of runs.

    Raises:
        UserError: a file or column is missing, tables share no query, sizes can't be ordered, or checkpoints have no
            curve of KL, or too short a one.
    """
    import pandas as pd

    rows = judged_rows(runs)
    check_shared_queries(rows)
    check_folders(runs)
    margins, checkpoints = margin_rows(runs), checkpoint_rows(runs)
    folders = {(run.size, run.seed, stage): folder for run in runs for stage, folder in run.stages.items()}
    names = [name for panels in PANELS.values() for _, names in panels for name in names]
    curves = curve_rows(folders, [*names, f"{overoptimisation.VALIDATION}*"])
    if len(checkpoints):
        starts = rows[rows["policy"] == claims.SFT].drop(columns="policy").assign(update=0)
        starts = starts.merge(checkpoints[["size", "seed"]].drop_duplicates(), on=["size", "seed"])
        course = overoptimisation.course(pd.concat([starts, checkpoints], ignore_index=True), curves)
    else:
        course = overoptimisation.validated_course(rows[overoptimisation.RUN].drop_duplicates(), curves)
    return Evidence(rows, margins, course, curves)


def analyse(evidence: Evidence, unit: at_length.Unit = "tokens") -> Analysis:
    """Compute all tables of a report.

    Args:
        evidence: as of `gather`.
        unit: of lengths.
    """
    import pandas as pd

    rows, margins = evidence.rows, evidence.margins
    nothing = pd.DataFrame()
    with_lengths = at_length.with_lengths(rows, unit)
    bins = at_length.length_bins(with_lengths)
    scores = overlap.rouge_rows(rows)
    rates, differences = statistics.win_rates(rows), statistics.policy_differences(rows)
    ahead = at_length.bin_differences(bins, claims.PPO, claims.SFT)
    seeds = agreement.seed_agreement(rows)
    accuracy = calibration.accuracy_rows(margins) if len(margins) else nothing
    found = [
        *claims.ppo_beats_sft(differences),
        *claims.ahead_at_every_length(ahead),
        *claims.rouge_rises(scores),
        *(claims.accuracy_rises(accuracy) if len(accuracy) else []),
        *claims.seeds_agree(seeds),
    ]
    return Analysis(
        summary=summary.summarise(rows, scores),
        rates=rates,
        differences=differences,
        mean_lengths=at_length.mean_lengths(with_lengths),
        bins=bins,
        fits=at_length.length_fits(with_lengths),
        bin_differences=ahead,
        agreement=agreement.reward_agreement(rows),
        seeds=seeds,
        reward_seeds=agreement.reward_seed_agreement(margins) if len(margins) else nothing,
        accuracy=accuracy,
        calibration=calibration.calibration_bins(margins) if len(margins) else nothing,
        errors=calibration.calibration_errors(margins) if len(margins) else nothing,
        course=evidence.course,
        turns=overoptimisation.turning_points(evidence.course) if len(evidence.course) else nothing,
        rouge=overlap.rouge_table(scores),
        collapse=collapse.with_signs(collapse.collapse_table(rates), evidence.curves),
        claims=claims.claims_table(found),
        left_out=with_lengths[with_lengths["log_ratio"].isna()],
    )
