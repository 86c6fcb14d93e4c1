"""What the three stages share: tokenizer, optimizer, schedule, ranks, export."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from rlhf.callbacks import unless_given
from rlhf.callbacks.dropout import DisableDropout
from rlhf.callbacks.invariants import Invariants
from rlhf.hardware import bound_primitive_cache, keep_freed_memory
from rlhf.models.frozen import FrozenModel
from rlhf.models.loading import load_config, load_tokenizer
from rlhf.modules.settings import Optimization
from rlhf.seeding import shared_seed
from rlhf.strategies import check_strategy, engine_dtype


class StageModule(LightningModule):
    """Base of `SFTModule`, `RewardModule` and `PPOModule`.

    Args:
        model_path: folder of a Hugging Face model (an export of an earlier stage), or a hub name.
        optimization: learning rate, schedule, loss reduction.
        pad_token: token to pad with, see `rlhf.models.loading.load_tokenizer`.
        activation_checkpointing: keep the inputs of layers only and compute the rest again in the backward pass: a
            third more computation for far less memory.
    """

    kind: Literal["sft", "reward", "ppo"]
    schedule_interval: Literal["step", "epoch"] = "step"

    def __init__(
        self, model_path: str, optimization: Optimization, pad_token: str | None, activation_checkpointing: bool
    ) -> None:
        super().__init__()
        self.model_path = model_path
        self.optimization = optimization
        self.activation_checkpointing = activation_checkpointing
        self.tokenizer = load_tokenizer(model_path, pad_token)
        self.model_config = load_config(model_path, "model.model_path")

    def setup(self, stage: str) -> None:
        """Refuse a strategy or precision that would make results wrong; on a CPU, settle what memory is kept."""
        check_strategy(self.trainer)
        if self.trainer.strategy.root_device.type == "cpu":
            keep_freed_memory()
            bound_primitive_cache()

    # ------------------------------------------------------------------------------------- to be given by a stage

    @abstractmethod
    def save_export(self, folder: Path) -> None:
        """Write what the next stage needs into `folder`. Called on rank 0 only."""

    def prepare_export(self) -> None:
        """What all ranks must do before an export."""

    @property
    def response_room(self) -> int:
        """How many tokens this stage may append to a query by sampling."""
        return 0

    @property
    def frozen_models(self) -> list[FrozenModel[Any]]:
        """Models that are only read."""
        return []

    def padding_side_difference(self, batch: Any) -> Tensor | None:
        """How much the rewards of a training batch depend on the side of the padding (D20), where there are rewards."""
        return None

    def demonstration_rewards(self) -> Tensor | None:
        """This rank's rewards of some demonstrations, whose mean should be 0 (D21), where there are any."""
        return None

    # ---------------------------------------------------------------------------------------------------- loading

    @property
    def weights_dtype(self) -> torch.dtype:
        """In which trained weights are loaded; float32 where there is no Trainer yet."""
        return torch.float32 if self._trainer is None else engine_dtype(self._trainer)

    @property
    def weights_device(self) -> torch.device:
        """Where they go at once, so that no process holds all of its models in CPU memory."""
        return torch.device("cpu") if self._trainer is None else self._trainer.strategy.root_device

    # ----------------------------------------------------------------------------------------------------- ranks

    def reduce_sum(self, x: Tensor) -> Tensor:
        """The sum of a tensor over all ranks."""
        if not (dist.is_available() and dist.is_initialized()):
            return x
        x = x.clone()
        dist.all_reduce(x)
        return x

    def reduce_max(self, x: Tensor) -> Tensor:
        """The maximum of a tensor over all ranks, element by element."""
        if not (dist.is_available() and dist.is_initialized()):
            return x
        x = x.clone()
        dist.all_reduce(x, dist.ReduceOp.MAX)
        return x

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision in which `training_step` runs, for forwards that Lightning does not wrap (rollouts)."""
        return self.trainer.precision_plugin.forward_context()

    # ------------------------------------------------------------------------------------------------ optimization

    def normaliser(self, own: Tensor | int, share: float) -> Tensor | float:
        """What a micro-batch divides its summed loss by (D14).

        Args:
            own: number of real tokens (pairs) in this micro-batch.
            share: their average number per micro-batch of the global batch, over accumulation and ranks.
        """
        return share if self.optimization.loss_reduction == "minibatch" else max(int(own), 1)

    @property
    def learning_rate(self) -> float:
        """Returns the current learning rate: the highest of all groups, as one may be held at 0."""
        return max(group["lr"] for group in self.trainer.optimizers[0].param_groups)

    def log_learning_rate(self) -> None:
        """A point of the curve `lr`."""
        self.log("lr", self.learning_rate, batch_size=1)

    def total_schedule_steps(self) -> int:
        """How often the schedule steps: optimizer steps, or PPO updates."""
        if self.schedule_interval == "epoch":
            return max(1, self.trainer.max_epochs or 1)
        return int(self.trainer.estimated_stepping_batches)

    def parameter_groups(self) -> list[list[nn.Parameter]]:
        """Lists every parameter that is trained, in groups that the optimizer can treat apart."""
        return [[p for p in self.parameters() if p.requires_grad]]

    def configure_optimizers(self) -> Any:
        """AdamW over every parameter that is trained, with the schedule of `Optimization`."""
        from transformers import get_scheduler

        o = self.optimization
        optimizer = torch.optim.AdamW(
            [{"params": group} for group in self.parameter_groups()],
            lr=o.learning_rate,
            eps=o.eps,
            weight_decay=o.weight_decay,
            fused=self.trainer.precision != "16-mixed",  # whose scaler and clipping want the gradients themselves
        )
        name = "constant_with_warmup" if o.schedule == "constant" else o.schedule
        scheduler = get_scheduler(name, optimizer, o.warmup_steps, self.total_schedule_steps())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": self.schedule_interval}}

    def configure_callbacks(self) -> list[Any]:
        """Callbacks that every stage has; one of the same class in `trainer.callbacks` takes its place."""
        return self.unless_given(DisableDropout(), Invariants())

    def unless_given(self, *callbacks: Any) -> list[Any]:
        """Those callbacks that the Trainer does not have already."""
        return unless_given(getattr(self.trainer, "callbacks", ()), *callbacks)

    @property
    def seed(self) -> int:
        """The seed of the run."""
        return shared_seed()
