"""Comparisons for the reward model."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from rlhf.data.loaders import Batch, EvalBatches, TrainBatches, step_lengths
from rlhf.data.sources import Source
from rlhf.data.stage_data import StageDataModule, TokenBudget
from rlhf.data.texts import TextFormat
from rlhf.data.tokenising import lengths, load_comparisons, load_demonstrations
from rlhf.ops.sequences import pad_sequences

_PAIR_COLUMNS = ("batch", "confidence", "chosen_policy", "rejected_policy")


class PreferenceDataModule(StageDataModule):
    """Comparisons in OpenAI's format (`info, summaries, choice, ...`) or generic (`prompt, chosen, rejected`).

    Pairs of CNN/DM batches (those with `cnndm` in their name) form an out-of-distribution split of their own (D08).

    Args:
        train: comparisons to learn from.
        validation: comparisons to measure accuracy on; null: no validation.
        test: comparisons for `test` and `predict`; null: those of `validation`.
        demonstrations: SFT demonstrations, whose mean reward is shifted to 0 (D21); null: no shift.
        batch_size: pairs per optimizer step over all processes (paper: 64).
        micro_batch_size: pairs that go through the model at a time, per process, on average.
        eval_batch_size: the same in validation.
        text: formats and maximum lengths; the paper's reward model reads up to 169 response tokens.
        max_tokens_per_micro_batch: in place of `micro_batch_size`, tokens that go through the model at a time, both
            sides of all pairs and padding included; `auto`: as many as fit into memory.
    """

    def __init__(
        self,
        train: Source,
        validation: Source | None = None,
        test: Source | None = None,
        demonstrations: Source | None = None,
        batch_size: int = 64,
        micro_batch_size: int = 8,
        eval_batch_size: int = 32,
        text: TextFormat = TextFormat(max_response_length=169),
        max_tokens_per_micro_batch: TokenBudget = None,
    ) -> None:
        super().__init__(batch_size, micro_batch_size, eval_batch_size, text, max_tokens_per_micro_batch)
        self.sources = {"train": train, "validation": validation, "test": test}
        self.demonstrations = demonstrations

    def load(self) -> None:
        """Load and tokenise the splits; CNN/DM pairs go to `<split>_cnndm`."""
        for name, source in self.sources.items():
            if source is None or name in self.splits:
                continue
            rows = load_comparisons(source, f"data.{name}", self.tokenizer, self.text)
            if name == "train":
                self.splits[name] = rows
                continue
            news = [i for i, batch in enumerate(rows["batch"][:]) if "cnndm" in batch]
            self.splits[name] = rows.select(sorted(set(range(len(rows))) - set(news)))
            if news:
                self.splits[f"{name}_cnndm"] = rows.select(news)
        if self.demonstrations is not None and "demonstrations" not in self.splits:
            self.splits["demonstrations"] = load_demonstrations(
                self.demonstrations, "data.demonstrations", self.tokenizer, self.text
            )

    def pair_lengths(self) -> list[int]:
        """Tokens of every training pair: both sides, padded to the longer one."""
        sides = (lengths(self.splits["train"], name) for name in ("chosen_ids", "rejected_ids"))
        return [2 * max(pair) for pair in zip(*sides, strict=True)]

    def step_lengths(self, epochs: int) -> Iterator[list[int]]:
        """Of the pairs."""
        return step_lengths(self.pair_lengths(), self.batch_size, self.world_size, epochs)

    def train_dataloader(self) -> TrainBatches:
        """Shuffled micro-batches of pairs."""
        return TrainBatches(
            [1] * len(self.splits["train"]),
            self.pair_lengths(),
            partial(self.collate, "train"),
            self.batch_size,
            self._trainer.accumulate_grad_batches,
            self.rank,
            self.world_size,
            self.progress,
        )

    def val_dataloader(self) -> list[EvalBatches]:
        """The validation split, and its CNN/DM pairs where there are any."""
        return self._with_news("validation")

    def test_dataloader(self) -> list[EvalBatches]:
        """The test split, or the validation split."""
        return self._with_news(self.evaluation_split())

    def demonstration_dataloader(self) -> EvalBatches | None:
        """All demonstrations: `input_ids`, `attention_mask`, padded on the right."""
        if "demonstrations" not in self.splits:
            return None
        return self.in_order("demonstrations")

    def _with_news(self, name: str) -> list[EvalBatches]:
        return [self.in_order(n) for n in (name, f"{name}_cnndm") if len(self.splits.get(n, ()))]

    def collate(self, split: str, numbers: list[int], real: bool) -> Batch:
        """A batch of B pairs: `input_ids (2B, T)`, all chosen, then all rejected, padded on the right (D07, D18)."""
        rows = self.splits[split].select(numbers).to_list()
        if split == "demonstrations":
            ids, mask = pad_sequences([row["input_ids"] for row in rows], self.tokenizer.pad_token_id)
            return {"input_ids": ids, "attention_mask": mask}
        both = [row["chosen_ids"] for row in rows] + [row["rejected_ids"] for row in rows]
        ids, mask = pad_sequences(both, self.tokenizer.pad_token_id)
        pairs = [{"split": split, **{c: row[c] for c in _PAIR_COLUMNS}} for row in rows]
        pair_mask = torch.full((len(rows),), real)
        return {"input_ids": ids, "attention_mask": mask, "pair_mask": pair_mask, "pairs": pairs, "split": split}
