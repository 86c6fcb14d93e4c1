"""The networks of a stage, from their folders: each with weights of its own, or with adapters on a base they share."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from typing_extensions import override

from rlhf.models.adapter_files import base_name, base_of
from rlhf.models.adapters import LoRA, add_adapter, check_keeps_base, load_adapter, without_weights
from rlhf.models.classifiers import classifier_config
from rlhf.models.half_weights import keep_half, language_model_forward, scalar_forward
from rlhf.models.loading import check_base, is_classifier, load_causal_lm, load_config
from rlhf.models.probes import backbone_of
from rlhf.models.quantization import (
    Quantization,
    beside_weights,
    check_base_storage,
    check_kernels,
    loading_options,
)
from rlhf.models.remote_code import trusts_remote_code
from rlhf.models.scalar_model import ScalarModel

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

M = TypeVar("M", bound=nn.Module)
HOW_STORED = ("is_quantized", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit")  # peft reads them


class Networks:
    """Makes networks whose weights are all trained, or all frozen.

    Args:
        dtype: precision of the weights.
        device: where trained networks are. Frozen ones are in CPU memory.
        seed: of new heads.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device, seed: int) -> None:
        self.dtype, self.device, self.seed = dtype, device, seed

    def language_model(self, path: str, setting: str, trained: bool) -> PreTrainedModel:
        """Makes a policy or reference."""
        self._check_stored(path, setting, trained)
        model: Any = load_causal_lm(path, setting, self.dtype)
        return model.to(self.device) if trained else model

    def _check_stored(self, path: str, setting: str, trained: bool) -> None:
        if trained and base_of(path, setting) == path:  # an adapter makes its base a whole one
            check_base_storage(load_config(path, setting), f"{setting}: {path}", False, None)

    def scalar_model(self, path: str, setting: str, trained: bool) -> ScalarModel:
        """Makes a critic or reward model: from a language model, which gets a new head, or from a reward model."""
        self._check_stored(path, setting, trained)
        if is_classifier(load_config(path, setting)):
            model = ScalarModel.from_pretrained(path, setting, self.dtype)
        else:
            model = ScalarModel.from_policy(path, self.seed, self.dtype)
        return model.to(self.device) if trained else model


class AdaptedNetworks(Networks):
    """Makes networks that train an adapter only. Those with the same base share its weights, which stay frozen.

    Each has modules of its own, so nothing is switched on and off: a reference is the base without the policy's
    adapter, and a critic the base with another one and a head.

    Args:
        dtype: precision of the weights.
        device: where they are.
        seed: of new adapters and heads.
        lora: of the adapters.
        half: the precision of autocast, in which the weights of a base are kept if no number depends on it.
        quantization: of the matrices of bases.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        device: torch.device,
        seed: int,
        lora: LoRA,
        half: torch.dtype | None,
        quantization: Quantization | None = None,
    ) -> None:
        super().__init__(dtype, device, seed)
        self.lora, self.half, self.quantization = lora, half, quantization
        self._bases: dict[str, nn.Module] = {}

    @override
    def language_model(self, path: str, setting: str, trained: bool) -> PreTrainedModel:
        check_keeps_base(path, setting)
        base = check_base(path, setting)
        model = self._on_base(base, setting, load_causal_lm)
        self._adapt(model, path, base, setting, trained)
        if self.half is not None and trained:
            keep_half(model, self.half, language_model_forward(model))
        return model

    @override
    def scalar_model(self, path: str, setting: str, trained: bool) -> ScalarModel:
        check_keeps_base(path, setting)
        base, config = check_base(path, setting), load_config(path, setting)
        if is_classifier(load_config(base, setting)):
            model = self._on_base(base, setting, ScalarModel.from_pretrained)
            model.own_head()
        else:
            model = _with_head(self._on_base(base, setting, load_causal_lm), self.seed)
        model.set_shift(config)
        self._adapt(model.model, path, base, setting, trained, headless=is_classifier(config))
        for part in (model.head_weight, model.bias):
            part.requires_grad_(trained)
        if self.half is not None and trained:
            keep_half(model, self.half, scalar_forward(model))
        return model

    def _on_base(self, base: str, setting: str, load: Callable[..., M]) -> M:
        """Copies the modules of a base, but none of its weights, which are loaded once."""
        key = base_name(base, "the base")
        if key not in self._bases:
            options = self._options(load_config(base, setting), f"{setting}: {base}")
            self._bases[key] = load(base, setting, self.dtype, options).to(self.device).requires_grad_(False)
        model: Any = self._bases[key]
        kept = {id(part): part for part in chain(model.parameters(), model.buffers(), beside_weights(model))}
        return copy.deepcopy(model, kept)

    def _options(self, config: PreTrainedConfig, what: str) -> dict[str, Any]:
        check_base_storage(config, what, True, self.quantization)
        if self.quantization is None:
            return {}
        check_kernels(without_weights(config), self.quantization, self.half or self.dtype, self.device)
        return loading_options(self.quantization, self.device)

    def _adapt(
        self, model: PreTrainedModel, path: str, base: str, setting: str, trained: bool, headless: bool = False
    ) -> None:
        if base != path:
            load_adapter(model, path, setting, trained, headless)
        elif trained:
            add_adapter(model, self.lora, base, self.seed, setting)
        model.to(self.device)  # type: ignore[arg-type]


def _with_head(model: PreTrainedModel, seed: int) -> ScalarModel:
    """Makes a reward model of the backbone of a language model, over the same weights, and a new head."""
    from transformers import AutoModelForSequenceClassification

    backbone: Any = backbone_of(model)
    with torch.device("meta"):
        whole: Any = AutoModelForSequenceClassification.from_config(
            classifier_config(model.config), trust_remote_code=trusts_remote_code()
        )
    name = next(name for name, child in whole.named_children() if child is backbone_of(whole))
    setattr(whole, name, backbone)
    vars(whole).update({key: value for key, value in vars(model).items() if key in HOW_STORED})
    backbone.config.num_labels, whole.config = 1, backbone.config  # one object: it says which attention the layers take
    scalar = ScalarModel(whole)
    scalar.own_head()
    scalar.new_head(seed)
    return scalar
