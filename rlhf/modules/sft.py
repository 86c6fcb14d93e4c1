"""Supervised fine-tuning."""

from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback
from pydantic import PositiveInt
from torch import Tensor
from typing_extensions import override

from rlhf.callbacks.sample_table import SampleTable
from rlhf.data.loaders import host_masks
from rlhf.errors import Positive, UserError
from rlhf.evaluation.rouge import rouge
from rlhf.models.adapters import LoRA
from rlhf.models.loading import check_language_model, checkpoint_activations
from rlhf.models.output_layer import next_token_logprobs
from rlhf.models.quantization import Quantization
from rlhf.models.saving import save_pretrained
from rlhf.models.tokenizers import check_pad_in_embedding, decode_responses, eos_ids
from rlhf.modules.settings import Optimization
from rlhf.modules.stage_module import StageModule
from rlhf.ops.losses import masked_total
from rlhf.ops.masking import masked_mean
from rlhf.ops.sequences import response_lengths
from rlhf.sampling.sampler import Decoding, sample, uniforms
from rlhf.seeding import generator


class SFTModule(StageModule):
    """Fine-tunes a causal language model on demonstrations.

    Args:
        model_path: the base model; a folder or a hub name.
        loss_on: `all` takes the cross-entropy of query and response alike, as the paper does (D15); `response` that of
            the response only. Conversations have `assistant_turns` instead.
        assistant_turns: the turns of a conversation that the loss is on: the assistant's `last` one, or `every` one.
        response_length: longest sample in validation, in tokens.
        temperature: of the samples in validation (D16).
        optimization: learning rate, schedule, loss reduction.
        pad_token: token to pad with; by default the tokenizer's own, or `[PAD]`.
        eos_tokens: tokens that end a response, the first one behind demonstrations; by default the tokenizer's own and
            those of the model's `generation_config.json`.
        resize_embeddings: add rows to the embedding if PAD has none. The paper does not need it.
        activation_checkpointing: compute activations again in the backward pass instead of keeping them.
        lora: train adapters only, and leave all other weights as they are (`rlhf.models.adapters.LoRA`).
        quantization: with `lora`, store the matrices of the base in 4 bits (`nf4`) or 8 (`int8`), by bitsandbytes.
    """

    kind = "sft"

    def __init__(
        self,
        model_path: str,
        loss_on: Literal["all", "response"] = "all",
        assistant_turns: Literal["last", "every"] = "last",
        response_length: PositiveInt = 53,
        temperature: Positive = 0.01,
        optimization: Optimization = Optimization(),
        pad_token: str | None = None,
        eos_tokens: list[str] | None = None,
        resize_embeddings: bool = False,
        activation_checkpointing: bool = False,
        lora: LoRA | None = None,
        quantization: Quantization | None = None,
    ) -> None:
        super().__init__(model_path, optimization, pad_token, activation_checkpointing, eos_tokens, lora, quantization)
        self.loss_on = loss_on
        self.assistant_turns = assistant_turns
        self.response_length = response_length
        self.temperature = temperature
        self.resize_embeddings = resize_embeddings
        check_language_model(model_path, "model.model_path")
        if lora is not None and self.embedding_rows > super().embedding_rows:
            raise UserError(
                "model.resize_embeddings: an adapter leaves the embedding as it is; train without model.lora."
            )
        if not resize_embeddings:
            check_pad_in_embedding(self.tokenizer, self.model_config, model_path)
        self.model: Any = None

    @property
    @override
    def response_room(self) -> int:
        return self.response_length

    @property
    @override
    def embedding_rows(self) -> int:
        rows = super().embedding_rows
        return max(rows, len(self.tokenizer)) if self.resize_embeddings else rows

    @override
    def configure_model(self) -> None:
        if self.model is not None:
            return
        self.model = self.networks.language_model(self.model_path, "model.model_path", trained=True)
        if self.resize_embeddings and len(self.tokenizer) > self.model.get_input_embeddings().num_embeddings:
            self.model.resize_token_embeddings(len(self.tokenizer))
        if self.activation_checkpointing:
            checkpoint_activations(self.model)

    def token_losses(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Computes the cross-entropy of each predicted token. Override this for another language-model loss.

        Args:
            batch: `input_ids`, `attention_mask`, `loss_mask`, all `(B, T)` with padding on the right.

        Returns:
            The losses and a mask of the tokens that count, `(B, T - 1)` each; other losses are 0.
        """
        host = host_masks(batch)
        logprobs = next_token_logprobs(self.model, batch["input_ids"], host["attention_mask"], host["loss_mask"])
        return -logprobs, batch["loss_mask"][:, 1:].bool()

    @override
    @torch.no_grad()
    def row_losses(self, batch: dict[str, Any]) -> Tensor:
        with self.autocast():
            losses, mask = self.token_losses(batch)
        return (losses.sum(1) / mask.sum(1))[mask.any(1)]

    @override
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        losses, mask = self.token_losses(batch)
        self.epoch_means.add("loss/sft", losses, mask)
        self.log("loss/sft_step", masked_mean(losses.detach(), mask), batch_size=1)
        self.log("lr", torch.tensor(self.learning_rate, device="cpu"), batch_size=1)
        return masked_total(losses, mask, self.normaliser(mask.sum(), batch["share"]))

    @override
    def evaluate(self, batch: dict[str, Any], batch_idx: int, split: str) -> dict[str, list[dict[str, Any]]]:
        losses, mask = self.token_losses(batch)
        self.log(f"{split}/loss", masked_mean(losses, mask), batch_size=int(mask.sum()), sync_dist=True, prog_bar=True)
        samples = self.predict_step(batch, batch_idx)
        scores = rouge([s["response"] for s in samples], [s["reference"] for s in samples])
        scores["eos"] = sum(s["has_eos"] for s in samples) / len(samples)
        self.log_dict({f"{split}/{k}": v for k, v in scores.items()}, batch_size=len(samples), sync_dist=True)
        return {"samples": samples}

    @override
    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, Any]]:
        rows = zip(batch["query"], *self.respond(batch, batch_idx), batch["reference"], strict=True)
        return [{"query": q, "response": r, "reference": t, "has_eos": ended} for q, r, ended, t in rows]

    def respond(self, batch: dict[str, Any], batch_idx: int) -> tuple[list[str], list[bool]]:
        """Samples a text for each of the left-padded `queries (B, P)` of a batch, and tells whether it has ended."""
        random = generator(self.device, self.global_rank, batch_idx)
        numbers = uniforms(len(batch["queries"]), self.response_length, random)
        decoding = Decoding(self.temperature, eos_ids(self.tokenizer), self.tokenizer.pad_token_id)
        with self.autocast():
            responses = sample(self.model, batch["queries"], batch["query_mask"], numbers, decoding)
        queries = [row[kept].tolist() for row, kept in zip(batch["queries"], batch["query_mask"].bool(), strict=True)]
        _, has_eos = response_lengths(responses, eos_ids(self.tokenizer))
        return decode_responses(self.tokenizer, queries, responses.tolist()), has_eos.tolist()

    @override
    def default_callbacks(self) -> list[Callback]:
        return [*super().default_callbacks(), SampleTable()]

    @override
    def save_export(self, folder: Path) -> None:
        save_pretrained(self.model, self.tokenizer, folder)
