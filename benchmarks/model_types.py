"""Makes tiny models of every type of causal language model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import yaml
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

SHAPES = Path(__file__).with_suffix(".yaml")
OTHER_INPUTS = ("vision", "audio", "text", "vq")  # parts of a configuration that wraps a language model
STANDARD_DEVIATION = 0.2  # of all weights: contexts then give clearly different logits


@cache
def model_types() -> tuple[str, ...]:
    """Returns transformers' types of causal language models that read text and nothing else.

    That leaves out encoders (they have a masked language model), encoder-decoders, wrappers around a language model
    that has a type of its own, and second names of a type.
    """
    from transformers.models.auto import modeling_auto as auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    def fits(name: str) -> bool:
        config = CONFIG_MAPPING[name]
        wraps = any(word in part for part in config.sub_configs for word in OTHER_INPUTS)
        return config.model_type == name and not wraps and not getattr(config, "is_encoder_decoder", False)

    others = {*auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, *auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES}
    return tuple(name for name in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in others and fits(name))


def tiny_config(model_type: str) -> PreTrainedConfig:
    """Returns a configuration of a type with a few small layers of every kind that its default has."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[model_type]
    fields = [field.name for field in dataclasses.fields(config_class)]
    shapes = yaml.safe_load(SHAPES.read_text())
    values = {name: value for name, value in shapes["common"].items() if name in fields}
    own = shapes["types"].get(model_type, {})
    layers = own.get("num_hidden_layers", shapes["common"]["num_hidden_layers"])
    for name, kinds in _kinds_of_layers(config_class()):
        values[name] = (kinds * layers)[:layers]
    heads, key_value_heads = (getattr(config_class, f"num_{kind}_heads", None) for kind in ("attention", "key_value"))
    if heads == key_value_heads and "num_key_value_heads" in fields:
        values["num_key_value_heads"] = values["num_attention_heads"]  # those that cannot share key and value heads
    values = {name: value for name, value in {**values, **own}.items() if value != "default"}
    return AutoConfig.for_model(model_type, **values)


def _kinds_of_layers(config: PreTrainedConfig) -> Iterator[tuple[str, list[str]]]:
    """Yields the fields that hold a kind per layer, and the kinds."""
    for name in ("layer_types", "mlp_layer_types", "layers_block_type", "indexer_types"):
        value = getattr(config, name, None) if name in {f.name for f in dataclasses.fields(config)} else None
        if value:
            yield name, list(dict.fromkeys(value))


def tiny_model(model_type: str, seed: int = 0) -> PreTrainedModel:
    """Returns a tiny model of a type with random float32 weights, in evaluation mode. No global state changes."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(model_type), dtype=torch.float32)
        _enlarge(model)
    return model.eval()


@torch.no_grad()
def _enlarge(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and not name.endswith("A_log") and "norm" not in name:
            parameter.normal_(std=STANDARD_DEVIATION)
