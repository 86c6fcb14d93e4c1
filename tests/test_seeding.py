from __future__ import annotations

from itertools import product

import pytest
import torch

from rlhf.seeding import derive_seed, generator, permutation, shared_seed


@pytest.fixture(autouse=True)
def _seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "44413")


def draw(*parts: int) -> list[float]:
    return torch.rand(4, generator=generator("cpu", *parts)).tolist()


def test_shared_seed_is_lightnings(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shared_seed() == 44413
    monkeypatch.delenv("PL_GLOBAL_SEED")
    assert shared_seed() == 0


def test_derived_seeds_are_all_different_and_fit_a_generator() -> None:
    seeds = [derive_seed(*parts) for parts in product((0, 1, 2, 44413), range(8), range(8))]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seeds == [derive_seed(*parts) for parts in product((0, 1, 2, 44413), range(8), range(8))]


@pytest.mark.parametrize(("one", "other"), [((1, 2), (2, 1)), ((1, 2), (1, 2, 0)), ((5,), (5, 0)), ((3, 0), (3,))])
def test_order_and_number_of_parts_matter(one: tuple[int, ...], other: tuple[int, ...]) -> None:
    assert derive_seed(*one) != derive_seed(*other)


def test_generators_differ_by_every_part_and_by_the_shared_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    first = draw(3, 1)
    assert first == draw(3, 1)
    assert first != draw(4, 1)
    assert first != draw(3, 2)
    monkeypatch.setenv("PL_GLOBAL_SEED", "55513")
    assert first != draw(3, 1)


def test_permutations_depend_on_the_shared_seed_and_the_parts_only(monkeypatch: pytest.MonkeyPatch) -> None:
    first = permutation(50, 2, 0)
    torch.manual_seed(5)
    assert sorted(first) == list(range(50))
    assert first == permutation(50, 2, 0)
    assert first != permutation(50, 2, 1)
    assert first != permutation(50, 3, 0)
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    assert first != permutation(50, 2, 0)


def test_global_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    draw(1)
    permutation(10, 1)
    assert torch.equal(before, torch.get_rng_state())
