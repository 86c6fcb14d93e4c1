"""Demonstrations for supervised fine-tuning."""

from functools import partial
from typing import Any

import torch
from datasets import Dataset
from typing_extensions import override

from rlhf.data.loaders import Batch, Collate, collate_joint, pad_queries
from rlhf.data.sources import Source
from rlhf.data.stage_data import StageDataModule
from rlhf.data.tokenising import lengths
from rlhf.errors import UserError


class SFTDataModule(StageDataModule):
    """Loads TL;DR records, prompts and completions, conversations, or texts; docs/data.md lists their columns.

    The default batch size is the paper's.
    """

    kinds = ("sft",)

    @property
    def _loss(self) -> dict[str, Any]:
        loss_on, turns = getattr(self.module, "loss_on", "all"), getattr(self.module, "assistant_turns", "last")
        return {"response_only": loss_on == "response", "every_turn": turns == "every"}

    @override
    def load_split(self, name: str, source: Source) -> dict[str, Dataset]:
        splits = super().load_split(name, source)
        if self._loss["every_turn"] and [] in splits[name]["turns"][:]:
            raise UserError(
                f"model.assistant_turns: the chat template writes earlier turns of data.{name} in another way than the "
                "last one, so every turn cannot be learned at once; set it to last, or data.text.chat_template."
            )
        return splits

    @override
    def train_sizes(self) -> tuple[list[int], list[int]]:
        tokens = lengths(self.splits["train"], "input_ids")
        columns = (self.splits["train"][name][:] for name in ("response_start", "turns"))
        rows = zip(*columns, tokens, strict=True)
        return [sum(end - start for start, end in spans(*row, **self._loss)) for row in rows], tokens

    @override
    def collate(self, split: str) -> Collate:
        pad_id = self.module.tokenizer.pad_token_id
        return partial(collate, pad_id=pad_id, queries=split != "train", **self._loss)


def spans(
    response_start: int, turns: list[int] | None, length: int, response_only: bool, every_turn: bool
) -> list[tuple[int, int]]:
    """Returns starts and ends of the tokens of a row whose prediction counts (D15); of conversations, the turns."""
    if turns is None:
        return [(max(1, response_start if response_only else 1), length)]
    if not every_turn:
        return [(max(1, response_start), length)]
    return [(max(1, start), min(end, length)) for start, end in zip(turns[::2], turns[1::2], strict=True)]


def collate(
    rows: list[dict[str, Any]], real: bool, pad_id: int, queries: bool, response_only: bool, every_turn: bool
) -> Batch:
    """Makes a batch of demonstrations.

    Returns:
        `input_ids`, `attention_mask` and `loss_mask`, `(B, T)`, padded on the right; `loss_mask` is 1 on tokens whose
        prediction counts (D15), on none if the rows are not `real`. With `queries` also those, padded on the left for
        sampling, and the texts `query` and `reference`.
    """
    batch = collate_joint(rows, real, pad_id)
    mask = batch["attention_mask"]
    loss_mask = batch["loss_mask"] = torch.zeros_like(mask)
    for row, kept in zip(rows if real else [], loss_mask, strict=real):
        length = len(row["input_ids"])
        for start, end in spans(row["response_start"], row["turns"], length, response_only, every_turn):
            kept[start:end] = 1
    if queries:
        batch |= pad_queries(rows, pad_id) | {name: [row[name] for row in rows] for name in ("query", "reference")}
    return batch
