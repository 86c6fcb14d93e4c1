"""Seeds: shared by all ranks, or one per rank and update for numbers that must differ (D12)."""

import os

import numpy as np
import torch

DEFAULT_SEED = 44413  # the seed of a run if neither its config nor the command line names one


def shared_seed() -> int:
    """Returns the seed of the run as set by Lightning's `seed_everything`; 0 if it was never called."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))


def _sequence(*parts: int) -> np.random.SeedSequence:
    return np.random.SeedSequence((len(parts), *parts))  # with the length: numpy pads with zeros


def derive_seed(*parts: int) -> int:
    """Derives one seed from several numbers, for example (seed, update, rank); nearby numbers give unrelated seeds."""
    return int(_sequence(*parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator(device: torch.device | str, *parts: int) -> torch.Generator:
    """Creates a random generator on a device, seeded from the shared seed and `parts`."""
    return torch.Generator(device).manual_seed(derive_seed(shared_seed(), *parts))


def permutation(n: int, *parts: int) -> list[int]:
    """Shuffles `range(n)` from the shared seed and `parts`, the same on every rank."""
    return np.random.default_rng(_sequence(shared_seed(), *parts)).permutation(n).tolist()
