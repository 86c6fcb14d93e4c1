"""What the three DataModules share."""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, Literal

import torch
from datasets import Dataset
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from pydantic import PositiveInt
from typing_extensions import override

from rlhf.data.loaders import (
    HOST_MASKS,
    Collate,
    Loader,
    Plan,
    Plans,
    accumulation,
    global_batches,
    loader,
    rank_rows,
    train_plans,
)
from rlhf.data.quality import overlap
from rlhf.data.sources import Source
from rlhf.data.texts import TextFormat
from rlhf.data.token_budget import auto_tokens
from rlhf.data.tokenising import largest_id, lengths, load_demonstrations
from rlhf.errors import UserError
from rlhf.models.loading import check_context
from rlhf.models.tokenizers import check_row
from rlhf.protocols import Stage, stage
from rlhf.sampling.grouping import parts_needed

TokenBudget = PositiveInt | Literal["auto"] | None
NEWS = "_cnndm"  # is added to the name of a split: its CNN/DM pairs (D08)


class StageDataModule(LightningDataModule):
    """Base of `SFTDataModule`, `PreferenceDataModule` and `RolloutDataModule`.

    Args:
        train: records to learn from.
        validation: records to validate on; null: no validation.
        test: records for `test` and `predict`; null: those of `validation`.
        batch_size: examples per optimizer step (PPO: episodes per update) over all processes.
        micro_batch_size: examples that go through the model at a time, per process, on average: a micro-batch is formed
            of examples of similar length, fewer of long ones and more of short ones.
        eval_batch_size: the same in validation, test and prediction.
        text: formats and maximum lengths.
        max_tokens_per_micro_batch: instead of `micro_batch_size`, tokens that go through the model at a time, padding
            included (of a comparison, both sides); `auto`: as many as fit into the memory of the device, by the
            estimate that `check` shows.
    """

    kinds: tuple[str, ...] = ()  # of the modules that it serves; empty: any
    minibatches = 1  # optimizer steps that a global batch is cut into
    sequences = 1  # per example
    rollout_batch_size = 0
    need_response = True

    def __init__(
        self,
        train: Source,
        validation: Source | None = None,
        test: Source | None = None,
        batch_size: PositiveInt = 128,
        micro_batch_size: PositiveInt = 16,
        eval_batch_size: PositiveInt = 32,
        text: TextFormat = TextFormat(),
        max_tokens_per_micro_batch: TokenBudget = None,
    ) -> None:
        super().__init__()
        self.sources = {"train": train, "validation": validation, "test": test}
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.eval_batch_size = eval_batch_size
        self.text = text
        self.max_tokens_per_micro_batch = max_tokens_per_micro_batch
        self.tokens: int | None = None  # per micro-batch, if they are limited
        self.splits: dict[str, Dataset] = {}

    @property
    def _trainer(self) -> Trainer:
        if self.trainer is None:
            raise RuntimeError("A DataModule needs a Trainer: call trainer.fit(module, datamodule).")
        return self.trainer

    @property
    def module(self) -> Stage:
        """The module that is trained."""
        return stage(self._trainer)

    @abstractmethod
    def collate(self, split: str) -> Collate:
        """Returns the function that makes a batch of rows of a split."""

    def train_sizes(self) -> tuple[list[int], list[int]]:
        """Returns for every training example the tokens (pairs: 1) that the loss is a mean over, and all its tokens."""
        raise NotImplementedError

    def load_split(self, name: str, source: Source) -> dict[str, Dataset]:
        """Loads and tokenises the records of a source; returns one or several splits."""
        tokenizer = self.module.tokenizer
        return {name: load_demonstrations(source, f"data.{name}", tokenizer, self.text, self.need_response)}

    def load(self) -> None:
        """Loads all splits that are not there yet."""
        for name, source in self.sources.items():
            if source is not None and name not in self.splits:
                self.splits |= self.load_split(name, source)
                self._warn_of_overlap(name)

    def _warn_of_overlap(self, name: str) -> None:
        for split in {name, name + NEWS} & self.splits.keys() - {"train", "demonstrations"}:
            if count := overlap(self.splits[split], self.splits["train"]):
                rank_zero_warn(f"data.{name}: {count} of {len(self.splits[split])} records stand in data.train, too.")

    @override
    def prepare_data(self) -> None:
        # One process tokenises everything; the others find it in the cache.
        if self._trainer.state.fn == "fit" and self.max_tokens_per_micro_batch is None:
            self.set_accumulation()
        self.load()

    @override
    def setup(self, stage: str) -> None:
        self.load()
        self.check_rows()
        if stage == "fit":
            self.set_accumulation()

    def check_rows(self) -> None:
        """Refuses rows of the loaded splits that the model cannot read."""
        advice = "lower data.text.max_query_length, or the response length"
        check_context(self.module.model_config, self.longest(), "The longest sequence", advice)
        self._check_ids()

    def longest(self) -> int:
        """Returns the tokens of the longest sequence that the model will see."""
        room = {"query_ids": self.module.response_room}
        return max(max(lengths(rows, name)) + room.get(name, 0) for _, rows, name in self._ids())

    def _ids(self) -> Iterator[tuple[str, Dataset, str]]:
        """Yields the columns of token ids: the name of the split, its rows, and the name of the column."""
        for split, rows in self.splits.items():
            if len(rows):
                for name in {"query_ids", "input_ids", "chosen_ids", "rejected_ids"} & set(rows.column_names):
                    yield split, rows, name

    def _check_ids(self) -> None:
        """Refuses tokens for which the embedding of the model has no row."""
        found = self.module.embedding_rows
        for split, rows, name in self._ids():
            check_row(largest_id(rows, name), found, self.module.tokenizer, self.module.model_path, f"data.{split}")

    def set_accumulation(self) -> None:
        """Sets the Trainer's `accumulate_grad_batches`, the one place where batch sizes are divided."""
        trainer, budget = self._trainer, self.max_tokens_per_micro_batch
        setting, size = "data.max_tokens_per_micro_batch", 1
        if budget is None:
            setting, size = "data.micro_batch_size", self.micro_batch_size
        derived = accumulation(self.batch_size, size, trainer.world_size, self.minibatches)
        if budget is not None:
            self.tokens = auto_tokens(trainer, self.module, self) if budget == "auto" else budget
            derived = self._parts_under(self.tokens)
        if trainer.accumulate_grad_batches not in (1, derived):
            raise UserError(
                f"trainer.accumulate_grad_batches is {trainer.accumulate_grad_batches}, but data.batch_size and "
                f"{setting} make it {derived}; leave it out."
            )
        trainer.accumulate_grad_batches = derived

    def _parts_under(self, tokens: int) -> int:
        """Returns the micro-batches that the costliest optimizer step of the run needs; all steps have as many."""
        epochs = self._trainer.max_epochs
        if epochs is None or epochs < 0:
            raise UserError("data.max_tokens_per_micro_batch needs trainer.max_epochs: set the number of epochs.")
        parts = 1
        for step in self.step_lengths(max(epochs, 1)):
            if max(step, default=0) > tokens:
                raise UserError(
                    f"data.max_tokens_per_micro_batch is {tokens}, less than the {max(step)} tokens of the "
                    "longest example (of a comparison, both sides; of PPO, query and longest response)."
                )
            parts = max(parts, parts_needed(step, tokens))
        return parts

    def step_lengths(self, epochs: int) -> Iterator[list[int]]:
        """Yields the tokens of every row of each optimizer step on each process."""
        _, tokens = self.train_sizes()
        world_size = self._trainer.world_size
        for epoch in range(epochs):
            for rows in global_batches(len(tokens), self.batch_size, epoch):
                for rank in range(world_size):
                    yield [tokens[row] for row in rank_rows(rows, tokens, rank, world_size)]

    @override
    def train_dataloader(self) -> Any:
        progress = self._trainer.fit_loop.epoch_loop.batch_progress
        return self.shuffled(lambda: self._trainer.current_epoch, lambda: progress.current.ready)

    def shuffled(self, epoch: Callable[[], int], done: Callable[[], int]) -> Loader:
        """Returns the loader of this process's micro-batches of an epoch, without those that are done already."""
        trainer, (weights, tokens) = self._trainer, self.train_sizes()
        sizes = (self.batch_size, trainer.accumulate_grad_batches, trainer.global_rank, trainer.world_size)

        def plans_left() -> Iterator[Plan]:
            return islice(train_plans(weights, tokens, *sizes, epoch()), done(), None)

        count = math.ceil(len(weights) / self.batch_size) * trainer.accumulate_grad_batches
        return loader(self.splits["train"], Plans(count, plans_left), self.collate("train"), trainer)

    @override
    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        moved = super().transfer_batch_to_device(batch, device, dataloader_idx)
        if isinstance(batch, dict):
            moved[HOST_MASKS] = {name: mask for name, mask in batch.items() if name.endswith("_mask")}
        return moved

    def in_order(self, rows: Dataset, collate: Collate) -> Loader:
        """Returns the loader of rows in order, shared among the processes."""
        world_size, size = self._trainer.world_size, self.eval_batch_size
        if len(rows) < world_size:
            raise UserError(f"{len(rows)} rows cannot be shared by {world_size} processes; use fewer, or more rows.")
        own = range(self._trainer.global_rank, len(rows), world_size)
        plans = [Plan([*own[start : start + size]]) for start in range(0, len(own), size)]
        return loader(rows, Plans(len(plans), lambda: plans), collate, self._trainer)

    def evaluation_loaders(self, *names: str) -> list[Loader]:
        """Returns the loader of the first of some splits that is there, and that of its CNN/DM pairs."""
        name = next((name for name in names if name in self.splits), "")
        parts = [n for n in (name, name + NEWS) if len(self.splits.get(n, ()))]
        return [self.in_order(self.splits[n], self.collate(n)) for n in parts]

    @override
    def val_dataloader(self) -> list[Loader]:
        found = self.evaluation_loaders("validation")
        if not found and self._trainer.state.fn == "validate":
            raise UserError("there is nothing to measure on: set data.validation.")
        return found

    @override
    def test_dataloader(self) -> list[Loader]:
        if not (found := self.evaluation_loaders("test", "validation")):
            raise UserError("there is nothing to measure on: set data.test or data.validation.")
        return found

    predict_dataloader = test_dataloader
