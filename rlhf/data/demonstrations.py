"""Demonstrations for supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from rlhf.data.loaders import Batch, TrainBatches, step_lengths
from rlhf.data.sources import Source
from rlhf.data.stage_data import StageDataModule, TokenBudget
from rlhf.data.texts import TextFormat
from rlhf.data.tokenising import lengths, load_demonstrations
from rlhf.ops.sequences import pad_sequences


class SFTDataModule(StageDataModule):
    """TL;DR records (`subreddit, title, post, summary`) or generic ones (`prompt, completion`).

    Args:
        train: demonstrations to learn from.
        validation: demonstrations to measure loss and ROUGE on; null: no validation.
        test: demonstrations for `test` and `predict`; null: those of `validation`.
        batch_size: examples per optimizer step over all processes (paper: 128).
        micro_batch_size: examples that go through the model at a time, per process, on average.
        eval_batch_size: the same in validation.
        text: formats and maximum lengths.
        max_tokens_per_micro_batch: in place of `micro_batch_size`, tokens that go through the model at a time, padding
            included; `auto`: as many as fit into memory.
    """

    def __init__(
        self,
        train: Source,
        validation: Source | None = None,
        test: Source | None = None,
        batch_size: int = 128,
        micro_batch_size: int = 16,
        eval_batch_size: int = 32,
        text: TextFormat = TextFormat(),
        max_tokens_per_micro_batch: TokenBudget = None,
    ) -> None:
        super().__init__(batch_size, micro_batch_size, eval_batch_size, text, max_tokens_per_micro_batch)
        self.sources = {"train": train, "validation": validation, "test": test}

    def load(self) -> None:
        """Load and tokenise the splits."""
        for name, source in self.sources.items():
            if source is not None and name not in self.splits:
                self.splits[name] = load_demonstrations(source, f"data.{name}", self.tokenizer, self.text)

    def step_lengths(self, epochs: int) -> Iterator[list[int]]:
        """Of the joint sequences."""
        return step_lengths(lengths(self.splits["train"], "input_ids"), self.batch_size, self.world_size, epochs)

    def train_dataloader(self) -> TrainBatches:
        """Shuffled micro-batches of the training split."""
        rows = self.splits["train"]
        starts = rows["response_start"][:] if self._response_only else [1] * len(rows)
        counts = [n - max(1, start) for n, start in zip(lengths(rows, "input_ids"), starts, strict=True)]
        return TrainBatches(
            counts,
            lengths(rows, "input_ids"),
            partial(self.collate, "train"),
            self.batch_size,
            self._trainer.accumulate_grad_batches,
            self.rank,
            self.world_size,
            self.progress,
        )

    @property
    def _response_only(self) -> bool:
        return getattr(self._trainer.lightning_module, "loss_on", "all") == "response"

    def collate(self, split: str, numbers: list[int], real: bool) -> Batch:
        """A batch: joint sequences padded on the right (D07), queries padded on the left for sampling.

        `loss_mask (B, T)` is 1 on the tokens whose prediction counts (D15); all 0 where the batch is not `real`.
        """
        rows = self.splits[split].select(numbers).to_list()
        ids, mask = pad_sequences([row["input_ids"] for row in rows], self.tokenizer.pad_token_id)
        loss_mask = mask.clone() if real else torch.zeros_like(mask)
        loss_mask[:, 0] = 0
        if self._response_only:
            for row, kept in zip(rows, loss_mask, strict=True):
                kept[: row["response_start"]] = 0
        batch: Batch = {"input_ids": ids, "attention_mask": mask, "loss_mask": loss_mask}
        if split != "train":
            batch |= self.pad_queries([row["query_ids"] for row in rows])
            batch |= {"query": [row["query"] for row in rows], "reference": [row["reference"] for row in rows]}
        return batch
