"""What DataModules, modules and callbacks want of each other. The Trainer hands all of them around untyped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from lightning.pytorch import LightningModule, Trainer
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from rlhf.models.frozen import FrozenModel, Placement
    from rlhf.ops.kl_control import AdaptiveKL, FixedKL
    from rlhf.sampling.rollout import Rollout


class Stage(Protocol):
    """The module of a stage, as DataModules and callbacks see it."""

    kind: Literal["sft", "reward", "ppo"]
    model_path: str
    tokenizer: PreTrainedTokenizerBase
    model_config: PreTrainedConfig
    activation_checkpointing: bool

    @property
    def device(self) -> torch.device:
        """Where it trains."""

    @property
    def seed(self) -> int:
        """The seed of the run."""

    @property
    def response_room(self) -> int:
        """How many tokens the stage may sample after a query."""

    @property
    def learning_rate(self) -> float:
        """The current learning rate."""

    @property
    def frozen_models(self) -> list[FrozenModel[Any]]:
        """Models that are only read."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Iterates over the parameters that are trained."""

    def reduce_sum(self, x: Tensor) -> Tensor:
        """Sums a tensor over all ranks."""

    def reduce_max(self, x: Tensor) -> Tensor:
        """Takes the maximum of a tensor over all ranks, element by element."""

    def total_schedule_steps(self) -> int:
        """Returns how often the learning-rate schedule steps."""

    def padding_side_difference(self, batch: Any) -> Tensor | None:
        """Measures how much rewards depend on the side of the padding."""

    def demonstration_rewards(self) -> Tensor | None:
        """Computes this rank's rewards of some demonstrations."""

    def prepare_export(self) -> None:
        """Does what all ranks must do before an export."""

    def save_export(self, folder: Path) -> None:
        """Writes what the next stage needs."""

    def log(self, name: str, value: Any, **options: Any) -> None:
        """Logs a number, as of `LightningModule.log`."""

    def log_dict(self, dictionary: Mapping[str, Any], **options: Any) -> None:
        """Logs several numbers, as of `LightningModule.log_dict`."""


class UpdateSettings(Protocol):
    """The settings of PPO that decide the shapes of an update."""

    @property
    def response_length(self) -> int:
        """Longest response in tokens."""

    @property
    def ppo_epochs(self) -> int:
        """Passes over each rollout."""

    @property
    def minibatches(self) -> int:
        """Optimizer steps per pass."""

    @property
    def kl_target(self) -> float | None:
        """Target of an adaptive KL coefficient."""

    @property
    def kl_horizon(self) -> int:
        """Episodes over which it adapts."""


class PPOStage(Stage, Protocol):
    """The module of PPO, as its DataModule and callbacks see it."""

    reference_path: str
    reward_path: str | None
    reference_placement: Placement
    reward_placement: Placement
    kl_control: FixedKL | AdaptiveKL
    ratio_deviation: Tensor
    seconds: dict[str, float]

    @property
    def ppo(self) -> UpdateSettings:
        """The details of PPO."""

    @property
    def placements(self) -> tuple[Placement, Placement]:
        """Where reference and reward model are kept."""

    @property
    def starts_at_reference(self) -> bool:
        """Whether policy and reference are the same model before the first update."""

    @property
    def critic_starts_at_reward(self) -> bool:
        """Whether values equal rewards before the first update."""

    def rollout(self, batch: dict[str, Any], update: int) -> Rollout:
        """Collects one batch of experience."""


class StageData(Protocol):
    """The DataModule of a stage, as modules and callbacks see it."""

    batch_size: int
    splits: dict[str, Any]

    def demonstration_dataloader(self) -> Iterable[dict[str, Any]] | None:
        """Iterates over demonstrations, whose mean reward should be 0."""


class RolloutData(StageData, Protocol):
    """The DataModule of PPO, as its module and callbacks see it."""

    last_rollout: Rollout
    last_prompts: list[int]


def stage(owner: Trainer | LightningModule) -> Stage:
    """Returns the module that a Trainer trains, under the type that callbacks and DataModules know."""
    return cast(Stage, getattr(owner, "lightning_module", owner))


def ppo_stage(owner: Trainer | LightningModule) -> PPOStage:
    """Returns the module of PPO that a Trainer trains."""
    return cast(PPOStage, getattr(owner, "lightning_module", owner))


def stage_data(trainer: Trainer) -> StageData:
    """Returns the DataModule of a Trainer."""
    return trainer.datamodule  # type: ignore[attr-defined]


def rollout_data(trainer: Trainer) -> RolloutData:
    """Returns the DataModule of a Trainer that runs PPO."""
    return trainer.datamodule  # type: ignore[attr-defined]
