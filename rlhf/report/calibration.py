"""The reward model on labelled comparisons: accuracy, and whether its margins mean what they say."""

from typing import Any

import numpy as np
import pandas as pd

from rlhf.evaluation.statistics import proportion
from rlhf.report.runs import RUN, per_group

BINS = 10
LABELS = {"margin": "as given", "clean": "clean (gold score)"}


def accuracy_rows(margins: pd.DataFrame) -> pd.DataFrame:
    """Computes the accuracy of every run per split, batch and confidence; on embedded data also on clean labels."""
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


def accuracy_tables(margins: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Splits `accuracy_rows` into that of whole splits and that of batches and confidences, a row per size."""
    accuracy = accuracy_rows(margins)
    whole, parts = (accuracy[(accuracy["group"] == "all") == is_whole] for is_whole in (True, False))
    keys = ["split", "group", "value"]
    parts = parts.assign(value=[value if isinstance(value, str) else f"{value:g}" for value in parts["value"]])
    order = parts.groupby(keys, sort=False).ngroup().sort_values(kind="stable").index
    groups = parts.loc[order].groupby([*keys, "size"], sort=False)
    if groups.size().max() == 1:
        by_group = groups[["pairs", "accuracy", "low", "high"]].first()
    else:
        numbers = {"accuracy": ("accuracy", "mean"), "lowest": ("accuracy", "min"), "highest": ("accuracy", "max")}
        by_group = groups.agg(pairs=("pairs", "max"), **numbers)
    return {
        "reward_accuracy": accuracy,
        "reward_accuracy_by_split": whole.drop(columns=["group", "value"]),
        "reward_accuracy_by_group": by_group.reset_index(),
    }


def calibration_bins(margins: pd.DataFrame) -> pd.DataFrame:
    """Computes accuracy against margin, in ten bins of equal width of the confidence, sigmoid(|margin|), from 0.5 to 1.

    Returns:
        A row per run, split and bin that has pairs: `from`, `to` (confidence), `pairs`, `margin` and `confidence`
        (means of |margin| and sigmoid(|margin|)), `accuracy` (share with margin > 0), Wilson's `low`, `high`.
    """

    def compute(part: pd.DataFrame) -> dict[str, Any]:
        means = {"margin": part["margin"].abs().mean(), "confidence": part["confidence"].mean()}
        return {"pairs": len(part), **means, **proportion((part["margin"] > 0).mean(), len(part))._asdict()}

    edges = np.linspace(0.5, 1, BINS + 1)
    confidence = sigmoid(margins["margin"].abs().to_numpy())
    index = np.minimum(np.searchsorted(edges, confidence, side="right") - 1, BINS - 1)
    binned = margins.assign(**{"confidence": confidence, "from": edges[index], "to": edges[index + 1]})
    order = np.lexsort((index, binned.groupby([*RUN, "split"], sort=False).ngroup()))
    keys = [*RUN, "split", "from", "to"]
    return per_group(binned.iloc[order], keys, compute).rename(columns={"value": "accuracy"})


def calibration_errors(margins: pd.DataFrame) -> pd.DataFrame:
    """Computes the expected calibration error of every run and split, over the bins of `calibration_bins`.

    Σ over bins of (pairs of the bin / pairs) · |accuracy - mean confidence|, by torchmetrics (20 bins from 0 to 1, of
    which those below 0.5 are empty). `confidence` and `accuracy` are means over all pairs.
    """
    import torch
    from torchmetrics.functional.classification import binary_calibration_error

    def compute(part: pd.DataFrame) -> dict[str, Any]:
        confidence, right = sigmoid(part["margin"].abs().to_numpy()), (part["margin"] > 0).to_numpy()
        tensors = torch.tensor(confidence), torch.tensor(right).long()
        error = float(binary_calibration_error(*tensors, n_bins=2 * BINS, norm="l1"))
        return {"pairs": len(part), "ece": error, "confidence": confidence.mean(), "accuracy": right.mean()}

    return per_group(margins, [*RUN, "split"], compute)


def sigmoid(x: np.ndarray) -> np.ndarray:
    """Computes the probability that belongs to a margin."""
    return 1 / (1 + np.exp(-x))
