"""The coefficient of the KL penalty: fixed, or adapted to a target."""


class KLControl:
    """Keeps the coefficient as it is, or steers the KL towards a target, if there is one (D28).

    The proportional controller of Ziegler et al. 2019 (arXiv 1909.08593, 2.2) multiplies the coefficient after each
    batch by `1 + clip(kl / target - 1, -0.2, 0.2) x episodes / horizon`.
    """

    def __init__(self, coefficient: float, target: float | None, horizon: int) -> None:
        self.coefficient = coefficient
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, episodes: int) -> None:
        """Adapts the coefficient to the mean KL per response, in nats, of a batch."""
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.coefficient *= 1 + error * episodes / self.horizon
