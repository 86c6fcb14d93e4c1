"""The reward model on labelled comparisons: accuracy, and whether its margins mean what they say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from rlhf.evaluation.statistics import proportion
from rlhf.report.runs import RUN, per_group

BINS = 10
LABELS = {"margin": "as given", "clean": "clean (gold score)"}


def accuracy_rows(margins: pd.DataFrame) -> pd.DataFrame:
    """Computes the accuracy of every run per split, batch and confidence; on embedded data also on clean labels.

    Args:
        margins: as returned by `runs.margin_rows`.

    Returns:
        `size`, `parameters`, `seed`, `labels`, and the columns of `accuracy_table` (Wilson intervals).
    """
    from rlhf.callbacks.accuracy_table import accuracy_table

    columns = ["split", "batch", "confidence", "margin"]
    parts = []
    for key, part in margins.groupby(RUN, sort=False):
        tables = {LABELS["margin"]: part[columns]}
        if "gold_margin" in part and part["gold_margin"].notna().all():
            agreed = part["margin"] * part["gold_margin"]  # above 0 where both prefer the same response
            tables[LABELS["clean"]] = part[columns].assign(margin=agreed, batch=None, confidence=None)
        for labels, table in tables.items():
            found = accuracy_table(table.to_dict("records"))
            parts.append(found.assign(**dict(zip(RUN, key, strict=True)), labels=labels))
    names = [*RUN, "labels", "split", "group", "value", "pairs", "accuracy", "low", "high"]
    return pd.concat(parts, ignore_index=True)[names]


def calibration_bins(margins: pd.DataFrame) -> pd.DataFrame:
    """Computes accuracy against margin, in ten bins of equal width of the confidence, sigmoid(|margin|), from 0.5 to 1.

    Returns:
        A row per run, split and bin that has pairs: `from`, `to` (confidence), `pairs`, `margin` and `confidence`
        (means of |margin| and sigmoid(|margin|)), `accuracy` (share with margin > 0), Wilson's `low`, `high`.
    """

    def compute(part: pd.DataFrame) -> dict[str, Any]:
        accuracy, low, high = proportion((part["margin"] > 0).mean(), len(part))
        means = {"margin": part["margin"].abs().mean(), "confidence": part["confidence"].mean()}
        return {"pairs": len(part), **means, "accuracy": accuracy, "low": low, "high": high}

    edges = np.linspace(0.5, 1, BINS + 1)
    confidence = _confidence(margins)
    index = np.minimum(np.searchsorted(edges, confidence, side="right") - 1, BINS - 1)
    binned = margins.assign(**{"confidence": confidence, "from": edges[index], "to": edges[index + 1]})
    run = binned.groupby([*RUN, "split"], sort=False).ngroup()
    order = np.lexsort((index, run))
    return per_group(binned.iloc[order], [*RUN, "split", "from", "to"], compute)


def calibration_errors(margins: pd.DataFrame) -> pd.DataFrame:
    """Computes the expected calibration error of every run and split, over the bins of `calibration_bins`.

    Σ over bins of (pairs of the bin / pairs) · |accuracy - mean confidence|, by torchmetrics (20 bins from 0 to 1, of
    which those below 0.5 are empty).

    Returns:
        `size`, `parameters`, `seed`, `split`, `pairs`, `ece`, `confidence` and `accuracy` (means over all pairs).
    """
    import torch
    from torchmetrics.functional.classification import binary_calibration_error

    def compute(part: pd.DataFrame) -> dict[str, Any]:
        confidence, right = _confidence(part), (part["margin"] > 0).to_numpy()
        error = binary_calibration_error(
            torch.tensor(confidence), torch.tensor(right).long(), n_bins=2 * BINS, norm="l1"
        )
        return {"pairs": len(part), "ece": float(error), "confidence": confidence.mean(), "accuracy": right.mean()}

    return per_group(margins, [*RUN, "split"], compute)


def _confidence(margins: pd.DataFrame) -> np.ndarray:
    from scipy.special import expit

    return expit(margins["margin"].abs().to_numpy())
