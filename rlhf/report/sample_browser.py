"""The data of the browser of samples: every query with the responses of all policies, small enough for one page."""

from typing import Any

import numpy as np
import pandas as pd

from rlhf.evaluation.statistics import KEYS
from rlhf.report.runs import TEXTS, reference_name

LIMIT = 18_000_000  # bytes of samples in a page, which has at most 20 MB in all
ROW = 120  # bytes that the numbers of a row take
MEASURES = (
    "outcome", "a_score", "b_score", "a_gold", "b_gold", "a_length", "b_length", "a_has_eos", "distance", "disagree",
)  # fmt: skip


def sample_data(rows: pd.DataFrame) -> dict[str, Any] | None:
    """Makes what `samples.html` shows of judged rows, each text once; None where nothing is judged.

    Queries that no longer fit into LIMIT are left out from the end. A row's `distance` is its rank by the reward
    model's margin over the reference minus its rank by the gold score's margin, or by the outcome where there is no
    gold score; ranks go from 0 to 1 over all rows of its table. It is high where the reward model is fonder of a
    response than the judge.

    Returns:
        `texts`; `queries` and the columns `query`, `a`, `b` of `tables`, which are indices into them; `ids`, the
        hash of each query; `total`, the number of queries before some were left out; `reference`, its name; `unit`,
        that of lengths; and `prefix`, the number of characters that all queries begin with.
    """
    if rows.empty:
        return None
    import hashlib

    rows = rows.reset_index(drop=True)
    unit, rows = _with_measures(rows)
    order, queries = pd.factorize(rows["query"])
    rows = _fitting(rows.iloc[order.argsort(kind="stable")]).sort_index()
    codes, texts = pd.factorize(rows[[*TEXTS]].to_numpy(dtype=object).ravel())
    rows = rows.assign(**dict(zip(TEXTS, codes.reshape(-1, 3).T, strict=True)))
    shown = list(dict.fromkeys(rows["query"].tolist()))
    several = [name for name in ("size", "seed") if rows[name].nunique() > 1]
    tables = []
    for (size, seed, policy), part in rows.groupby(["size", "seed", "policy"], sort=False):
        run = {"size": str(size), "seed": f"seed {seed}"}
        columns = {name: part[name].tolist() for name in TEXTS}
        columns |= {name: found for name in MEASURES if (found := _numbers(part[name])) is not None}
        tables.append({"run": ", ".join(run[name] for name in several), "policy": str(policy), **columns})
    return {
        "texts": list(texts),
        "queries": shown,
        "ids": [hashlib.sha256(texts[code].encode(errors="surrogatepass")).hexdigest()[:12] for code in shown],
        "tables": tables,
        "total": len(queries),
        "reference": reference_name(rows),
        "unit": unit,
        "prefix": _alike([texts[code] for code in shown]),
    }


def _with_measures(rows: pd.DataFrame) -> tuple[str, pd.DataFrame]:
    """Adds lengths, in tokens if all are known and in characters otherwise, and where reward model and judge differ."""
    known = bool(rows[["a_tokens", "b_tokens"]].notna().all(axis=None))
    lengths = {f"{side}_length": rows[f"{side}_tokens"] if known else rows[side].str.len() for side in "ab"}
    groups = [rows[key] for key in KEYS]
    reward, gold = rows["a_score"] - rows["b_score"], rows["a_gold"] - rows["b_gold"]
    judge = gold.where(gold.notna().groupby(groups).transform("any"), rows["outcome"])
    both = reward.notna() & judge.notna()
    ranks = [margin.where(both).groupby(groups).rank(pct=True) for margin in (reward, judge)]
    against = np.sign(reward) * np.sign(rows["outcome"] - 0.5)
    disagree = (against < 0).where(against.notna()).astype(float)
    return "tokens" if known else "characters", rows.assign(**lengths, distance=ranks[0] - ranks[1], disagree=disagree)


def _alike(queries: list[str]) -> int:
    """Counts the characters of the lines that all queries begin with, such as a system prompt."""
    first, last = min(queries), max(queries)  # all others are between them
    same = next((place for place, (x, y) in enumerate(zip(first, last, strict=False)) if x != y), 0)
    return first.rfind("\n", 0, same) + 1


def _fitting(rows: pd.DataFrame) -> pd.DataFrame:
    """Keeps the first queries, with all their rows, that fit into LIMIT; at least one. Rows are sorted by query."""
    from jinja2.utils import htmlsafe_json_dumps

    codes, texts = pd.factorize(rows[[*TEXTS]].to_numpy(dtype=object).ravel())
    last = np.maximum.accumulate(codes.reshape(-1, 3).max(axis=1))  # text that a row brings, numbered as they come
    size = np.cumsum([len(htmlsafe_json_dumps(text)) + 2 for text in texts])[last] + ROW * np.arange(1, len(rows) + 1)
    number = pd.factorize(rows["query"])[0]
    over = number[size > LIMIT]
    return rows[number < max(1, over[0])] if len(over) else rows


def _numbers(column: pd.Series) -> list[float | None] | None:
    """Rounds to what is shown; None for what is not finite, and for a column that has nothing else."""
    values = column.astype(float)
    finite = np.isfinite(values)
    if not finite.any():
        return None
    return [round(value, 4) if known else None for value, known in zip(values, finite, strict=True)]
