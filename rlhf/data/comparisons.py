"""Comparisons for reward model and DPO."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from pydantic import PositiveInt
from typing_extensions import override

from rlhf.data.loaders import Batch, Collate, Loader, collate_joint
from rlhf.data.sources import Source
from rlhf.data.stage_data import NEWS, StageDataModule, TokenBudget
from rlhf.data.texts import TextFormat
from rlhf.data.tokenising import lengths, load_comparisons
from rlhf.ops.sequences import pad_sequences

_PAIR_COLUMNS = ("batch", "confidence", "chosen_policy", "rejected_policy")


class PreferenceDataModule(StageDataModule):
    """Loads comparisons in OpenAI's format (`info, summaries, choice`) or TRL's (`chosen, rejected`, maybe `prompt`).

    Pairs of CNN/DM batches (those with `cnndm` in their name) form an out-of-distribution split of their own (D08). The
    default batch size is the paper's.

    Args:
        demonstrations: SFT demonstrations, whose mean reward is shifted to 0 (D21); null: no shift.
        text: formats and maximum lengths; the paper's reward model reads up to 169 response tokens.
    """

    kinds = ("reward", "dpo")
    sequences = 2

    def __init__(
        self,
        train: Source,
        validation: Source | None = None,
        test: Source | None = None,
        demonstrations: Source | None = None,
        batch_size: PositiveInt = 64,
        micro_batch_size: PositiveInt = 8,
        eval_batch_size: PositiveInt = 32,
        text: TextFormat = TextFormat(max_response_length=169),
        max_tokens_per_micro_batch: TokenBudget = None,
    ) -> None:
        sizes = (batch_size, micro_batch_size, eval_batch_size)
        super().__init__(train, validation, test, *sizes, text, max_tokens_per_micro_batch)
        self.sources["demonstrations"] = demonstrations

    @override
    def load_split(self, name: str, source: Source) -> dict[str, Dataset]:
        if name == "demonstrations":
            return super().load_split(name, source)
        rows = load_comparisons(source, f"data.{name}", self.module.tokenizer, self.text)
        if name == "train":
            return {name: rows}
        news = [i for i, batch in enumerate(rows["batch"][:]) if "cnndm" in batch]
        return {name: rows.select(sorted(set(range(len(rows))) - set(news))), name + NEWS: rows.select(news)}

    @override
    def train_sizes(self) -> tuple[list[int], list[int]]:
        sides = (lengths(self.splits["train"], name) for name in ("chosen_ids", "rejected_ids"))
        tokens = [2 * max(pair) for pair in zip(*sides, strict=True)]
        return [1] * len(tokens), tokens

    @override
    def collate(self, split: str) -> Collate:
        return partial(collate, pad_id=self.module.tokenizer.pad_token_id, split=split)

    def batches_of(self, split: str) -> Iterator[Batch]:
        """Yields this process's pairs of a split on its device, those of training in the batches of the first epoch."""
        rows = self.splits[split]
        batches = self.shuffled(int, int) if split == "train" else self.in_order(rows, self.collate(split))
        for batch in batches:
            yield self.transfer_batch_to_device(batch, self.module.device, 0)

    def demonstration_dataloader(self) -> Loader | None:
        """Returns the loader of all demonstrations (`input_ids`, `attention_mask`), if there are any."""
        if "demonstrations" not in self.splits:
            return None
        collate = partial(collate_joint, pad_id=self.module.tokenizer.pad_token_id)
        return self.in_order(self.splits["demonstrations"], collate)


def collate(rows: list[dict[str, Any]], real: bool, pad_id: int, split: str) -> Batch:
    """Makes a batch of B pairs.

    Returns:
        `input_ids` and `attention_mask`, `(2B, T)`: all chosen, then all rejected, padded on the right (D07, D18);
        `response_mask (2B, T)`: the tokens of the responses.
        `pair_mask (B,)`: whether a pair counts. `pairs`: what is known of each pair. `split`: its name.
    """
    both = [row["chosen_ids"] for row in rows] + [row["rejected_ids"] for row in rows]
    ids, mask = pad_sequences(both, pad_id)
    starts = torch.tensor([row["chosen_start"] for row in rows] + [row["rejected_start"] for row in rows])
    response_mask = mask * (torch.arange(mask.shape[1]) >= starts.unsqueeze(1))
    pairs = [{"split": split, **{c: row[c] for c in _PAIR_COLUMNS}} for row in rows]
    pair_mask = torch.full((len(rows),), real)
    return {
        "input_ids": ids, "attention_mask": mask, "response_mask": response_mask, "pair_mask": pair_mask,
        "pairs": pairs, "split": split,
    }  # fmt: skip
