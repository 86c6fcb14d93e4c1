"""Prompts for PPO, and the loader that turns them into experience."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property

from rlhf.checks import at_least
from rlhf.data.loaders import Batch, EvalBatches, rank_rows
from rlhf.data.sources import Source
from rlhf.data.stage_data import StageDataModule, TokenBudget
from rlhf.data.texts import TextFormat
from rlhf.data.tokenising import lengths, load_demonstrations
from rlhf.errors import UserError
from rlhf.ops.sequences import pad_sequences
from rlhf.sampling.rollout import Rollout, RolloutLoader, minibatches
from rlhf.seeding import permutation


class RolloutDataModule(StageDataModule):
    """Prompts from TL;DR records or generic ones (`prompt`); references (`summary`, `completion`) may be missing.

    One pass over `train_dataloader()` is one PPO update: it draws the next prompts, asks the module for a rollout, and
    yields it in micro-batches. Prompts are gone through over and over, reshuffled on each pass (D23).

    Args:
        train: prompts to learn on.
        validation: prompts to generate on in validation, all of them (D37); null: no validation.
        test: prompts for `test` and `predict`; null: those of `validation`.
        batch_size: episodes per update over all processes (paper: 512).
        micro_batch_size: episodes that go through the networks at a time in training, per process, on average.
        rollout_batch_size: the same in the rollout, which needs less memory.
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
        batch_size: int = 512,
        micro_batch_size: int = 16,
        rollout_batch_size: int = 64,
        eval_batch_size: int = 64,
        text: TextFormat = TextFormat(),
        max_tokens_per_micro_batch: TokenBudget = None,
    ) -> None:
        super().__init__(batch_size, micro_batch_size, eval_batch_size, text, max_tokens_per_micro_batch)
        at_least("data.rollout_batch_size", rollout_batch_size, 1)
        self.rollout_batch_size = rollout_batch_size
        self.sources = {"train": train, "validation": validation, "test": test}
        self.last_rollout: Rollout | None = None
        self.last_prompts: list[int] = []
        self._orders: dict[int, list[int]] = {}

    def load(self) -> None:
        """Load and tokenise the prompts."""
        for name, source in self.sources.items():
            if source is not None and name not in self.splits:
                rows = load_demonstrations(source, f"data.{name}", self.tokenizer, self.text, need_response=False)
                self.splits[name] = rows

    @cached_property
    def query_lengths(self) -> list[int]:
        """Tokens of every training prompt."""
        return lengths(self.splits["train"], "query_ids")

    @property
    def minibatches(self) -> int:
        """Those of PPO."""
        return self._trainer.lightning_module.ppo.minibatches

    def step_lengths(self, epochs: int) -> Iterator[list[int]]:
        """Of the queries with the longest responses that there may be."""
        ppo, lengths_of = self._trainer.lightning_module.ppo, self.query_lengths
        for update in range(epochs):
            for rank in range(self.world_size):
                rows = [lengths_of[row] + ppo.response_length for row in self.prompts_of(update, rank)]
                for epoch in range(ppo.ppo_epochs if ppo.minibatches > 1 else 1):
                    for minibatch in minibatches(len(rows), ppo.minibatches, update, epoch, rank):
                        yield [rows[n] for n in minibatch]

    def setup(self, stage: str) -> None:
        """Load all splits, and check that they and the settings of the module fit the batch."""
        super().setup(stage)
        module = self._trainer.lightning_module
        if "zero3" in module.placements:
            self._check_even()
        if stage == "fit":
            self._check_batch(module.ppo.kl_horizon if module.ppo.kl_target is not None else None)

    def _check_batch(self, kl_horizon: int | None) -> None:
        if kl_horizon is not None and kl_horizon <= 0.2 * self.batch_size:
            raise UserError(
                f"model.ppo.kl_horizon is {kl_horizon}; it must be more than a fifth of data.batch_size "
                f"{self.batch_size}, or the KL coefficient could become negative."
            )
        prompts = len(self.splits["train"])
        if self.batch_size > prompts:
            raise UserError(
                f"data.batch_size {self.batch_size} is larger than the {prompts} prompts of data.train; an update "
                "would hold the same prompt twice."
            )

    def _check_even(self) -> None:
        for split in set(self.splits) - {"train"}:
            if not self.in_order(split).even:
                raise UserError(
                    f"data.{split} has {len(self.splits[split])} rows, which gives some processes one batch more than "
                    f"others; with a model placed in zero3 set data.{split}.limit to a multiple of {self.world_size}."
                )

    def train_dataloader(self) -> RolloutLoader:
        """The loader whose every pass is one update."""
        module = self._trainer.lightning_module
        return RolloutLoader(
            make=self.make_rollout,
            update=lambda: self._trainer.current_epoch,
            reduce_sum=module.reduce_sum,
            rank=self.rank,
            world_size=self.world_size,
            ppo_epochs=module.ppo.ppo_epochs,
            minibatches=module.ppo.minibatches,
            accumulate=self._trainer.accumulate_grad_batches,
        )

    def make_rollout(self, update: int) -> Rollout:
        """This rank's experience of an update, kept as `last_rollout` for the callbacks."""
        module = self._trainer.lightning_module
        self.last_prompts = self.prompts_of(update)
        batch = self.collate("train", self.last_prompts, True)
        batch |= {name: batch[name].to(module.device) for name in ("queries", "query_mask")}
        self.last_rollout = None  # the old one's memory is free before the new one needs it
        self.last_rollout = module.rollout({**batch, "chunk": self.rollout_batch_size}, update)
        return self.last_rollout

    def demonstration_dataloader(self) -> EvalBatches | None:
        """Some training prompts with their whole references: `input_ids`, `attention_mask`, padded on the right."""
        some = self.splits["train"].select(range(min(256, len(self.splits["train"]))))
        rows = [row["input_ids"] for row in some if row["reference"] and not row["truncated"]]
        rows = rows[: len(rows) // self.world_size * self.world_size]
        if not rows:
            return None

        def collate(numbers: list[int], real: bool) -> Batch:
            ids, mask = pad_sequences([rows[n] for n in numbers], self.tokenizer.pad_token_id)
            return {"input_ids": ids, "attention_mask": mask}

        return EvalBatches(len(rows), collate, self.eval_batch_size, self.rank, self.world_size)

    def prompts_of(self, update: int, rank: int | None = None) -> list[int]:
        """Row numbers of a rank's prompts (by default this one's) in a stretch of the endless sequence of passes (D23).

        Long and short prompts are shared out alike, so that all ranks have about the same number of tokens.
        """
        total = len(self.query_lengths)
        rows = []
        for position in range(update * self.batch_size, (update + 1) * self.batch_size):
            number, offset = divmod(position, total)
            if number not in self._orders:
                self._orders[number] = permutation(total, number)
            rows.append(self._orders[number][offset])
        return rank_rows(rows, self.query_lengths, self.rank if rank is None else rank, self.world_size)

    def collate(self, split: str, numbers: list[int], real: bool) -> Batch:
        """`queries (B, P)` padded on the left, `query_mask (B, P)`, and `texts`: `query`, `reference`, `record`."""
        rows = self.splits[split].select(numbers).to_list()
        texts = [{"query": r["query"], "reference": r["reference"], "record": json.loads(r["record"])} for r in rows]
        return {**self.pad_queries([row["query_ids"] for row in rows]), "texts": texts}
