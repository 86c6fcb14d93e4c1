"""Prompts for PPO, and the loader that turns them into experience."""

import json
import math
from collections.abc import Iterator
from functools import cache, cached_property, partial
from typing import Any

from pydantic import PositiveInt
from typing_extensions import override

from rlhf.data.loaders import Batch, Collate, Loader, Plan, PlannedBatches, collate_joint, pad_queries, rank_rows
from rlhf.data.sources import Source
from rlhf.data.stage_data import StageDataModule, TokenBudget
from rlhf.data.texts import TextFormat
from rlhf.data.tokenising import lengths
from rlhf.errors import UserError
from rlhf.protocols import PPOStage, ppo_stage
from rlhf.sampling.rollout import Rollout, RolloutLoader, minibatches
from rlhf.seeding import permutation


class RolloutDataModule(StageDataModule):
    """Loads TL;DR records, prompts or conversations; references (`summary`, `completion`, last turn) may be missing.

    One pass over `train_dataloader()` is one PPO update: it draws the next prompts, asks the module for a rollout, and
    yields it in micro-batches. Prompts are used over and over, reshuffled on each pass (D23). The default batch size
    is the paper's.

    Args:
        rollout_batch_size: episodes that go through the networks at a time in the rollout, which needs less memory than
            training.
    """

    kinds = ("ppo",)
    need_response = False

    def __init__(
        self,
        train: Source,
        validation: Source | None = None,
        test: Source | None = None,
        batch_size: PositiveInt = 512,
        micro_batch_size: PositiveInt = 16,
        rollout_batch_size: PositiveInt = 64,
        eval_batch_size: PositiveInt = 64,
        text: TextFormat = TextFormat(),
        max_tokens_per_micro_batch: TokenBudget = None,
    ) -> None:
        sizes = (batch_size, micro_batch_size, eval_batch_size)
        super().__init__(train, validation, test, *sizes, text, max_tokens_per_micro_batch)
        self.rollout_batch_size = rollout_batch_size
        self.last_rollout: Rollout | None = None  # this rank's experience of the current update, once it is collected
        self.last_prompts: list[int] = []  # the row numbers of its prompts, each as often as it has samples
        self._order_of = cache(lambda number: permutation(len(self.query_lengths), number))

    @property
    def module(self) -> PPOStage:
        """The module that is trained."""
        return ppo_stage(self._trainer)

    @property
    def minibatches(self) -> int:  # type: ignore[override]
        """Optimizer steps per pass over a rollout."""
        return self.module.ppo.minibatches

    @cached_property
    def query_lengths(self) -> list[int]:
        """Tokens of every training prompt."""
        return lengths(self.splits["train"], "query_ids")

    def prompts_of(self, update: int, rank: int | None = None) -> list[int]:
        """Returns the row numbers of a rank's prompts (by default this one's) in an update.

        All ranks together get a stretch of the endless sequence of passes (D23), each about the same number of tokens.
        A prompt with several samples is there as often, in rows that follow one another.
        """
        total, samples = len(self.query_lengths), self.module.ppo.samples_per_prompt
        prompts = self.batch_size // samples
        stretch = range(update * prompts, (update + 1) * prompts)
        rows = [self._order_of(position // total)[position % total] for position in stretch]
        rank = self._trainer.global_rank if rank is None else rank
        own = rank_rows(rows, self.query_lengths, rank, self._trainer.world_size)
        return [row for row in own for _ in range(samples)]

    @override
    def set_accumulation(self) -> None:
        world_size, samples = self._trainer.world_size, self.module.ppo.samples_per_prompt
        if samples > 1 and self.batch_size % (world_size * samples):
            raise UserError(
                f"data.batch_size {self.batch_size} does not divide into {world_size} processes x "
                f"model.ppo.samples_per_prompt {samples}; use a multiple of {world_size * samples}."
            )
        super().set_accumulation()

    @override
    def step_lengths(self, epochs: int) -> Iterator[list[int]]:
        ppo = self.module.ppo
        for update in range(epochs):
            for rank in range(self._trainer.world_size):
                rows = [self.query_lengths[row] + ppo.response_length for row in self.prompts_of(update, rank)]
                for epoch in range(ppo.ppo_epochs if ppo.minibatches > 1 else 1):
                    for minibatch in minibatches(len(rows), ppo.minibatches, update, epoch, rank):
                        yield [rows[n] for n in minibatch]

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        if "zero3" in self.module.placements:
            for name in set(self.splits) - {"train"}:
                rows, world_size, size = len(self.splits[name]), self._trainer.world_size, self.eval_batch_size
                if math.ceil(rows // world_size / size) != math.ceil(rows / world_size / size):
                    raise UserError(
                        f"data.{name} has {rows} rows, which gives some processes one batch more than others; with a "
                        f"model placed in zero3 set data.{name}.limit to a multiple of {world_size}."
                    )
        if stage == "fit":
            self.check_horizon()
            self.check_prompts()

    def check_horizon(self) -> None:
        """Refuses a horizon of the KL controller that is too short for the batch."""
        ppo = self.module.ppo
        if ppo.kl_target is not None and ppo.kl_horizon <= 0.2 * self.batch_size:
            raise UserError(
                f"model.ppo.kl_horizon is {ppo.kl_horizon}; it must be more than a fifth of data.batch_size "
                f"{self.batch_size}, or the KL coefficient could become negative."
            )

    def check_prompts(self) -> None:
        """Refuses a batch that is larger than the number of prompts."""
        samples, prompts = self.module.ppo.samples_per_prompt, len(self.query_lengths)
        if self.batch_size > prompts * samples:
            each = f" with {samples} samples each" if samples > 1 else ""
            raise UserError(
                f"data.batch_size {self.batch_size} is larger than the {prompts} prompts of data.train{each}; an "
                f"update would hold the same prompt twice. Set it to {prompts * samples} at most."
            )

    @override
    def collate(self, split: str) -> Collate:
        return partial(collate, pad_id=self.module.tokenizer.pad_token_id)

    @override
    def train_dataloader(self) -> RolloutLoader:
        module, trainer = self.module, self._trainer
        return RolloutLoader(
            make=self.make_rollout,
            update=lambda: trainer.current_epoch,
            reduce_sum=module.reduce_sum,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            ppo_epochs=module.ppo.ppo_epochs,
            minibatches=module.ppo.minibatches,
            accumulate=trainer.accumulate_grad_batches,
        )

    def make_rollout(self, update: int) -> Rollout:
        """Collects this rank's experience of an update, and keeps it as `last_rollout`."""
        self.last_prompts = self.prompts_of(update)
        batch = PlannedBatches(self.splits["train"], self.collate("train"))[Plan(self.last_prompts)]
        batch |= {name: batch[name].to(self.module.device) for name in ("queries", "query_mask")}
        self.last_rollout = None  # the old one's memory is free before the new one needs it
        self.last_rollout = self.module.rollout({**batch, "chunk": self.rollout_batch_size}, update)
        return self.last_rollout

    def demonstration_dataloader(self) -> Loader | None:
        """Returns the loader of some training prompts with their whole references, if there are any."""
        rows, world_size = self.splits["train"], self._trainer.world_size
        some = enumerate(rows.select(range(min(256, len(rows)))))
        whole = [n for n, row in some if row["reference"] and not row["truncated"]]
        if len(whole) < world_size:
            return None
        rows = rows.select(whole[: len(whole) // world_size * world_size])
        return self.in_order(rows, partial(collate_joint, pad_id=self.module.tokenizer.pad_token_id))


def collate(rows: list[dict[str, Any]], real: bool, pad_id: int) -> Batch:
    """Makes a batch of prompts: `queries`, `query_mask`, and `texts` with `query`, `reference` and `record`."""
    texts = [{"query": r["query"], "reference": r["reference"], "record": json.loads(r["record"])} for r in rows]
    return {**pad_queries(rows, pad_id), "texts": texts}
