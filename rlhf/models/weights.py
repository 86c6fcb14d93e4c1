"""Checks of loaded weights: those that `config.json` describes, all of them, and finite."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from safetensors import safe_open
from torch import Tensor, nn

from rlhf.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


INTEGERS = ("I", "U", "torch.int", "torch.uint", "torch.bool")  # as safetensors and torch name their types


def check_weights(
    model: PreTrainedModel, report: dict[str, set[Any]], path: str, setting: str, new: str | None
) -> None:
    """Refuses weights of another model than `config.json` describes, and those that are no numbers to compute with."""
    modules, base = dict(model.named_modules()), model.base_model_prefix
    missing, left = sorted(set(report["missing_keys"]) - {new}), sorted(report["unexpected_keys"])
    if missing:
        raise UserError(
            f"{setting}: the weights of {path} do not fit its config.json: {len(missing)} are missing, first "
            f"{missing[0]}."
        )
    for name, stored, described in sorted(report["mismatched_keys"]):
        raise UserError(
            f"{setting}: the weights of {path} do not fit its config.json: {name} has the shape {tuple(stored)}, not "
            f"{tuple(described)}."
        )
    used = [name for name in left if _belongs(name, modules) or _belongs(f"{base}.{name}", modules)]
    if used:  # a bias of zeros is none
        stored = ((_places(name, model), read) for name, _, read in _stored(path))
        zeros = [names for names, read in stored if names & {*used} and not (read().is_meta or read().any())]
        used = [name for name in used if not any(name in names for names in zeros)]
    if used:
        raise UserError(
            f"{setting}: the weights of {path} do not fit its config.json, which has no place for {len(used)} of them, "
            f"first {used[0]}."
        )
    if left and new is None:  # a new head takes the place of the output layer
        rank_zero_warn(f"{setting}: {len(left)} weights of {path} belong to no part of the model, first {left[0]}.")
    parameters = dict(model.named_parameters())
    if broken := first_not_finite(parameters.items()):
        raise UserError(f"{setting}: the weights of {path} are not finite: there is NaN or infinity in {broken}.")
    if not getattr(model, "is_quantized", False):
        for name, kind, _ in _stored(path):
            if kind.startswith(INTEGERS) and _places(name, model) & parameters.keys():
                raise UserError(
                    f"{setting}: the weights of {path} are integers, which is no format that can be trained: "
                    f"{name} is {kind}."
                )


def _belongs(name: str, modules: dict[str, nn.Module]) -> bool:
    """Tells whether a weight without a place is of a further layer, or of a module that has other weights."""
    parts = name.split(".")
    for n, part in enumerate(parts):
        layers = modules.get(".".join(parts[:n]))
        if part.isdecimal() and isinstance(layers, nn.ModuleList) and int(part) >= len(layers):
            return True
    owner = modules.get(".".join(parts[:-1]))
    return owner is not None and next(owner.parameters(recurse=False), None) is not None


def first_not_finite(weights: Iterable[tuple[str, Tensor]]) -> str | None:
    """Returns the name of the first weight with NaN or infinity in it. Reads each once, without a copy."""
    for name, weight in weights:
        known = weight.is_floating_point() and weight.numel() and weight.dtype.itemsize > 1
        if known and not torch.stack(torch.aminmax(weight.detach())).isfinite().all():
            return name
    return None


def _places(name: str, model: PreTrainedModel) -> set[str]:
    """Returns the names that a weight of a file may have in the model, after what transformers renames."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [change for change in get_model_conversion_mapping(model) if isinstance(change, WeightRenaming)]
    found, _ = rename_source_key(name, renamings, [])
    return {found, f"{model.base_model_prefix}.{found}"}


def _stored(path: str) -> Iterator[tuple[str, str, Callable[[], Tensor]]]:
    """Yields name and type of every weight in the files of a model, and a function that reads it.

    What files in the format of torch before 1.6 hold is not read: it gives tensors without values.
    """
    from transformers.utils import cached_file

    config = cached_file(os.path.expanduser(path), "config.json")  # of a name on the hub, in the cache
    folder = Path(str(config)).parent
    if found := sorted(folder.glob("*.safetensors")):
        for file in found:
            with safe_open(file, "pt") as stored:
                for name in stored.keys():  # noqa: SIM118
                    yield name, stored.get_slice(name).get_dtype(), partial(stored.get_tensor, name)
        return
    for file in sorted(folder.glob("pytorch_model*.bin")):
        mapped = zipfile.is_zipfile(file)
        tensors = torch.load(file, map_location="cpu" if mapped else "meta", mmap=mapped, weights_only=True)
        yield from ((name, str(x.dtype), partial(x.detach)) for name, x in tensors.items())
