"""Sampling by vLLM, whose weights are those of the model at every call."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlhf.errors import UserError
from rlhf.ops.sequences import pad_sequences
from rlhf.sampling.sampler import Decoding
from rlhf.sampling.vllm_engine import Engine, check_vllm, hand_over, start_engine
from rlhf.sampling.vllm_process import Request, Shape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

COLDEST = 0.01  # vLLM raises temperatures below
ROOM = 4096  # tokens of a row, as far as the model's context goes; for a longer one an engine of twice the room starts


def check_temperature(temperature: float, setting: str) -> None:
    """Refuses a temperature that vLLM would raise."""
    if temperature < COLDEST:
        raise UserError(f"{setting} is {temperature:g}: vLLM samples at {COLDEST} or more; raise it.")


class VLLMSampler:
    """Samples as `rlhf.sampling.sampler.sample` does, by an engine that starts at the first call.

    Its weights are those of the model at every call: they are handed over in memory that both processes share. On a
    GPU the engine sleeps between the calls, without weights or cache.

    Args:
        cache_gib: memory of the engine's cache of keys and values.
        names: of the settings `sampler` and `vllm_cache_gib`, for error messages.
        otherwise: what to do without vLLM, for error messages.
        device: where it samples; by default on that of the model.
        fixed: whether the model never changes: its weights are handed over once, and the engine does not sleep.
    """

    takes_all = True  # rows: they need no padding, and the engine splits them itself

    def __init__(
        self,
        cache_gib: float,
        names: tuple[str, str],
        otherwise: str,
        device: torch.device | None = None,
        fixed: bool = False,
    ) -> None:
        check_vllm(names[0])
        self.cache_gib, self.names, self.device, self.fixed = cache_gib, names, device, fixed
        self._otherwise = otherwise
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
        if not self.fixed:
            torch.cuda.empty_cache()  # what the training has freed, for the engine
        dtype = _dtype(model)
        engine, is_new = self._started(model, queries.shape[1] + uniforms.shape[1], dtype)
        if is_new or not self.fixed:
            hand_over(model, dtype, engine)
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
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**30
        self._room = min(max(ROOM, 2 ** (room - 1).bit_length()), max(context, room))
        sampler, cache = self.names
        advice = f"If it lacks memory, change {cache} ({self.cache_gib:g}); {self._otherwise}."
        shape = Shape(dtype, self.device or model.device, self._room, self.cache_gib, sleeps=not self.fixed)
        self.engine = start_engine(model, shape, sampler, advice)
        return self.engine, True


def _dtype(model: PreTrainedModel) -> torch.dtype:
    """Returns the precision in which a model computes now."""
    device = model.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype
