"""Demonstrations for supervised fine-tuning."""

from functools import partial
from typing import Any

import torch
from typing_extensions import override

from rlhf.data.loaders import Batch, Collate, collate_joint, pad_queries
from rlhf.data.stage_data import StageDataModule
from rlhf.data.tokenising import lengths


class SFTDataModule(StageDataModule):
    """Loads TL;DR records (`subreddit, title, post, summary`) or generic ones (`prompt, completion`).

    The default batch size is the paper's.
    """

    @property
    def _response_only(self) -> bool:
        return getattr(self.module, "loss_on", "all") == "response"

    @override
    def train_sizes(self) -> tuple[list[int], list[int]]:
        tokens = lengths(self.splits["train"], "input_ids")
        starts = self.splits["train"]["response_start"][:] if self._response_only else [1] * len(tokens)
        return [n - max(1, start) for n, start in zip(tokens, starts, strict=True)], tokens

    @override
    def collate(self, split: str) -> Collate:
        pad_id = self.module.tokenizer.pad_token_id
        return partial(collate, pad_id=pad_id, response_only=self._response_only, queries=split != "train")


def collate(rows: list[dict[str, Any]], real: bool, pad_id: int, response_only: bool, queries: bool) -> Batch:
    """Makes a batch of demonstrations.

    Returns:
        `input_ids`, `attention_mask` and `loss_mask`, `(B, T)`, padded on the right; `loss_mask` is 1 on tokens whose
        prediction counts (D15), on none if the rows are not `real`. With `queries` also those, padded on the left for
        sampling, and the texts `query` and `reference`.
    """
    batch = collate_joint(rows, real, pad_id)
    mask = batch["attention_mask"]
    loss_mask = batch["loss_mask"] = mask.clone() if real else torch.zeros_like(mask)
    loss_mask[:, 0] = 0
    if response_only:
        for row, kept in zip(rows, loss_mask, strict=True):
            kept[: row["response_start"]] = 0
    if queries:
        batch |= pad_queries(rows, pad_id) | {name: [row[name] for row in rows] for name in ("query", "reference")}
    return batch
