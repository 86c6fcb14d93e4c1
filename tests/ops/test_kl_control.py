from __future__ import annotations

import pytest

from rlhf.ops.kl_control import KLControl


@pytest.mark.parametrize("kl", [0.0, 6.0, 1000.0])
def test_fixed_stays(kl: float) -> None:
    control = KLControl(0.05, None, 10_000)
    control.update(kl, 512)
    assert control.coefficient == 0.05


@pytest.mark.parametrize(
    ("kl", "factor"),
    [
        (6.0, 1.0),
        (6.6, 1.00512),
        (5.4, 0.99488),
        (60.0, 1.01024),
        (0.0, 0.98976),
        (-5.0, 0.98976),
        (float("inf"), 1.01024),
    ],
)
def test_adaptive_moves_towards_the_target(kl: float, factor: float) -> None:
    """512 of 10,000 episodes are 0.0512 of a horizon; the relative error ends at 0.2: 1 + 0.2 x 0.0512 = 1.01024."""
    control = KLControl(0.05, target=6.0, horizon=10_000)
    control.update(kl, 512)
    assert control.coefficient == pytest.approx(0.05 * factor, rel=1e-9)


def test_adaptive_updates_compound() -> None:
    control = KLControl(0.1, target=1.0, horizon=100)
    for _ in range(3):
        control.update(2.0, 50)
    assert control.coefficient == pytest.approx(0.1 * 1.1**3)


@pytest.mark.parametrize("start", [0.2, 0.001])
def test_the_loop_settles_at_the_target(start: float) -> None:
    """Where the KL falls as the coefficient grows, here as 0.06 / coefficient, it ends at its target of 6 nats."""
    control = KLControl(start, target=6.0, horizon=10_000)
    for _ in range(1_500):
        control.update(0.06 / control.coefficient, 512)
        assert control.coefficient > 0
    assert control.coefficient == pytest.approx(0.01, rel=1e-6)
