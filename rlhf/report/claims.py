"""The paper's claims, each held against the runs: holds, does not hold, or undecided."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import pandas as pd

from rlhf.evaluation.statistics import Estimate, paired_difference, proportion_difference, seed_means
from rlhf.report.calibration import LABELS
from rlhf.report.lengths import ENOUGH
from rlhf.report.runs import PPO, RUN, SFT

RISING = ("rouge_rows", "reward_accuracy")  # tables that are compared from one size to the next
HOLDS, FAILS, OPEN = "holds", "does not hold", "undecided"


class Claim(NamedTuple):
    """A claim, the verdict on it, and the numbers that it rests on."""

    claim: str
    verdict: str
    evidence: str


def claims_table(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Tests the claims that can be tested by the tables of `analysis.analyse` and by `rouge_rows`."""
    tests = {
        "differences": ppo_beats_sft,
        "length_bin_differences": ahead_at_every_length,
        "rouge_rows": rouge_rises,
        "reward_accuracy": accuracy_rises,
        "seed_agreement": seeds_agree,
    }
    given = [name for name in tests if name in tables and (name not in RISING or _sized(tables[name]))]
    claims = [claim for name in given for claim in tests[name](tables[name])]
    sizes = {size for table in tables.values() if "size" in table for size in table["size"]}
    if len(sizes) == 1:  # of which nothing need be told
        claims = [claim._replace(claim=claim.claim.replace(f" at size {min(sizes)}", "")) for claim in claims]
    elif not any(_sized(table) for table in tables.values() if "parameters" in table):
        claims = [claim._replace(claim=claim.claim.replace(" at size ", " in ")) for claim in claims]
    return pd.DataFrame(claims)


def _sized(table: pd.DataFrame) -> bool:
    """Tells whether sizes are sizes, and no mere names of runs, which nothing rises with."""
    return table["parameters"].nunique() > 1


def verdict(differences: Sequence[Estimate]) -> str:
    """Judges the claim that all differences are above 0: it fails where some interval does not reach above 0."""
    if all(found.low > 0 for found in differences):
        return HOLDS
    return FAILS if any(found.high <= 0 for found in differences) else OPEN


def ppo_beats_sft(differences: pd.DataFrame) -> list[Claim]:
    """Tests whether PPO wins more often than SFT at each size, by `statistics.policy_differences`."""
    chosen = differences[(differences["policy"] == PPO) & (differences["baseline"] == SFT)]
    claims = []
    for size, part in chosen.groupby("size", sort=False):
        seeds = part[part["seed"] != "all"]
        row = part.iloc[-1]  # over all seeds, or that of the only one
        found = Estimate(row["difference"], row["low"], row["high"])
        ahead = f"; ahead in {(seeds['difference'] > 0).sum()} of {len(seeds)} seeds" if len(seeds) > 1 else ""
        text = f"win rate of PPO minus SFT {shown(found, '+')} over {row['queries']} queries{ahead}"
        claims.append(Claim(f"PPO beats SFT against the reference at size {size}", verdict([found]), text))
    return claims


def ahead_at_every_length(differences: pd.DataFrame) -> list[Claim]:
    """Tests whether PPO is at or above SFT at every length at each size, by `lengths.bin_differences`.

    It holds where no difference is below 0 and the interval of some bin lies above 0. It does not hold where the
    interval of some bin lies below 0, or where nothing differs.
    """
    claims = []
    for size, part in differences.groupby("size", sort=False):
        below = part[part["difference"] < 0]
        nothing = (part["difference"] == 0).all()
        ahead = below.empty and (part["low"] > 0).any()
        found = HOLDS if ahead else FAILS if nothing or (part["high"] < 0).any() else OPEN
        text = f"{len(part) - len(below)} of {len(part)} bins with {ENOUGH} queries or more of both"
        if nothing:
            text += "; no difference in any"
        if len(below):
            bins = below[["bin", "difference", "low", "high"]].itertuples(index=False)
            listed = ", ".join("{:+.2f} ({:+.3f}, {:+.3f} to {:+.3f})".format(*row) for row in bins)
            text += f"; below at log(length / reference length) {listed}"
        claims.append(Claim(f"PPO is at or above SFT at every length at size {size}", found, text))
    return claims


def rouge_rises(scores: pd.DataFrame) -> list[Claim]:
    """Tests whether ROUGE-L of SFT and of PPO rises with size, by the paired bootstrap of `rouge.rouge_rows`."""
    claims = []
    for policy in (SFT, PPO):
        own = scores[scores["policy"] == policy]
        means = {size: seed_means(part, "rougeL") for size, part in own.groupby("size", sort=False)}
        steps = [(x, y, paired_difference(means[y], means[x])[0]) for x, y in pairwise(means)]
        claims += _rise(f"ROUGE-L of {policy} rises with size", {s: m.mean() for s, m in means.items()}, steps)
    return claims


def accuracy_rises(accuracies: pd.DataFrame) -> list[Claim]:
    """Tests whether the reward model's accuracy rises with size on each split, by `calibration.accuracy_rows`.

    Labels are the cleanest that all runs have. Each size's accuracy is the mean over seeds. All seeds see the same
    pairs, so that Newcombe's interval of a difference takes the number of pairs of one seed: it is too wide rather than
    too narrow.
    """
    whole = accuracies[accuracies["group"] == "all"]
    given, clean = (whole[whole["labels"] == labels] for labels in (LABELS["margin"], LABELS["clean"]))
    all_clean = len(clean[RUN].drop_duplicates()) == len(given[RUN].drop_duplicates())
    claims = []
    for split, part in (clean if all_clean else given).groupby("split", sort=False):
        table = part.groupby("size", sort=False).agg(accuracy=("accuracy", "mean"), pairs=("pairs", "min"))
        steps = [
            (x.Index, y.Index, proportion_difference(y.accuracy, y.pairs, x.accuracy, x.pairs))
            for x, y in pairwise(table.itertuples())
        ]
        title = f"Reward-model accuracy on {split} rises with size (labels {part['labels'].iloc[0]})"
        claims += _rise(title, table["accuracy"].to_dict(), steps)
    return claims


def seeds_agree(agreement: pd.DataFrame) -> list[Claim]:
    """Tests whether the seeds of each size and policy win on the same queries, by `agreement.seed_agreement`."""
    claims = []
    for row in agreement.itertuples(index=False):
        found = Estimate(row.fleiss, row.low, row.high)
        unanimous = f"{row.unanimous:.1%} of {row.queries} queries unanimous"
        text = f"Fleiss' kappa {shown(found)}, {unanimous}, {row.seeds} seeds"
        title = f"Seeds of {row.policy} at size {row.size} agree on what wins beyond chance"
        claims.append(Claim(title, verdict([found]), text))
    return claims


def shown(found: Estimate, sign: str = "") -> str:
    """Formats an estimate with its interval."""
    if pd.isna(found.value):
        return "unknown"
    interval = "no interval" if pd.isna(found.low) else f"{found.low:{sign}.3f} to {found.high:{sign}.3f}"
    return f"{found.value:{sign}.3f} ({interval})"


def _rise(title: str, means: dict[str, float], steps: Sequence[tuple[str, str, Estimate]]) -> list[Claim]:
    if not steps:
        return []
    values = ", ".join(f"{size} {mean:.3f}" for size, mean in means.items())
    changes = "; ".join(f"{x} to {y} {shown(found, '+')}" for x, y, found in steps)
    return [Claim(title, verdict([found for _, _, found in steps]), f"{values}; {changes}")]
