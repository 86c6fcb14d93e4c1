"""RLHF with PPO, reproduced exactly: SFT, reward model and PPO on Hugging Face models with PyTorch Lightning."""

__version__ = "0.1.0"
