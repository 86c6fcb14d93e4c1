"""Supervised fine-tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from rlhf.callbacks.sample_table import SampleTable
from rlhf.checks import above, at_least
from rlhf.hardware import accumulator_dtype
from rlhf.models.loading import (
    check_language_model,
    check_pad_in_embedding,
    checkpoint_activations,
    embedding_rows,
    load_causal_lm,
    save_pretrained,
)
from rlhf.models.output_layer import logprobs_at
from rlhf.modules.settings import Optimization
from rlhf.modules.stage_module import StageModule
from rlhf.ops.losses import masked_total
from rlhf.ops.masking import masked_mean
from rlhf.rouge import ROUGE, rouge
from rlhf.sampling.sampler import sample, uniforms
from rlhf.seeding import generator


class SFTModule(StageModule):
    """Fine-tunes a causal language model on demonstrations.

    Args:
        model_path: the base model; a folder or a hub name.
        loss_on: `all` takes the cross-entropy on query and response alike, as the paper does (D15); `response` on the
            response only.
        response_length: longest sample in validation, in tokens.
        temperature: of the samples in validation (D16).
        optimization: learning rate, schedule, loss reduction.
        pad_token: token to pad with; by default the tokenizer's own, or `[PAD]`.
        resize_embeddings: add rows to the embedding when PAD has none. The paper does not need it.
        activation_checkpointing: compute activations again in the backward pass instead of keeping them.
    """

    kind = "sft"

    def __init__(
        self,
        model_path: str,
        loss_on: Literal["all", "response"] = "all",
        response_length: int = 53,
        temperature: float = 0.01,
        optimization: Optimization = Optimization(),
        pad_token: str | None = None,
        resize_embeddings: bool = False,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__(model_path, optimization, pad_token, activation_checkpointing)
        self.loss_on = loss_on
        self.response_length = response_length
        self.temperature = temperature
        self.resize_embeddings = resize_embeddings
        at_least("model.response_length", response_length, 1)
        above("model.temperature", temperature, 0)
        check_language_model(self.model_config, model_path, "model.model_path")
        if not resize_embeddings:
            check_pad_in_embedding(self.tokenizer, embedding_rows(self.model_config), model_path)
        self.model: Any = None

    @property
    def response_room(self) -> int:
        """Samples of validation."""
        return self.response_length

    def configure_model(self) -> None:
        """Load the model, once."""
        if self.model is not None:
            return
        model: Any = load_causal_lm(self.model_path, dtype=self.weights_dtype)
        self.model = model.to(self.weights_device)
        if self.resize_embeddings and len(self.tokenizer) > self.model.get_input_embeddings().num_embeddings:
            self.model.resize_token_embeddings(len(self.tokenizer))
        if self.activation_checkpointing:
            checkpoint_activations(self.model)

    # ---------------------------------------------------------------------------------------------------- training

    def token_losses(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Cross-entropy per predicted token and which of them count, `(B, T - 1)` each; 0 where they do not.

        Override this for another language-model loss.

        Args:
            batch: `input_ids`, `attention_mask`, `loss_mask`, all `(B, T)` with padding on the right.
        """
        ids, mask = batch["input_ids"], batch["loss_mask"][:, 1:].bool()
        places = mask.nonzero(as_tuple=True)
        logprobs, _ = logprobs_at(self.model, ids, batch["attention_mask"], places, ids[:, 1:][places])
        return logprobs.new_zeros(mask.shape).index_put(places, -logprobs), mask

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The loss of one micro-batch."""
        self.log_learning_rate()
        losses, mask = self.token_losses(batch)
        tokens = mask.sum()
        mean = masked_mean(losses.detach(), mask)
        self.log("loss/sft", mean, on_step=False, on_epoch=True, batch_size=int(tokens), sync_dist=True)
        self.log("loss/sft_step", mean, prog_bar=True, batch_size=int(tokens))
        return masked_total(losses, mask, self.normaliser(tokens, batch["share"]))

    # -------------------------------------------------------------------------------------------------- evaluation

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Loss, and ROUGE of samples against the references, over the whole split (D16); returns the `samples`."""
        return self._evaluate(batch, batch_idx, "validation")

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """As validation, on the test split."""
        return self._evaluate(batch, batch_idx, "test")

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, Any]]:
        """A sample for every query."""
        responses = self.respond(batch, batch_idx)
        rows = zip(batch["query"], responses, batch["reference"], strict=True)
        return [{"query": q, "response": r, "reference": t} for q, r, t in rows]

    def configure_callbacks(self) -> list[Any]:
        """With tables of samples."""
        return super().configure_callbacks() + self.unless_given(SampleTable())

    def respond(self, batch: dict[str, Any], batch_idx: int) -> list[str]:
        """Texts sampled for the left-padded `queries (B, P)` of a batch."""
        queries, random = batch["queries"], generator(self.device, self.global_rank, batch_idx)
        with self.autocast():
            responses = sample(
                self.model,
                queries,
                batch["query_mask"],
                uniforms(len(queries), self.response_length, random),
                temperature=self.temperature,
                eos_id=self.tokenizer.eos_token_id,
                pad_id=self.tokenizer.pad_token_id,
            )
        return self.tokenizer.batch_decode(responses, skip_special_tokens=True)

    def on_validation_start(self) -> None:
        """Start a new split."""
        self._rouge = torch.zeros(len(ROUGE) + 1, device=self.device, dtype=accumulator_dtype(self.device))

    on_test_start = on_validation_start

    def on_validation_epoch_end(self) -> None:
        """Log ROUGE-1, ROUGE-2 and ROUGE-L of the whole split."""
        self._log_rouge("validation")

    def on_test_epoch_end(self) -> None:
        """Log ROUGE-1, ROUGE-2 and ROUGE-L of the whole split."""
        self._log_rouge("test")

    def _evaluate(self, batch: dict[str, Any], batch_idx: int, split: str) -> dict[str, Any]:
        losses, mask = self.token_losses(batch)
        tokens = mask.sum()
        mean = masked_mean(losses, mask)
        self.log(f"{split}/loss", mean, batch_size=int(tokens), sync_dist=True, prog_bar=True)
        samples = self.predict_step(batch, batch_idx)
        scores = rouge([s["response"] for s in samples], [s["reference"] for s in samples])
        sums = [scores[name] * len(samples) for name in ROUGE]
        self._rouge += torch.tensor([*sums, len(samples)], device=self.device, dtype=accumulator_dtype(self.device))
        return {"samples": samples}

    def _log_rouge(self, split: str) -> None:
        *sums, rows = self.reduce_sum(self._rouge).tolist()
        for name, total in zip(ROUGE, sums, strict=True):
            self.log(f"{split}/{name}", total / max(rows, 1), sync_dist=True)

    # ------------------------------------------------------------------------------------------------------ export

    def save_export(self, folder: Path) -> None:
        """The language model and its tokenizer."""
        save_pretrained(self.model, self.tokenizer, folder)
