"""The stages as LightningModules."""

from rlhf.modules.dpo import DPOModule
from rlhf.modules.ppo import PPOModule
from rlhf.modules.reward import RewardModule
from rlhf.modules.settings import DPOSettings, Optimization, PPOSettings
from rlhf.modules.sft import SFTModule
from rlhf.modules.stage_module import StageModule

__all__ = [
    "DPOModule",
    "DPOSettings",
    "Optimization",
    "PPOModule",
    "PPOSettings",
    "RewardModule",
    "SFTModule",
    "StageModule",
]
