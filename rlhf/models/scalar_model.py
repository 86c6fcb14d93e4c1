"""Reward model and critic: a backbone with a linear head that computes one number per token."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf.errors import UserError
from rlhf.models.adapter_files import adapter_settings
from rlhf.models.adapters import HEAD
from rlhf.models.backbone import hidden_states
from rlhf.models.classifiers import AUTO_CLASS, classifier_config, register_classifier
from rlhf.models.loading import NONE, SHIFT, check_reward_model, from_pretrained, load_config
from rlhf.models.probes import takes_left_padding
from rlhf.models.saving import save_pretrained
from rlhf.ops.sequences import last_real_token, model_inputs, move_padding, right_padded

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


class ScalarModel(nn.Module):
    """A `...ForSequenceClassification` model with one label, read at any token, plus a bias.

    The bias holds the constant shift of the reward (D21). An export has it in `config.json` as `reward_shift`:
    reward = score of the plain `transformers` model - `reward_shift`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        head = getattr(model, "score", None)
        if not isinstance(head, nn.Linear):
            raise UserError(f"{type(model).__name__} has no linear head named `score`, so it cannot be a reward model.")
        self.model = model
        self.bias = nn.Parameter(torch.tensor([-_shift(model.config)]))

    @classmethod
    def from_policy(cls, path: str, seed: int, dtype: torch.dtype = torch.float32) -> ScalarModel:
        """Loads the backbone of a language model and adds a new head."""
        setting = "model.model_path"
        config = classifier_config(load_config(path, setting))
        model = cls(from_pretrained(AUTO_CLASS, path, config, setting, dtype, new=HEAD))
        model.new_head(seed)
        return model

    @classmethod
    def from_pretrained(
        cls, path: str, setting: str, dtype: torch.dtype = torch.float32, options: Mapping[str, Any] = NONE
    ) -> ScalarModel:
        """Loads a trained reward model or critic; `options` are for transformers."""
        config = check_reward_model(path, setting)
        register_classifier(config, setting)
        new = HEAD if adapter_settings(path) else None  # which its adapter has
        return cls(from_pretrained(AUTO_CLASS, path, config, setting, dtype, new, options))

    def own_head(self) -> None:
        """Replaces head and bias by new tensors, which no other model shares, with the old values if there are any."""
        weight, backbone = self.head_weight, next(self.model.base_model.parameters())
        values = torch.empty_like(weight, device=backbone.device) if weight.is_meta else weight.detach().clone()
        head: Any = self.model.score
        head.weight = nn.Parameter(values)
        self.bias = nn.Parameter(self.bias.detach().to(values.device, copy=True))

    @torch.no_grad()
    def set_shift(self, config: PreTrainedConfig) -> None:
        """Takes the constant shift of the reward from a configuration."""
        self.bias.fill_(-_shift(config))

    @torch.no_grad()
    def new_head(self, seed: int) -> None:
        """Draws the weights of the head from N(0, 1 / sqrt(d + 1)), and sets the bias to 0 (D17)."""
        shape, generator = self.head_weight.shape, torch.Generator().manual_seed(seed)
        self.head_weight.copy_(torch.randn(shape, generator=generator, device="cpu") / math.sqrt(shape[1] + 1))
        self.bias.zero_()

    @property
    def head_weight(self) -> Tensor:
        """The weights of the head, `(1, d)`."""
        return self.model.get_parameter(HEAD)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Computes one number per token in float32, `(B, T)`. Padding may be anywhere; its numbers mean nothing."""
        inputs = model_inputs(input_ids, attention_mask)
        return self.read(self.model.base_model(**inputs, use_cache=False).last_hidden_state)

    def read(self, hidden: Tensor) -> Tensor:
        """Applies the head to hidden states in float32, `(..., H) -> (...)`."""
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.float(), self.head_weight.float()).squeeze(-1) + self.bias.float()

    def score(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Computes the reward of each sequence at its last real token (D19), `(B, T) -> (B,)`; padding on any side."""
        ids, mask = right_padded(input_ids, attention_mask)
        rows, last = torch.arange(len(ids), device=mask.device), last_real_token(mask)
        if hasattr(self.head_weight, "ds_id"):  # ZeRO-3 gathers the head in a whole forward only
            return self(ids, mask)[rows, last]
        return self.read(hidden_states(self.model, ids, mask, rows, last))

    @torch.no_grad()
    def padding_side_difference(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Measures the largest difference between rewards with all padding left and all right (D20).

        The unit is the largest reward (at least 1). Eight columns of padding are added, so that every row has some.
        """
        ids, mask = F.pad(input_ids, (0, 8)), F.pad(attention_mask.long(), (0, 8))
        if takes_left_padding(self.model, ids.device):
            left = self(*move_padding(ids, mask, "left"))[:, -1]
        else:  # nothing here pads it on the left; its rows are scored without padding instead
            rows = zip(ids, mask.bool(), strict=True)
            left = torch.cat([self(row[real][None], real[real][None])[:, -1] for row, real in rows])
        right = self.score(ids, mask)
        return (left - right).abs().max() / right.abs().max().clamp(min=1)

    def save(self, folder: Path, tokenizer: PreTrainedTokenizerBase, centre: float = 0.0) -> None:
        """Writes the model for plain `transformers`, with a shift by which the reward `centre` becomes 0."""
        setattr(self.model.config, SHIFT, centre - self.bias.item())
        save_pretrained(self.model, tokenizer, folder)


def _shift(config: PreTrainedConfig) -> float:
    return float(getattr(config, SHIFT, 0.0))
