"""The arguments that the forward of a model names."""

from __future__ import annotations

import inspect
from functools import lru_cache
from typing import Any

from torch import nn


def accepted(model: nn.Module, **inputs: Any) -> dict[str, Any]:
    """Leaves out the inputs that the forward of a model does not name; what takes any names gets all of them."""
    names = forward_arguments(type(model))
    return {name: value for name, value in inputs.items() if name in names} if "input_ids" in names else inputs


@lru_cache
def forward_arguments(model_class: Any) -> frozenset[str]:
    """Returns the names of the arguments of a model's forward."""
    return frozenset(inspect.signature(model_class.forward).parameters)
