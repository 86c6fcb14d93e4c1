"""What the three DataModules share."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch import LightningDataModule
from torch import Tensor

from rlhf.checks import at_least
from rlhf.data.loaders import Batch, EvalBatches, accumulation
from rlhf.data.texts import TextFormat
from rlhf.data.tokenising import lengths
from rlhf.errors import UserError
from rlhf.ops.sequences import pad_sequences
from rlhf.sampling.grouping import parts_needed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


TokenBudget = int | Literal["auto"] | None


class StageDataModule(LightningDataModule):
    """Base of `SFTDataModule`, `PreferenceDataModule` and `RolloutDataModule`.

    Args:
        batch_size: examples per optimizer step (PPO: episodes per update) over all processes.
        micro_batch_size: examples that go through the model at a time, per process, on average: a micro-batch is formed
            of examples of similar length, fewer of long ones and more of short ones.
        eval_batch_size: the same in validation, test and prediction.
        text: formats and maximum lengths.
        max_tokens_per_micro_batch: in place of `micro_batch_size`, tokens that go through the model at a time, padding
            included; `auto`: as many as fit into the memory of the device, by the estimate that `check` shows.
    """

    def __init__(
        self,
        batch_size: int,
        micro_batch_size: int,
        eval_batch_size: int,
        text: TextFormat,
        max_tokens_per_micro_batch: TokenBudget,
    ) -> None:
        super().__init__()
        at_least("data.eval_batch_size", eval_batch_size, 1)
        if isinstance(max_tokens_per_micro_batch, int):
            at_least("data.max_tokens_per_micro_batch", max_tokens_per_micro_batch, 1)
        self.max_tokens_per_micro_batch = max_tokens_per_micro_batch
        self.tokens: int | None = None  # per micro-batch, where they are limited
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.eval_batch_size = eval_batch_size
        self.text = text
        self.splits: dict[str, Any] = {}

    @property
    def _trainer(self) -> Any:
        if self.trainer is None:
            raise RuntimeError("A DataModule needs a Trainer: call trainer.fit(module, datamodule).")
        return self.trainer

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the module that is trained."""
        return self._trainer.lightning_module.tokenizer

    @property
    def rank(self) -> int:
        """This process."""
        return self._trainer.global_rank

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self._trainer.world_size

    def prepare_data(self) -> None:
        """Tokenise everything on one process; the others find it in the cache."""
        if self._trainer.state.fn == "fit" and self.max_tokens_per_micro_batch is None:
            self.set_accumulation()
        self.load()

    def load(self) -> None:
        """Load all splits into `splits`."""
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        """Load all splits, and set the accumulation that the batch size asks for."""
        self.load()
        self._check_lengths()
        if stage == "fit":
            self.set_accumulation()

    def longest(self) -> int:
        """Tokens of the longest sequence that the model will see."""
        room = {"query_ids": self._trainer.lightning_module.response_room}
        return max(
            max(lengths(rows, name)) + room.get(name, 0)
            for rows in self.splits.values()
            if len(rows)
            for name in {"query_ids", "input_ids", "chosen_ids", "rejected_ids"} & set(rows.column_names)
        )

    def _check_lengths(self) -> None:
        config = self._trainer.lightning_module.model_config.get_text_config()
        positions = getattr(config, "max_position_embeddings", None)
        longest = self.longest()
        if positions is not None and longest > positions:
            raise UserError(
                f"The longest sequence has {longest} tokens, more than the {positions} positions of the model; "
                "lower data.text.max_query_length, or the response length."
            )

    @property
    def minibatches(self) -> int:
        """Optimizer steps that a global batch is cut into."""
        return 1

    def set_accumulation(self) -> None:
        """Derive `accumulate_grad_batches`, the one place where batch sizes are divided."""
        if self.max_tokens_per_micro_batch is None:
            derived = accumulation(self.batch_size, self.micro_batch_size, self.world_size, self.minibatches)
            setting = "data.micro_batch_size"
        else:
            accumulation(self.batch_size, 1, self.world_size, self.minibatches)
            self.tokens = self._token_limit()
            derived, setting = self._parts_under(self.tokens), "data.max_tokens_per_micro_batch"
        if self._trainer.accumulate_grad_batches not in (1, derived):
            raise UserError(
                f"trainer.accumulate_grad_batches is {self._trainer.accumulate_grad_batches}, but data.batch_size and "
                f"{setting} make it {derived}; leave it out."
            )
        self._trainer.accumulate_grad_batches = derived

    def _token_limit(self) -> int:
        if isinstance(self.max_tokens_per_micro_batch, int):
            return self.max_tokens_per_micro_batch
        from rlhf.data.token_budget import auto_tokens

        return auto_tokens(self._trainer, self._trainer.lightning_module, self)

    def _parts_under(self, tokens: int) -> int:
        """Micro-batches that the costliest optimizer step of the run needs; every other one then has as many."""
        epochs = self._trainer.max_epochs
        if epochs is None or epochs < 0:
            raise UserError(
                "data.max_tokens_per_micro_batch needs trainer.max_epochs, the number of epochs of the run."
            )
        parts = 1
        for lengths_of_step in self.step_lengths(max(epochs, 1)):
            if lengths_of_step and max(lengths_of_step) > tokens:
                raise UserError(
                    f"data.max_tokens_per_micro_batch is {tokens}, less than the {max(lengths_of_step)} tokens of the "
                    "longest example (of a comparison, both sides; of PPO, query and longest response)."
                )
            parts = max(parts, parts_needed(lengths_of_step, tokens))
        return parts

    def step_lengths(self, epochs: int) -> Iterator[list[int]]:
        """Tokens of every row of each optimizer step on each process."""
        raise NotImplementedError

    def progress(self) -> tuple[int, int]:
        """The current epoch, and how many of its micro-batches are done; not 0 where a run resumes in mid-epoch."""
        return self._trainer.current_epoch, self._trainer.fit_loop.epoch_loop.batch_progress.current.ready

    def evaluation_split(self) -> str:
        """The split of `test` and `predict`: `test` where there is one, else `validation`."""
        for name in ("test", "validation"):
            if name in self.splits:
                return name
        raise UserError("there is nothing to measure on: set data.test or data.validation.")

    def collate(self, split: str, numbers: list[int], real: bool) -> Batch:
        """A batch of rows of a split; where it is not `real`, it must count for nothing."""
        raise NotImplementedError

    def in_order(self, split: str) -> EvalBatches:
        """All rows of a split in order, shared among the processes."""
        collate = partial(self.collate, split)
        return EvalBatches(len(self.splits[split]), collate, self.eval_batch_size, self.rank, self.world_size)

    def val_dataloader(self) -> Any:
        """The validation split, in order."""
        return self.in_order("validation") if "validation" in self.splits else []

    def test_dataloader(self) -> Any:
        """The test split, or the validation split."""
        return self.in_order(self.evaluation_split())

    def predict_dataloader(self) -> Any:
        """As `test_dataloader`."""
        return self.test_dataloader()

    def pad_queries(self, queries: list[list[int]]) -> dict[str, Tensor]:
        """Queries padded on the left to the longest of them (D03): `queries (B, P)`, `query_mask (B, P)`."""
        ids, mask = pad_sequences(queries, self.tokenizer.pad_token_id, "left")
        return {"queries": ids, "query_mask": mask}
