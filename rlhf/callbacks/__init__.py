"""Callbacks: what is watched and written while a stage runs."""

from collections.abc import Sequence

from lightning.pytorch import Callback


def unless_given(given: Sequence[Callback], *defaults: Callback) -> list[Callback]:
    """Returns those defaults that no given callback of the same class, or of a subclass, replaces."""
    return [d for d in defaults if not any(isinstance(g, type(d)) for g in given)]
