"""ROUGE of every response, and its mean per run."""

from __future__ import annotations

from typing import Any

import pandas as pd

from rlhf.evaluation.statistics import KEYS, mean_interval
from rlhf.report.runs import per_group

ROUGE = ("rouge1", "rouge2", "rougeL")


def rouge_rows(rows: pd.DataFrame) -> pd.DataFrame:
    """Computes ROUGE-1, ROUGE-2 and ROUGE-L (F-measure) of each text `a` with its reference `b`.

    Invalid rows count too, since no judge is asked.
    """
    from rich.progress import track
    from torchmetrics.functional.text import rouge_score

    pairs = list(zip(rows["a"].str.strip(), rows["b"].str.strip(), strict=True))
    scores = [rouge_score(a, b, rouge_keys=ROUGE) for a, b in track(pairs, description="ROUGE", transient=True)]
    values = {name: [float(score[f"{name}_fmeasure"]) for score in scores] for name in ROUGE}
    return rows[[*KEYS, "query"]].assign(**values)


def rouge_table(scores: pd.DataFrame) -> pd.DataFrame:
    """Averages `rouge_rows` per size, seed and policy, each with its bootstrap interval `<name>_low`, `<name>_high`."""

    def compute(part: pd.DataFrame) -> dict[str, Any]:
        row: dict[str, Any] = {"rows": len(part)}
        for name in ROUGE:
            row[name], row[f"{name}_low"], row[f"{name}_high"] = mean_interval(part[name].to_numpy())
        return row

    return per_group(scores, KEYS, compute)
