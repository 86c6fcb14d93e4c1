"""Prompts for PPO, and the loader that turns them into experience."""

from __future__ import annotations

import json

from rlhf.checks import at_least
from rlhf.data.base import StageDataModule
from rlhf.data.batches import Batch, EvalBatches
from rlhf.data.processing import load_demonstrations
from rlhf.data.records import Source
from rlhf.data.texts import TextFormat
from rlhf.errors import UserError
from rlhf.ops.sequences import pad_sequences
from rlhf.rollout import Rollout, RolloutLoader
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
        micro_batch_size: episodes that go through the networks at a time in training, per process.
        rollout_batch_size: the same in the rollout, which needs less memory.
        eval_batch_size: the same in validation.
        text: formats and maximum lengths.
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
    ) -> None:
        super().__init__(batch_size, micro_batch_size, eval_batch_size, text)
        at_least("data.rollout_batch_size", rollout_batch_size, 1)
        self.rollout_batch_size = rollout_batch_size
        self.sources = {"train": train, "validation": validation, "test": test}
        self.last_rollout: Rollout | None = None
        self.last_prompts: list[int] = []

    def load(self) -> None:
        """Load and tokenise the prompts."""
        for name, source in self.sources.items():
            if source is not None and name not in self.splits:
                rows = load_demonstrations(source, f"data.{name}", self.tokenizer, self.text, need_response=False)
                self.splits[name] = rows

    def set_accumulation(self, parts: int = 1) -> None:
        """With the PPO minibatches of the module."""
        super().set_accumulation(self._trainer.lightning_module.ppo.minibatches)

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

    def prompts_of(self, update: int) -> list[int]:
        """Row numbers of this rank's prompts: a stretch of the endless sequence of shuffled passes (D23)."""
        own = self.batch_size // self.world_size
        first = update * self.batch_size + self.rank * own
        total = len(self.splits["train"])
        orders: dict[int, list[int]] = {}
        rows = []
        for position in range(first, first + own):
            number, offset = divmod(position, total)
            if number not in orders:
                orders[number] = permutation(total, number)
            rows.append(orders[number][offset])
        return rows

    def collate(self, split: str, numbers: list[int], real: bool) -> Batch:
        """`queries (B, P)` padded on the left, `query_mask (B, P)`, and `texts`: `query`, `reference`, `record`."""
        rows = self.splits[split].select(numbers).to_list()
        texts = [{"query": r["query"], "reference": r["reference"], "record": json.loads(r["record"])} for r in rows]
        return {**self.pad_queries([row["query_ids"] for row in rows]), "texts": texts}
