"""The mathematics of RLHF with PPO: pure functions on tensors. Imports torch and nothing else."""
