"""Dropout off, enforced and verified (D10)."""

from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from typing_extensions import override

from rlhf.errors import UserError
from rlhf.models.arguments import accepted

_HINTS = ("dropout", "drop_rate", "drop_prob", "pdrop", "layerdrop")


def dropout_places(model: nn.Module) -> Iterator[tuple[object, str]]:
    """Yields objects and their attributes that hold a dropout which is on.

    Dropout hides in three places: `nn.Dropout` modules, probabilities held as plain floats by modules (attention
    layers of GPT-NeoX, Llama, Qwen; `layerdrop` of OPT), and fields of the configuration that are read at run time.
    """
    seen: set[int] = set()
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            yield module, "p"
        for holder in (module, getattr(module, "config", None)):
            if holder is None or id(holder) in seen:
                continue
            seen.add(id(holder))
            for name, value in list(vars(holder).items()):
                if any(hint in name.lower() for hint in _HINTS) and isinstance(value, float) and value > 0:
                    yield holder, name


def disable_dropout(model: nn.Module) -> int:
    """Sets every dropout of a model to 0, and returns in how many places it was on."""
    places = list(dropout_places(model))
    for holder, name in places:
        setattr(holder, name, 0.0)
    return len(places)


def draws_random_numbers(model: nn.Module) -> bool:
    """Tells whether a train-mode forward of a language model or scalar model changes the random state.

    Comparing two forwards would miss small probabilities; a dropout that is on always draws random numbers.
    """
    device = next(model.parameters()).device
    before = _random_state(device)
    return not torch.equal(before, _after_forward(model, device))


def keep_in_evaluation_mode(model: nn.Module) -> int:
    """Keeps the parts of a model that still draw random numbers in evaluation mode, and returns how many there are.

    These are routers of experts: they add noise to their input, or choose experts at random, in training mode only. The
    size of the noise is no use: PhiMoE's `router_jitter_noise` also decides what its router computes in evaluation.
    """
    device = next(model.parameters()).device
    before: list[tuple[torch.Tensor, int]] = []
    found: list[nn.Module] = []

    def enter(*_: Any) -> None:
        before.append((_random_state(device), len(found)))

    def leave(part: nn.Module, *_: Any) -> None:
        state, inside = before.pop()
        if len(found) == inside and not torch.equal(state, _random_state(device)):  # itself, no part of it
            found.append(part)

    hooks = [
        hook
        for part in model.modules()
        for hook in (part.register_forward_pre_hook(enter), part.register_forward_hook(leave))
    ]
    try:
        _after_forward(model, device)
    finally:
        for hook in hooks:
            hook.remove()
    for part in found:
        part.register_forward_pre_hook(_evaluate)
    return len(found)


def _evaluate(part: nn.Module, _: Any) -> None:
    part.training = False  # at every forward: `.train()` of the whole model sets it again


def _after_forward(model: nn.Module, device: torch.device) -> torch.Tensor:
    """Returns the random state after a train-mode forward, and leaves state and modes as they were.

    Attention is computed by its plain formula, which draws only where it drops: a fused kernel may move the state of a
    GPU's generator on without dropout, too.
    """
    ids = torch.ones(1, 16, dtype=torch.long, device=device)
    was_training = {m: m.training for m in model.modules()}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        model.train()
        try:
            with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
                model(**accepted(model, input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False))
        finally:
            for module, training in was_training.items():
                module.training = training
        return _random_state(device)


def _random_state(device: torch.device) -> torch.Tensor:
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    if device.type == "mps":
        states.append(torch.mps.get_rng_state())
    return torch.cat(states)


def _networks(module: nn.Module) -> Iterator[nn.Module]:
    """Yields the outermost transformers models below a module."""
    from transformers import PreTrainedModel

    for child in module.children():
        if isinstance(child, PreTrainedModel):
            yield child
        else:
            yield from _networks(child)


class DisableDropout(Callback):
    """Switches all dropout and other noise off before training, and proves that none is left."""

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if found := disable_dropout(pl_module):
            rank_zero_info(f"Dropout: switched off in {found} places.")
        for network in _networks(pl_module):
            with trainer.precision_plugin.forward_context():
                if draws_random_numbers(network) and (noisy := keep_in_evaluation_mode(network)):
                    rank_zero_info(f"Random routing of experts: {noisy} parts stay in evaluation mode.")
                draws = draws_random_numbers(network)
            if draws:
                raise UserError(
                    f"{type(network).__name__} still draws random numbers in a training forward after all known "
                    "dropout was set to 0; log-probabilities would not be reproducible. Set its dropout to 0 in its "
                    "config.json."
                )
