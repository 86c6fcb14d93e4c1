"""The reward model."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from rlhf.data.loaders import host_masks
from rlhf.errors import NonNegative
from rlhf.models.adapters import LoRA
from rlhf.models.classifiers import register_classifier
from rlhf.models.loading import checkpoint_activations
from rlhf.models.quantization import Quantization
from rlhf.models.tokenizers import check_pad_in_embedding
from rlhf.modules.pairs import PairModule
from rlhf.modules.settings import Optimization
from rlhf.ops.losses import pairwise_losses
from rlhf.protocols import stage_data


class RewardModule(PairModule):
    """Trains a reward model on comparisons.

    Args:
        model_path: the SFT model that it starts from (D17); a folder or a hub name.
        centering: weight of `(r_chosen + r_rejected)^2` in the loss (Eisenstein et al. 2023, arXiv 2312.09244), which
            keeps the rewards of different queries at one level; the pairwise loss alone does not. The paper has none.
        optimization: learning rate, schedule, loss reduction.
        pad_token: token to pad with; by default the tokenizer's own.
        eos_tokens: tokens that end a response, the first one behind demonstrations; by default the tokenizer's own and
            those of the model's `generation_config.json`.
        activation_checkpointing: compute activations again in the backward pass instead of keeping them.
        lora: train adapters only, and leave all other weights as they are (`rlhf.models.adapters.LoRA`).
        quantization: with `lora`, store the matrices of the base in 4 bits (`nf4`) or 8 (`int8`), by bitsandbytes.
    """

    kind = "reward"

    def __init__(
        self,
        model_path: str,
        centering: NonNegative = 0.0,
        optimization: Optimization = Optimization(),
        pad_token: str | None = None,
        eos_tokens: list[str] | None = None,
        activation_checkpointing: bool = False,
        lora: LoRA | None = None,
        quantization: Quantization | None = None,
    ) -> None:
        super().__init__(model_path, optimization, pad_token, activation_checkpointing, eos_tokens, lora, quantization)
        self.centering = centering
        check_pad_in_embedding(self.tokenizer, self.model_config, model_path)
        register_classifier(self.model_config, "model.model_path")  # refuses types of which there is no reward model
        self.centre: Tensor | None = None  # mean reward of the demonstrations, known at the export
        self.model: Any = None

    @override
    def configure_model(self) -> None:
        if self.model is not None:
            return
        self.model = self.networks.scalar_model(self.model_path, "model.model_path", trained=True)
        if self.activation_checkpointing:
            checkpoint_activations(self.model.model)

    @override
    def scores(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        chosen, rejected = self.model.score(batch["input_ids"], host_masks(batch)["attention_mask"]).chunk(2)
        return chosen, rejected

    @override
    def pair_losses(self, chosen: Tensor, rejected: Tensor, batch: dict[str, Any]) -> Tensor:
        return pairwise_losses(chosen, rejected) + self.centering * (chosen + rejected) ** 2

    @override
    def validation_losses(self, chosen: Tensor, rejected: Tensor, batch: dict[str, Any]) -> Tensor:
        return pairwise_losses(chosen, rejected)

    @override
    def padding_side_difference(self, batch: dict[str, Any]) -> Tensor:
        with self.autocast():
            return self.model.padding_side_difference(batch["input_ids"], batch["attention_mask"])

    def mean_demonstration_reward(self) -> Tensor | None:
        """Computes the mean reward of all demonstrations over all ranks; None if the DataModule has none."""
        scores = self._score_demonstrations()
        if scores is None:
            return None
        total, count = self.reduce_sum(torch.stack([scores.sum(), scores.new_tensor(len(scores))]))
        return total / count

    @override
    def demonstration_rewards(self) -> Tensor | None:
        if self.centre is None:
            return None
        scores = self._score_demonstrations(limit=256)
        return None if scores is None else scores - self.centre

    def _score_demonstrations(self, limit: int | None = None) -> Tensor | None:
        has_data = hasattr(self.trainer, "datamodule")  # else the user gave the Trainer plain loaders
        batches = stage_data(self.trainer).demonstration_dataloader() if has_data else None
        return None if batches is None else self.score_batches(self.model, batches, limit)

    @override
    def prepare_export(self) -> None:
        self.centre = self.mean_demonstration_reward()
        if self.centre is None:
            rank_zero_warn("The reward is not centred: data.demonstrations is not set.")
        else:
            rank_zero_info(f"Reward centred: demonstrations have a mean reward of {self.centre:.4f}, 0 in the export.")

    @override
    def save_export(self, folder: Path) -> None:
        # The shift is in the export only; training continues without it (D21).
        self.model.save(folder, self.tokenizer, 0.0 if self.centre is None else self.centre.item())
