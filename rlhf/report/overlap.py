"""ROUGE of every response, and its mean per run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf.evaluation.rouge import ROUGE, rouge
from rlhf.evaluation.statistics import KEYS, mean_interval

if TYPE_CHECKING:
    import pandas as pd


def rouge_rows(rows: pd.DataFrame) -> pd.DataFrame:
    """ROUGE-1, ROUGE-2 and ROUGE-L of each text `a` with its reference `b`.

    Args:
        rows: judged rows; invalid ones count too, since no judge is asked.

    Returns:
        `size`, `parameters`, `seed`, `policy`, `query`, `rouge1`, `rouge2`, `rougeL`.
    """
    import pandas as pd
    from rich.progress import track

    pairs = list(zip(rows["a"], rows["b"], strict=True))
    scores = pd.DataFrame(
        [rouge([a], [b]) for a, b in track(pairs, description="ROUGE", transient=True)], index=rows.index
    )
    return pd.concat([rows[[*KEYS, "query"]], scores], axis=1)


def rouge_table(scores: pd.DataFrame) -> pd.DataFrame:
    """Means of `rouge_rows` per size, seed and policy, each with its bootstrap interval `<name>_low`, `<name>_high`."""
    import pandas as pd

    table = []
    for key, part in scores.groupby(KEYS, sort=False):
        row = {**dict(zip(KEYS, key, strict=True)), "rows": len(part)}
        for name in ROUGE:
            found = mean_interval(part[name].to_numpy())
            row |= {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}
        table.append(row)
    return pd.DataFrame(table)
