"""Callbacks: what is watched and written while a stage runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

C = TypeVar("C")


def unless_given(given: Iterable[object], *defaults: C) -> list[C]:
    """Returns those defaults that no given callback of the same class, or of a subclass, replaces."""
    given = list(given)
    return [d for d in defaults if not any(isinstance(g, type(d)) for g in given)]
