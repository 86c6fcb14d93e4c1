"""Sampling by vLLM, whose weights are those of the model at every call."""

from __future__ import annotations

import copy
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlhf.errors import UserError
from rlhf.models.merging import merged_weights
from rlhf.ops.sequences import pad_sequences
from rlhf.sampling.sampler import Decoding
from rlhf.sampling.vllm_engine import Engine, check_vllm
from rlhf.sampling.vllm_process import Request, Shape

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

COLDEST = 0.01  # vLLM raises temperatures below
STEP = 64  # an engine has room for a multiple of so many tokens


class VLLMSampler:
    """Samples as `rlhf.sampling.sampler.sample` does, by an engine that starts at the first call.

    Its weights are those of the model at every call: they are handed over in memory that both processes share. On a
    GPU the engine sleeps between the calls, without weights or cache.

    Args:
        cache_gib: memory of the engine's cache of keys and values.
        names: of the settings `sampler` and `vllm_cache_gib`, for error messages.
        device: where it samples; by default on that of the model.
        fixed: whether the model never changes: its weights are handed over once, and the engine does not sleep.
    """

    takes_all = True  # rows: they need no padding, and the engine splits them itself

    def __init__(
        self, cache_gib: float, names: tuple[str, str], device: torch.device | None = None, fixed: bool = False
    ) -> None:
        check_vllm(names[0])
        self.cache_gib, self.names, self.device, self.fixed = cache_gib, names, device, fixed
        self.engine: Engine | None = None
        self._room = 0

    @torch.no_grad()
    def __call__(
        self, model: PreTrainedModel, queries: Tensor, query_mask: Tensor, uniforms: Tensor, decoding: Decoding
    ) -> tuple[Tensor, Tensor]:
        """Samples one response per query from the model's full distribution at a temperature.

        Args:
            queries, query_mask: `(B, P)`, padded on the left.
            uniforms: `(B, R)`, from which each row takes its seed; R is the longest response allowed.

        Returns:
            Token ids `(B, r)` and the engine's log-probabilities of them `(B, r)`, 0 on padding.
        """
        if decoding.temperature < COLDEST:
            raise UserError(f"{self.names[0]} vllm samples at temperatures of {COLDEST} or more only; raise it.")
        if not self.fixed:
            torch.cuda.empty_cache()  # what the training has freed, for the engine
        dtype = _dtype(model)
        engine, is_new = self._started(model, queries.shape[1] + uniforms.shape[1], dtype)
        if is_new or not self.fixed:
            _hand_over(model, dtype, engine)
        prompts = [ids[real].tolist() for ids, real in zip(queries.cpu(), query_mask.bool().cpu(), strict=True)]
        seeds = (uniforms[:, 0].double().cpu() * 2**32).long().tolist()  # a CPU's generators read 32 bits
        ends = list(decoding.eos_ids)
        found = engine.ask("sample", Request(prompts, seeds, decoding.temperature, ends, uniforms.shape[1]))
        ids, mask = pad_sequences([tokens for tokens, _ in found], decoding.pad_id)
        logprobs = torch.zeros(ids.shape)
        logprobs[mask.bool()] = torch.tensor([x for _, row in found for x in row])
        return ids.to(queries.device), logprobs.to(queries.device)

    def _started(self, model: PreTrainedModel, room: int, dtype: torch.dtype) -> tuple[Engine, bool]:
        """Returns an engine with room for rows of a length, and whether it is a new one."""
        if self.engine is not None and self.engine.close.still_active() and room <= self._room:
            return self.engine, False
        if self.engine is not None:
            self.engine.close()
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or room
        self._room = min(-(-room // STEP) * STEP, max(context, room))
        sampler, cache = self.names
        advice = (
            f"If it lacks memory, change {cache} ({self.cache_gib:g}); without {sampler} the built-in sampler goes on "
            "from the last checkpoint."
        )
        with TemporaryDirectory() as folder:
            _config(model).save_pretrained(folder)
            device, threads = self.device or model.device, torch.get_num_threads()
            shape = Shape(folder, dtype, device, self._room, self.cache_gib, threads, sleeps=not self.fixed)
            self.engine = Engine(shape, sampler, advice)
        return self.engine, True


def _hand_over(model: PreTrainedModel, dtype: torch.dtype, engine: Engine) -> None:
    engine.send(("load", None))
    for name, weight in merged_weights(model):
        # A copy on a CPU: what is sent moves to shared memory, and the trained weights stay where they are.
        moved = weight.to(dtype, copy=not weight.is_cuda) if weight.is_floating_point() else weight.clone()
        engine.send((name, moved.contiguous()))
        engine.answer()
    engine.send(None)
    engine.answer()


def _config(model: PreTrainedModel) -> PreTrainedConfig:
    """Returns the config of the model as it is: an adapter may have unshared an embedding."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    if config.get_text_config().tie_word_embeddings:
        inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
        config.get_text_config().tie_word_embeddings = inputs.weight is outputs.weight
    return config


def _dtype(model: PreTrainedModel) -> torch.dtype:
    """Returns the precision in which a model computes now."""
    device = model.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype
