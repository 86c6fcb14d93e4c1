"""Everything that a report shows, as tables: for notebooks, and for the page that `report` writes."""

from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd

from rlhf.evaluation import statistics
from rlhf.report import agreement, calibration, claims, lengths, overoptimisation, rouge_means, run_findings, summary
from rlhf.report.curve_files import curve_rows
from rlhf.report.run_differences import curve_ends, run_differences
from rlhf.report.run_folders import progress, settings_that_differ
from rlhf.report.runs import PPO, RUN, SFT, Run, check_shared_queries, judged_rows, margin_rows, ordered

PANELS = {
    "sft": {
        "Loss": ["loss/sft_step", "validation/loss"],
        "ROUGE on validation": ["validation/rouge1", "validation/rouge2", "validation/rougeL"],
        "Share of validation responses with EOS": ["validation/eos"],
    },
    "reward": {
        "Loss": ["loss/reward_step", "validation/loss"],
        "Accuracy": ["validation/accuracy", "validation_cnndm/accuracy"],
    },
    "dpo": {
        "Loss": ["loss/dpo_step", "validation/loss"],
        "Accuracy": ["validation/accuracy", "validation_cnndm/accuracy"],
    },
    "ppo": {
        "Score of the reward model": ["objective/scores", "validation/score"],
        "KL to the reference (nats per response)": ["objective/kl"],
        "Ratio": ["val/ratio"],
        "Largest |ratio - 1| before the first step": ["val/ratio_max_deviation"],
        "Gold score on validation": ["validation/gold_scores"],
        "Length of a response (tokens)": ["rollout/response_length", "validation/length"],
        "Share of responses with EOS": ["rollout/eos_share", "validation/eos"],
    },
}


class Evidence(NamedTuple):
    """What the runs left behind, as tables; empty ones where there is nothing."""

    rows: pd.DataFrame  # of `judged_rows`
    margins: pd.DataFrame  # of `margin_rows`
    course: pd.DataFrame  # of `course`, with SFT as update 0; where no run has checkpoints, of `validated_course`
    curves: pd.DataFrame  # of `curve_rows`: those of PANELS, and all of validation
    findings: pd.DataFrame  # of `run_findings.findings_table`
    between: dict[str, pd.DataFrame]  # of `run_folders.settings_that_differ`, and of `run_differences`
    progress: pd.DataFrame  # of `run_folders.progress`


def gather(runs: Sequence[Run]) -> Evidence:
    """Reads all tables and curves of runs."""
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
        known = pd.DataFrame([(run.size, run.parameters or 1, run.seed) for run in runs], columns=RUN)
        course = overoptimisation.validated_course(known, curves)
    findings = run_findings.findings_table(runs, rows)
    between = {}
    if len(runs) > 1 and runs[0].parameters is None:
        between = {
            "settings": settings_that_differ(runs),
            "curve_ends": curve_ends(curves),
            "run_differences": run_differences(runs, rows),
        }
    return Evidence(rows, margin_rows(runs), course, curves, findings, between, progress(runs))


def analyse(evidence: Evidence, unit: lengths.Unit = "tokens") -> dict[str, pd.DataFrame]:
    """Computes the tables of a report under the names of their CSV files, without those that lack data."""
    rows, margins, course, curves, findings, between, stages = evidence
    tables = {
        "findings": findings,
        "progress": stages,
        **between,
        **(_of_judged_rows(rows, curves, unit) if len(rows) else {}),
        "over_optimisation": course,
        **{f"{stage}_curves": curves[curves["stage"] == stage] for stage in PANELS},
        "invariants": summary.invariants(curves),
    }
    if len(course):
        tables["over_optimisation_best"] = overoptimisation.turning_points(course)
    if len(margins):
        tables |= calibration.accuracy_tables(margins)
        tables["calibration"] = calibration.calibration_bins(margins)
        tables["calibration_error"] = calibration.calibration_errors(margins)
        tables["reward_seed_agreement"] = agreement.reward_seed_agreement(margins)
    tables = {name: table for name, table in tables.items() if len(table)}
    scores = tables.pop("rouge_rows", pd.DataFrame())
    found = claims.claims_table({**tables, **({"rouge_rows": scores} if len(scores) else {})})
    return {**tables, "claims": found} if len(found) else tables


def _of_judged_rows(rows: pd.DataFrame, curves: pd.DataFrame, unit: lengths.Unit) -> dict[str, pd.DataFrame]:
    """Computes the tables that rest on judged rows, and `rouge_rows` for the claims."""
    with_lengths = lengths.with_lengths(rows, unit)
    bins, scores = lengths.length_bins(with_lengths), rouge_means.rouge_rows(rows)
    rates = statistics.win_rates(rows)
    tables = {
        "summary": summary.summarise(rows, scores),
        "win_rates": rates,
        "differences": statistics.policy_differences(rows),
        "left_out": with_lengths[with_lengths["log_ratio"].isna()],  # rows without a length ratio
        "mean_lengths": lengths.mean_lengths(with_lengths),
        "length_bins": bins,
        "length_adjusted": lengths.length_fits(with_lengths),
        "length_bin_differences": lengths.bin_differences(bins, PPO, SFT),
        "reward_agreement": agreement.reward_agreement(rows),
        "seed_agreement": agreement.seed_agreement(rows),
        "rouge": rouge_means.rouge_table(scores),
        "rouge_rows": scores,
    }
    if rates.groupby("size")["seed"].nunique().max() > 1:
        tables["seeds"] = summary.side_by_side(rates, curves)
        for name, value in (("win_rates", "win_rate"), ("reward_agreement", "agreement")):
            if len(tables[name]):
                tables[f"{name}_over_seeds"] = statistics.over_seeds(tables[name], [value], lengths.GROUP)
    return tables
