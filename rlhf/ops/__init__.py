"""The mathematics of RLHF with PPO: pure functions on tensors.

Shapes are types, which the tests check. B: rows, T: tokens, R: tokens of a response, V: vocabulary, H: hidden size.
"""
