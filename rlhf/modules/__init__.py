"""The three stages as LightningModules."""

from rlhf.modules.base import Optimization, StageModule
from rlhf.modules.ppo import PPOModule, PPOSettings
from rlhf.modules.reward import RewardModule
from rlhf.modules.sft import SFTModule

__all__ = ["Optimization", "PPOModule", "PPOSettings", "RewardModule", "SFTModule", "StageModule"]
