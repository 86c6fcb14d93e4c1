"""The classes of reward models: transformers' own where it has a fitting one, else one made of the type's parts."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import nn

from rlhf.models.causality import backbone_of
from rlhf.models.loading import load_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

AUTO_CLASS = "AutoModelForSequenceClassification"

_ready: set[type] = set()  # classes of configurations whose reward models are known to fit


def register_reward_model(path: str) -> None:
    """Lets transformers' `AutoModelForSequenceClassification` load a reward model that was trained here.

    Only types for which transformers has no fitting class need it (docs/models.md).

    Args:
        path: the folder of an export, or a name on the hub.
    """
    register_classifier(load_config(path, "path"))


def classifier_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Returns the configuration of a reward model with the backbone of a language model: a copy with one label."""
    labelled = copy.deepcopy(config)
    labelled.num_labels = 1
    register_classifier(labelled)
    return labelled


def register_classifier(config: PreTrainedConfig) -> None:
    """Gives `AutoModelForSequenceClassification` a class for a type of language model, if it has no fitting one.

    A fitting class has a linear head named `score`, which transformers' own do nearly always. The class that is made
    has one too, on the last hidden states, and its weights have the names that they have in the language model.
    """
    from transformers import AutoModelForSequenceClassification

    if type(config) in _ready:
        return
    try:
        with torch.device("meta"):
            fits = isinstance(getattr(AutoModelForSequenceClassification.from_config(config), "score", None), nn.Linear)
    except ValueError:  # there is none
        fits = False
    if not fits:
        AutoModelForSequenceClassification.register(type(config), _new_class(config), exist_ok=True)
    _ready.add(type(config))


def _new_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Makes a class of what all types of transformers have: its generic classifier, and the type's base class."""
    from transformers import AutoModelForCausalLM, PreTrainedModel
    from transformers.modeling_layers import GenericForSequenceClassification

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    backbone = backbone_of(model)
    name = next(name for name, child in model.named_children() if child is backbone)
    parent = next(c for c in type(model).__mro__ if isinstance(backbone, c) and issubclass(c, PreTrainedModel))
    title = parent.__name__.removesuffix("PreTrainedModel") + "ForSequenceClassification"
    # transformers reads the module of a class to learn what it supports, so the new one belongs to that of its type.
    members = {"base_model_prefix": name, "config_class": type(config), "__module__": parent.__module__}
    return type(title, (GenericForSequenceClassification, parent), members)
