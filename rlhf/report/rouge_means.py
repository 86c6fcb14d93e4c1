"""ROUGE of every response, and its mean per run."""

from typing import Any

import pandas as pd

from rlhf.evaluation.rouge import ROUGE, rouge
from rlhf.evaluation.statistics import KEYS, mean_interval
from rlhf.report.runs import per_group


def rouge_rows(rows: pd.DataFrame) -> pd.DataFrame:
    """Computes ROUGE-1, ROUGE-2 and ROUGE-L (F-measure) of each text `a` with its reference `b`.

    Invalid rows count too, since no judge is asked.
    """
    from rich.progress import track

    pairs = track(list(zip(rows["a"], rows["b"], strict=True)), description="ROUGE", transient=True)
    scores = pd.DataFrame([rouge([a], [b]) for a, b in pairs], index=rows.index)
    return pd.concat([rows[[*KEYS, "query"]], scores], axis=1)


def rouge_table(scores: pd.DataFrame) -> pd.DataFrame:
    """Averages `rouge_rows` per size, seed and policy, each with its bootstrap interval `<name>_low`, `<name>_high`."""

    def compute(part: pd.DataFrame) -> dict[str, Any]:
        row: dict[str, Any] = {"rows": len(part)}
        for name in ROUGE:
            row[name], row[f"{name}_low"], row[f"{name}_high"] = mean_interval(part[name].to_numpy())
        return row

    return per_group(scores, KEYS, compute)
