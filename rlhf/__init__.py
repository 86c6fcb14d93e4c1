"""RLHF with PPO, reproduced exactly: SFT, reward model and PPO on Hugging Face models with PyTorch Lightning.

"(D24)" in a docstring refers to that entry of docs/details.md, the ledger of the details that are reproduced.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf.callbacks.export import Export
    from rlhf.callbacks.invariants import Invariants
    from rlhf.callbacks.last_checkpoint import LastCheckpoint
    from rlhf.data.comparisons import PreferenceDataModule
    from rlhf.data.demonstrations import SFTDataModule
    from rlhf.data.prompts import RolloutDataModule
    from rlhf.data.sources import Source
    from rlhf.data.texts import TextFormat
    from rlhf.models.adapters import LoRA
    from rlhf.models.classifiers import register_reward_model
    from rlhf.modules.dpo import DPOModule
    from rlhf.modules.ppo import PPOModule
    from rlhf.modules.reward import RewardModule
    from rlhf.modules.settings import DPOSettings, Optimization, PPOSettings
    from rlhf.modules.sft import SFTModule
    from rlhf.sampling.rollout import Rollout
    from rlhf.strategies import Zero2Strategy
    from rlhf.studies.pipeline import pipeline

__version__ = "0.9.0"

_HOME = {
    "DPOModule": "modules.dpo",
    "DPOSettings": "modules.settings",
    "Export": "callbacks.export",
    "Invariants": "callbacks.invariants",
    "LastCheckpoint": "callbacks.last_checkpoint",
    "LoRA": "models.adapters",
    "Optimization": "modules.settings",
    "PPOModule": "modules.ppo",
    "PPOSettings": "modules.settings",
    "PreferenceDataModule": "data.comparisons",
    "RewardModule": "modules.reward",
    "Rollout": "sampling.rollout",
    "RolloutDataModule": "data.prompts",
    "SFTDataModule": "data.demonstrations",
    "SFTModule": "modules.sft",
    "Source": "data.sources",
    "TextFormat": "data.texts",
    "Zero2Strategy": "strategies",
    "pipeline": "studies.pipeline",
    "register_reward_model": "models.classifiers",
}
__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    """Imports a public class when it is first used: torch and Lightning take seconds."""
    if name not in _HOME:
        raise AttributeError(f"module 'rlhf' has no attribute {name!r}")
    return getattr(import_module(f"rlhf.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
