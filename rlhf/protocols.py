"""What DataModules, modules and callbacks want of each other. The Trainer hands all of them around untyped."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from lightning.pytorch import LightningModule, Trainer
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from rlhf.models.adapters import LoRA
    from rlhf.models.frozen import FrozenModel, Placement
    from rlhf.ops.kl_control import KLControl
    from rlhf.sampling.rollout import Rollout


class Stage(Protocol):
    """The module of a stage, as DataModules and callbacks see it; `StageModule` documents the members."""

    model_path: str
    tokenizer: PreTrainedTokenizerBase
    model_config: PreTrainedConfig
    activation_checkpointing: bool
    lora: LoRA | None
    quantization: Literal["nf4", "int8"] | None

    @property
    def kind(self) -> Literal["sft", "reward", "dpo", "ppo"]: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def seed(self) -> int: ...
    @property
    def response_room(self) -> int: ...
    @property
    def embedding_rows(self) -> int: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def frozen_models(self) -> list[FrozenModel[Any]]: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...
    def log(self, *args: Any, **kwargs: Any) -> None: ...
    def log_dict(self, *args: Any, **kwargs: Any) -> None: ...
    def reduce_sum(self, x: Tensor) -> Tensor: ...
    def reduce_max(self, x: Tensor) -> Tensor: ...
    def total_schedule_steps(self) -> int: ...
    def parameter_groups(self) -> list[list[nn.Parameter]]: ...
    def row_losses(self, batch: Any) -> Tensor | None: ...
    def padding_side_difference(self, batch: Any) -> Tensor | None: ...
    def demonstration_rewards(self) -> Tensor | None: ...
    def prepare_export(self) -> None: ...
    def save_export(self, folder: Path) -> None: ...


class UpdateSettings(Protocol):
    """The settings of PPO that decide what an update looks like; `PPOSettings` documents them."""

    @property
    def response_length(self) -> int: ...
    @property
    def ppo_epochs(self) -> int: ...
    @property
    def minibatches(self) -> int: ...
    @property
    def samples_per_prompt(self) -> int: ...
    @property
    def has_critic(self) -> bool: ...
    @property
    def missing_eos_score(self) -> float | None: ...
    @property
    def temperature(self) -> float: ...
    @property
    def vllm_cache_gib(self) -> float: ...
    @property
    def kl_target(self) -> float | None: ...
    @property
    def kl_horizon(self) -> int: ...


class PPOStage(Stage, Protocol):
    """The module of PPO, as its DataModule and callbacks see it; `PPOModule` documents the members."""

    reference_path: str
    reward_path: str | None
    kl_control: KLControl
    ratio_deviation: Tensor
    seconds: dict[str, float]
    sampler: str

    @property
    def ppo(self) -> UpdateSettings: ...
    @property
    def placements(self) -> tuple[Placement, Placement]: ...
    @property
    def starts_at_reference(self) -> bool: ...
    @property
    def critic_starts_at_reward(self) -> bool: ...
    def rollout(self, batch: dict[str, Any], update: int) -> Rollout: ...


class StageData(Protocol):
    """The DataModule of a stage, as modules and callbacks see it; `StageDataModule` documents the members."""

    batch_size: int
    splits: dict[str, Any]

    def demonstration_dataloader(self) -> Iterable[dict[str, Any]] | None: ...


class PairData(StageData, Protocol):
    """The DataModule of comparisons, as DPO sees it."""

    def batches_of(self, split: str) -> Iterator[dict[str, Any]]: ...


class RolloutData(StageData, Protocol):
    """The DataModule of PPO, as its module and callbacks see it."""

    last_rollout: Rollout
    last_prompts: list[int]


def stage(owner: Trainer | LightningModule) -> Stage:
    """Returns the module of a stage, or the one that a Trainer trains."""
    return cast(Stage, getattr(owner, "lightning_module", owner))


def ppo_stage(owner: Trainer | LightningModule) -> PPOStage:
    """Returns the module of PPO, or the one that a Trainer trains."""
    return cast(PPOStage, getattr(owner, "lightning_module", owner))


def has_critic(module: Stage) -> bool:
    """Tells whether a module trains a critic, too."""
    return module.kind == "ppo" and cast(PPOStage, module).ppo.has_critic


def stage_data(trainer: Trainer) -> StageData:
    """Returns the DataModule of a Trainer."""
    return trainer.datamodule  # type: ignore[attr-defined]


def pair_data(trainer: Trainer) -> PairData:
    """Returns the DataModule of a Trainer that learns from comparisons."""
    return trainer.datamodule  # type: ignore[attr-defined]


def rollout_data(trainer: Trainer) -> RolloutData:
    """Returns the DataModule of a Trainer that runs PPO."""
    return trainer.datamodule  # type: ignore[attr-defined]
