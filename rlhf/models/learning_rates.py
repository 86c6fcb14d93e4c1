"""The learning rate that is usual for a model of some size."""

LOWEST, HIGHEST = 0.1, 30.0  # times the proposed one: what counts as usual


OF_ADAPTERS = 10  # times that of all weights (Schulman et al. 2025, "LoRA Without Regret")


def proposed_learning_rate(parameters: int, adapters: bool = False) -> float:
    """Proposes a learning rate of AdamW for SFT, reward model and PPO of a model with so many parameters.

    A rule of thumb: 3e-6 from a billion parameters on, the paper's for Pythia 1B, 2.8B and 6.9B; below,
    3e-6 · (1e9 / parameters)^0.62, a power law from there to this project's quickstart, which was tuned by hand (5e-4
    at a quarter of a million). Nothing in between was tuned, so what counts as usual is a wide range.

    Args:
        parameters: of the whole model.
        adapters: whether adapters are trained in place of its weights.
    """
    rate = 3e-6 * max(1.0, 1e9 / parameters) ** 0.62
    return float(f"{rate * (OF_ADAPTERS if adapters else 1):.1e}")


def is_usual(learning_rate: float, parameters: int, adapters: bool = False) -> bool:
    """Tells whether a learning rate is at all near to those that are used for models of this size."""
    return LOWEST <= learning_rate / proposed_learning_rate(parameters, adapters) <= HIGHEST
