"""Direct preference optimisation (DPO): the policy learns from comparisons, without a reward model."""

from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from rich.progress import track
from torch import Tensor
from typing_extensions import override

from rlhf.data.loaders import host_masks
from rlhf.data.stage_data import NEWS
from rlhf.hardware import sent
from rlhf.models.adapters import LoRA
from rlhf.models.loading import check_language_model, checkpoint_activations
from rlhf.models.output_layer import next_token_logprobs
from rlhf.models.quantization import Quantization
from rlhf.models.saving import save_pretrained
from rlhf.models.tokenizers import check_pad_in_embedding, check_reference
from rlhf.modules.pairs import PairModule
from rlhf.modules.ppo_models import REFERENCE, load_reference
from rlhf.modules.settings import DPOSettings, Optimization
from rlhf.ops.losses import dpo_losses, ipo_losses
from rlhf.protocols import pair_data


class DPOModule(PairModule):
    """Trains a policy on comparisons.

    Args:
        model_path: the SFT model that it starts from; a folder or a hub name.
        reference_path: the reference policy, by default `model_path`. Its log-probabilities are computed once, before
            the first step; it is not in memory after that.
        dpo: the details of DPO.
        optimization: learning rate, schedule, loss reduction.
        pad_token: token to pad with; by default the tokenizer's own.
        eos_tokens: tokens that end a response, the first one behind demonstrations; by default the tokenizer's own and
            those of the model's `generation_config.json`.
        activation_checkpointing: compute activations again in the backward pass instead of keeping them.
        lora: train adapters only, and leave all other weights as they are (`rlhf.models.adapters.LoRA`).
        quantization: with `lora`, store the matrices of the base in 4 bits (`nf4`) or 8 (`int8`), by bitsandbytes.
    """

    kind = "dpo"

    def __init__(
        self,
        model_path: str,
        reference_path: str | None = None,
        dpo: DPOSettings = DPOSettings(),
        optimization: Optimization = Optimization(),
        pad_token: str | None = None,
        eos_tokens: list[str] | None = None,
        activation_checkpointing: bool = False,
        lora: LoRA | None = None,
        quantization: Quantization | None = None,
    ) -> None:
        super().__init__(model_path, optimization, pad_token, activation_checkpointing, eos_tokens, lora, quantization)
        self.reference_path, self.dpo = reference_path or model_path, dpo
        check_language_model(model_path, "model.model_path")
        if self.reference_path != model_path:
            check_reference(self.reference_path, REFERENCE, self.tokenizer)
        check_pad_in_embedding(self.tokenizer, self.model_config, model_path)
        self.reference_batches: int | None = None  # that are read of each split, if no more will be used
        self.reference_logprobs: dict[str, Tensor] = {}  # split -> of the chosen and rejected response of each pair
        self.model: Any = None

    @override
    def configure_model(self) -> None:
        if self.model is None:
            self.model = self.networks.language_model(self.model_path, "model.model_path", trained=True)
            if self.activation_checkpointing:
                checkpoint_activations(self.model)

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.reference_logprobs = {}  # other data may have come

    @override
    def on_fit_start(self) -> None:
        names = [name for name in self._needed() if name not in self.reference_logprobs]
        if not names:
            return
        rank_zero_info(f"Reference: {self.reference_path} reads the pairs of {' and '.join(names)} once.")
        frozen = load_reference(self.networks, self.reference_path, "device", self.half_precision)
        with frozen.on(self.device) as reference:
            self.reference_logprobs |= {name: self._read(reference, name) for name in names}

    def _needed(self) -> list[str]:
        """Lists the splits whose pairs are read next."""
        splits, trainer = pair_data(self.trainer).splits, self.trainer
        measured = ["validation"] if trainer.state.fn == "validate" or "test" not in splits else ["test"]
        if trainer.state.fn == "fit":
            measured = ["train", *(["validation"] if trainer.limit_val_batches else [])]
        return [name for part in measured for name in (part, part + NEWS) if len(splits.get(name, ()))]

    def _limit(self, split: str) -> int | None:
        """Returns how many batches of a split are used; None: all."""
        trainer = self.trainer
        if self.reference_batches is not None:
            return self.reference_batches
        if split == "train":  # every epoch has another order
            limit = trainer.limit_train_batches if trainer.max_epochs == 1 else None
        else:
            limits = {"test": trainer.limit_test_batches, "predict": trainer.limit_predict_batches}
            limit = limits.get(str(trainer.state.fn), trainer.limit_val_batches)
        return limit if isinstance(limit, int) else None

    @torch.no_grad()
    def _read(self, reference: Any, split: str) -> Tensor:
        """Computes the log-probabilities of the reference for every pair of a split, `(rows, 2)`."""
        data, silent = pair_data(self.trainer), self.global_rank > 0
        table = torch.zeros(len(data.splits[split]), 2, device=self.device)
        batches = islice(data.batches_of(split), self._limit(split))
        for batch in track(batches, f"Reference ({split})", transient=True, disable=silent):
            if batch.get("rows", True):  # else it counts for nothing, and its pair is in another process's batch
                with self.autocast():
                    table[batch["indices"]] = self.response_logprobs(reference, batch).view(2, -1).T
        return self.reduce_sum(table)

    on_validation_start = on_test_start = on_predict_start = on_fit_start

    def response_logprobs(self, model: Any, batch: dict[str, Any]) -> Tensor:
        """Computes the log-probability of each response, `(2B,)`: a sum over its tokens, or their mean."""
        host = host_masks(batch)
        logprobs = next_token_logprobs(model, batch["input_ids"], host["attention_mask"], host["response_mask"]).sum(1)
        return logprobs / batch["response_mask"].sum(1) if self.dpo.length_normalised else logprobs

    @override
    def scores(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Computes the implicit rewards, `beta x log(policy / reference)`, `(B,)` each, in one forward."""
        rows = sent(torch.tensor(batch["indices"], device="cpu"), self.device)
        reference = self.reference_logprobs[batch["split"]][rows].T.flatten()
        rewards = self.dpo.beta * (self.response_logprobs(self.model, batch) - reference)
        chosen, rejected = rewards.chunk(2)
        return chosen, rejected

    @override
    def pair_losses(self, chosen: Tensor, rejected: Tensor, batch: dict[str, Any]) -> Tensor:
        if self.dpo.loss == "ipo":
            return ipo_losses(chosen - rejected, self.dpo.beta)
        return dpo_losses(chosen - rejected, self.dpo.label_smoothing)

    @override
    def save_export(self, folder: Path) -> None:
        save_pretrained(self.model, self.tokenizer, folder)
