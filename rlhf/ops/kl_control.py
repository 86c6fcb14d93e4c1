"""The coefficient of the KL penalty: fixed, or adapted to a target."""


class FixedKL:
    """Keeps the coefficient as it is (D28)."""

    def __init__(self, coefficient: float) -> None:
        self.coefficient = coefficient

    def update(self, kl: float, episodes: int) -> None:
        """Leaves the coefficient as it is."""


class AdaptiveKL:
    """Steers the KL towards a target with the proportional controller of Ziegler et al. 2019 (arXiv 1909.08593, 2.2).

    After each batch the coefficient is multiplied by `1 + clip(kl / target - 1, -0.2, 0.2) x episodes / horizon`.
    """

    def __init__(self, coefficient: float, target: float, horizon: int) -> None:
        self.coefficient = coefficient
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, episodes: int) -> None:
        """Adapts the coefficient to the mean KL per response, in nats, of a batch."""
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.coefficient *= 1 + error * episodes / self.horizon


def kl_control(coefficient: float, target: float | None, horizon: int) -> FixedKL | AdaptiveKL:
    """Returns a fixed coefficient, or one that adapts if there is a target."""
    return FixedKL(coefficient) if target is None else AdaptiveKL(coefficient, target, horizon)
