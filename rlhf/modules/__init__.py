"""The three stages as LightningModules."""

from rlhf.modules.ppo import PPOModule
from rlhf.modules.reward import RewardModule
from rlhf.modules.settings import Optimization, PPOSettings
from rlhf.modules.sft import SFTModule
from rlhf.modules.stage_module import StageModule

__all__ = ["Optimization", "PPOModule", "PPOSettings", "RewardModule", "SFTModule", "StageModule"]
