"""The arguments that the forward of a model names."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from torch import nn


def accepted(model: nn.Module, **inputs: Any) -> dict[str, Any]:
    """Leaves out the inputs that the forward of a model does not name; what takes any names gets all of them."""
    names = forward_arguments(model)
    return {name: value for name, value in inputs.items() if name in names} if "input_ids" in names else inputs


def forward_arguments(model: nn.Module) -> frozenset[str]:
    """Returns the names of the arguments of a model's forward."""
    return _names(type(model).forward)


@lru_cache
def _names(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)
