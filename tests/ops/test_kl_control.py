from __future__ import annotations

import pytest

from rlhf.ops.kl_control import AdaptiveKL, FixedKL


@pytest.mark.parametrize("kl", [0.0, 6.0, 1000.0])
def test_fixed_stays(kl: float) -> None:
    control = FixedKL(0.05)
    control.update(kl, 512)
    assert control.coefficient == 0.05


@pytest.mark.parametrize(
    ("kl", "factor"),
    [
        (6.0, 1.0),
        (6.6, 1 + 0.1 * 0.0512),
        (5.4, 1 - 0.1 * 0.0512),
        (60.0, 1 + 0.2 * 0.0512),
        (0.0, 1 - 0.2 * 0.0512),
        (-5.0, 1 - 0.2 * 0.0512),
    ],
)
def test_adaptive_moves_towards_the_target(kl: float, factor: float) -> None:
    control = AdaptiveKL(0.05, target=6.0, horizon=10_000)
    control.update(kl, 512)
    assert control.coefficient == pytest.approx(0.05 * factor, rel=1e-9)


def test_adaptive_updates_compound() -> None:
    control = AdaptiveKL(0.1, target=1.0, horizon=100)
    for _ in range(3):
        control.update(2.0, 50)
    assert control.coefficient == pytest.approx(0.1 * 1.1**3)
