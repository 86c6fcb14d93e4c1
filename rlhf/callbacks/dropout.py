"""Dropout off, enforced and verified (D10)."""

from collections.abc import Iterator

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from typing_extensions import override

from rlhf.errors import UserError

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
    ids = torch.ones(1, 16, dtype=torch.long, device=device)
    was_training = {m: m.training for m in model.modules()}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        before = _random_state(device)
        model.train()
        try:
            with torch.no_grad():
                model(ids, attention_mask=torch.ones_like(ids))
        finally:
            for module, training in was_training.items():
                module.training = training
        return not torch.equal(before, _random_state(device))


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
    """Switches all dropout off before training, and proves that none is left."""

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if found := disable_dropout(pl_module):
            rank_zero_info(f"Dropout: switched off in {found} places.")
        for network in _networks(pl_module):
            if draws_random_numbers(network):
                raise UserError(
                    f"{type(network).__name__} still draws random numbers in a training forward after all known "
                    "dropout was set to 0; log-probabilities would not be reproducible. Set its dropout to 0 in its "
                    "config.json."
                )
