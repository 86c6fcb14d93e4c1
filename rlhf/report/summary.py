"""The summary of runs: a row per policy and one for the reference, and what PPO gained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlhf.evaluation.statistics import NOTHING, win_rates

if TYPE_CHECKING:
    import pandas as pd

RUN = ["size", "parameters", "seed"]
REFERENCE = "reference"


def summarise(rows: pd.DataFrame, scores: pd.DataFrame) -> pd.DataFrame:
    """A row for each policy of each run, and one for its reference.

    Args:
        rows: judged rows.
        scores: their ROUGE, as of `overlap.rouge_rows`.

    Returns:
        `size`, `parameters`, `seed`, `policy`, `score` and `score_std` (of the reward model), `gold`, `win_rate`,
        `low`, `high`, `rougeL`, `eos` (share), `length` (tokens). A column that no table has is left out.
    """
    import pandas as pd

    table: list[dict[str, Any]] = []
    for key, run in rows.groupby(RUN, sort=False):
        whose = dict(zip(RUN, key, strict=True))
        for policy, part in run.groupby("policy", sort=False):
            rate = win_rates(part).iloc[0]
            table.append({
                **whose, "policy": policy, **_scores(part, "a"), **rate[["win_rate", "low", "high"]],
                "rougeL": scores.loc[part.index, "rougeL"].mean(),
                "eos": part["a_has_eos"].mean(), "length": part["a_tokens"].mean(),
            })  # fmt: skip
        first = run[run["policy"] == run["policy"].iloc[0]]
        nothing = dict(zip(["win_rate", "low", "high"], NOTHING, strict=True))
        table.append(
            {**whose, "policy": REFERENCE, **_scores(first, "b"), **nothing, "length": first["b_tokens"].mean()}
        )
    return pd.DataFrame(table).dropna(axis=1, how="all")


def _scores(part: pd.DataFrame, side: str) -> dict[str, float]:
    score = part[f"{side}_score"]
    return {"score": score.mean(), "score_std": score.std(), "gold": part[f"{side}_gold"].mean()}


def progress(rows: pd.DataFrame, start: str = "SFT", end: str = "PPO") -> list[str]:
    """What PPO gained, in standard deviations of the scores of SFT: a sentence per run that has both with scores."""
    said = []
    runs = rows.groupby(["size", "seed"], sort=False)
    for (size, seed), run in runs:
        before, after = run[run["policy"] == start], run[run["policy"] == end]
        gain = (after["a_score"].mean() - before["a_score"].mean()) / before["a_score"].std()
        if gain != gain:
            continue
        text = f"{end} moved the mean score by {gain:+.2f} standard deviations of the {start} scores"
        gold = after["a_gold"].mean() - before["a_gold"].mean()
        if gold == gold:
            text += f", and the gold score by {gold:+.2f}"
        whose = f"Size {size}, seed {seed}: " if len(runs) > 1 else ""
        said.append(f"{whose}{text}, on {len(after)} queries.")
    return said


def samples(rows: pd.DataFrame, count: int) -> str:
    """The first queries with what the policies of each size answered, of the smallest seed of a size, as Markdown."""
    shown = rows[rows["seed"] == rows.groupby("size")["seed"].transform("min")]
    several = shown["size"].nunique() > 1
    blocks = []
    for query, part in list(shown.groupby("query", sort=False))[:count]:
        lines = []
        for row in part.itertuples():
            name = f"{row.policy} {row.size}" if several else row.policy
            score = "" if row.a_score != row.a_score else f" ({row.a_score:.2f})"
            lines.append(f"- **{name}**{score}: {_item(row.a)}")
        quoted = "> " + "\n> ".join(query.strip().splitlines())
        blocks.append("\n".join([quoted, "", *lines, f"- **{REFERENCE}**: {_item(part['b'].iloc[0])}"]))
    return "\n\n".join(blocks)


def _item(text: str) -> str:
    """With the lines after the first one indented, so that they stay in the item of a list."""
    return "\n  ".join(text.strip().splitlines())
