"""The matrices of a model that an adapter can change."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from rlhf.models.probes import backbone_of, plain_precision


def linear_modules(model: nn.Module) -> set[str]:
    """Names the modules that compute a product with a matrix and nothing more, as routers of experts do."""
    from transformers.pytorch_utils import Conv1D

    return {name for name, part in model.named_modules() if isinstance(part, nn.Linear | Conv1D) and _is_product(part)}


@torch.no_grad()
def _is_product(part: Any) -> bool:
    maker = next(c for c in type(part).__mro__ if "forward" in vars(c))
    if not maker.__module__.startswith("transformers."):
        return True
    inner, outer = (part.nx, part.nf) if hasattr(part, "nx") else (part.in_features, part.out_features)
    try:
        found = part(torch.zeros(3, inner, dtype=part.weight.dtype, device=part.weight.device))
    except Exception:  # whatever a module may raise that takes something else
        return False
    return isinstance(found, Tensor) and found.shape == (3, outer)


def tied_modules(model: nn.Module) -> set[str]:
    """Names the modules with weights that other modules have, too: an adapter of one could not be merged into them."""
    owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    parts = model.named_modules()
    return {name for name, part in parts if any(owners[id(p)] > 1 for p in part.parameters(recurse=False))}


def all_linear(model: Any, config: Any) -> set[str]:
    """Names what `all-linear` takes of a model.

    That is neither output layer and head, nor a matrix of several modules, nor one that is read past its module, where
    an adapter would change nothing: such as peft knows, and those that a short forward shows.

    Args:
        config: of peft.
    """
    from peft.tuners.tuners_utils import _check_lora_target_modules_mamba

    output = model.get_output_embeddings()
    chosen = {}
    for name in linear_modules(model) - tied_modules(model):
        part = model.get_submodule(name)
        try:
            _check_lora_target_modules_mamba(config, model, name.rpartition(".")[2])
        except ValueError:
            continue
        if part is not output and part is not getattr(model, "score", None):
            chosen[name] = part
    return {*chosen} - _read_past(model, chosen)


class _Reads(TorchFunctionMode):
    """Notes which parameters functions are called with."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen |= {id(value) for value in tree_leaves((args, kwargs)) if isinstance(value, nn.Parameter)}
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def _read_past(model: Any, parts: dict[str, nn.Module]) -> set[str]:
    """Names the modules that a forward does not call, though it reads their matrices."""
    device = next(model.parameters()).device
    if device.type == "meta":
        return set()
    called: set[nn.Module] = set()
    hooks = [part.register_forward_pre_hook(lambda module, _: called.add(module)) for part in parts.values()]
    try:
        with plain_precision(model), _Reads() as reads:
            backbone_of(model)(input_ids=torch.tensor([[0, 1, 0]], device=device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {name for name, part in parts.items() if part not in called and id(part.weight) in reads.seen}
