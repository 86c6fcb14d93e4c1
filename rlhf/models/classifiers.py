"""The classes of reward models: transformers' own where it has a fitting one, else one made of the type's parts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rlhf.errors import UserError
from rlhf.models.library_calls import first_line
from rlhf.models.loading import load_config
from rlhf.models.probes import backbone_of
from rlhf.models.remote_code import trusts_remote_code

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

AUTO_CLASS = "AutoModelForSequenceClassification"

_made: dict[type, bool] = {}  # by the class of a configuration: whether the class of its reward model was made here


def register_reward_model(path: str) -> None:
    """Lets transformers' `AutoModelForSequenceClassification` load a reward model that was trained here.

    Only types for which transformers has no fitting class need it (docs/data.md).

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


def register_classifier(config: PreTrainedConfig, setting: str = "model.model_path") -> bool:
    """Gives `AutoModelForSequenceClassification` a class for a type of language model, if it has no fitting one.

    A fitting class has a linear head named `score`, which transformers' own do nearly always. The class that is made
    has one too, on the last hidden states, and its weights have the names that they have in the language model.

    Returns:
        Whether the class was made here.
    """
    from transformers import AutoModelForSequenceClassification

    if type(config) in _made:
        return _made[type(config)]
    try:
        from_config = AutoModelForSequenceClassification.from_config
        fits = _has_head(partial(from_config, trust_remote_code=trusts_remote_code()), config)
    except ValueError:  # there is none
        fits = False
    if not fits:
        try:
            made = _new_class(config)
            _has_head(made, copy.deepcopy(config))
        except Exception as error:  # whatever the classes of a type do that has other parts
            raise UserError(
                f"{setting}: a model of type {config.model_type} cannot become a reward model or PPO's critic, only "
                f"SFT works with it: {first_line(error)}"
            ) from error
        # Not by `register`: since transformers 5.17 it does nothing for a configuration of transformers' own.
        AutoModelForSequenceClassification._model_mapping._extra_content[type(config)] = made
    _made[type(config)] = not fits
    return not fits


def _has_head(make: Callable[[Any], Any], config: PreTrainedConfig) -> bool:
    with torch.device("meta"):
        return isinstance(getattr(make(config), "score", None), nn.Linear)


def _new_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Makes a class of what all types of transformers have: its generic classifier, and the type's base class."""
    from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel
    from transformers.modeling_layers import GenericForSequenceClassification

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trusts_remote_code())
    backbone = backbone_of(model)
    if type(config) not in AutoModel._model_mapping:  # code of its own; the generic classifier would ask for it
        AutoModel._model_mapping._extra_content[type(config)] = type(backbone)
    name = next(name for name, child in model.named_children() if child is backbone)
    parent = next(c for c in type(model).__mro__ if isinstance(backbone, c) and issubclass(c, PreTrainedModel))
    title = parent.__name__.removesuffix("PreTrainedModel") + "ForSequenceClassification"
    # transformers reads the module of a class to learn what it supports, so the new one belongs to that of its type.
    members = {"base_model_prefix": name, "config_class": type(config), "__module__": parent.__module__}
    members["forward"] = _score_rows
    return type(title, (GenericForSequenceClassification, parent), members)


def _score_rows(self: Any, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> Any:
    # The generic forward asks for a cache in the output, which models with a state of their own do not have.
    from transformers.modeling_outputs import SequenceClassifierOutput

    states = self.base_model(input_ids=input_ids, attention_mask=attention_mask, **inputs).last_hidden_state
    rows, columns = (torch.arange(size, device=input_ids.device) for size in input_ids.shape)
    last = (columns * (input_ids != getattr(self.config, "pad_token_id", None))).argmax(-1)  # some types have none
    return SequenceClassifierOutput(logits=self.score(states[rows, last]))
