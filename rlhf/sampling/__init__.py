"""Sampling of responses, and the rollout made of them."""
