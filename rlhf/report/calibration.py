"""The reward model on labelled comparisons: accuracy, and whether its margins mean what they say."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from rlhf.evaluation.statistics import proportion

if TYPE_CHECKING:
    import pandas as pd

RUN = ["size", "parameters", "seed"]
BINS = 10
LABELS = {"margin": "as given", "clean": "clean (gold score)"}


def accuracy_rows(margins: pd.DataFrame) -> pd.DataFrame:
    """Accuracy of every run per split, batch and confidence; on embedded data also on clean labels.

    Args:
        margins: as of `runs.margin_rows`.

    Returns:
        `size`, `parameters`, `seed`, `labels`, and the columns of `accuracy_table` (Wilson intervals).
    """
    import pandas as pd

    from rlhf.callbacks.accuracy_table import accuracy_table

    columns = ["split", "batch", "confidence", "margin"]
    parts = []
    for key, part in margins.groupby(RUN, sort=False):
        whose = dict(zip(RUN, key, strict=True))
        table = accuracy_table(part[columns].to_dict("records"))
        parts.append(table.assign(**whose, labels=LABELS["margin"]))
        if "gold_margin" in part and part["gold_margin"].notna().all():
            agreed = part["margin"] * part["gold_margin"]  # above 0 where both prefer the same response
            clean = part[columns].assign(margin=agreed, batch=None, confidence=None)
            parts.append(accuracy_table(clean.to_dict("records")).assign(**whose, labels=LABELS["clean"]))
    names = [*RUN, "labels", "split", "group", "value", "pairs", "accuracy", "low", "high"]
    return pd.concat(parts, ignore_index=True)[names]


def calibration_bins(margins: pd.DataFrame) -> pd.DataFrame:
    """Accuracy against margin, in ten bins of equal width of the confidence, sigmoid(|margin|), from 0.5 to 1.

    Returns:
        A row per run, split and bin that has pairs: `from`, `to` (confidence), `pairs`, `margin` and `confidence`
        (means of |margin| and sigmoid(|margin|)), `accuracy` (share with margin > 0), Wilson's `low`, `high`.
    """
    import pandas as pd

    edges = np.linspace(0.5, 1, BINS + 1)
    table = []
    for key, part in margins.groupby([*RUN, "split"], sort=False):
        size = part["margin"].abs().to_numpy()
        confidence = _sigmoid(size)
        index = np.minimum(np.searchsorted(edges, confidence, side="right") - 1, BINS - 1)
        for number in range(BINS):
            own = index == number
            if own.any():
                found = proportion(float((part["margin"][own] > 0).mean()), int(own.sum()))
                means = size[own].mean(), confidence[own].mean()
                table.append((*key, edges[number], edges[number + 1], int(own.sum()), *means, *found))
    names = ["from", "to", "pairs", "margin", "confidence", "accuracy", "low", "high"]
    return pd.DataFrame(table, columns=[*RUN, "split", *names])


def calibration_errors(margins: pd.DataFrame) -> pd.DataFrame:
    """Expected calibration error of every run and split, over the bins of `calibration_bins`.

    Σ over bins of (pairs of the bin / pairs) · |accuracy - mean confidence|, by torchmetrics (20 bins from 0 to 1, of
    which those below 0.5 are empty).

    Returns:
        `size`, `parameters`, `seed`, `split`, `pairs`, `ece`, `confidence` and `accuracy` (means over all pairs).
    """
    import pandas as pd
    import torch
    from torchmetrics.functional.classification import binary_calibration_error

    table = []
    for key, part in margins.groupby([*RUN, "split"], sort=False):
        confidence = torch.tensor(part["margin"].abs().to_numpy(), dtype=torch.float64).sigmoid()
        right = torch.tensor((part["margin"] > 0).to_numpy()).long()
        error = float(binary_calibration_error(confidence, right, n_bins=2 * BINS, norm="l1"))
        table.append((*key, len(part), error, float(confidence.mean()), float(right.double().mean())))
    return pd.DataFrame(table, columns=[*RUN, "split", "pairs", "ece", "confidence", "accuracy"])


def _sigmoid(x: np.ndarray) -> np.ndarray:
    from scipy.special import expit

    return expit(x)
