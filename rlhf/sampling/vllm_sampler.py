"""Sampling by vLLM, in a process beside each training process, on the same device."""

from __future__ import annotations

import weakref
from importlib.util import find_spec
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
import torch.multiprocessing as mp
from torch import Tensor

from rlhf.errors import UserError
from rlhf.models.merging import merged_weights
from rlhf.ops.sequences import pad_sequences
from rlhf.sampling.sampler import Decoding
from rlhf.sampling.vllm_process import Request, Shape, serve

if TYPE_CHECKING:
    from transformers import PreTrainedModel

COLDEST = 0.01  # vLLM raises temperatures below
STEP = 64  # an engine has room for a multiple of so many tokens


def check_vllm() -> None:
    """Refuses to sample by vLLM where it is not installed."""
    if find_spec("vllm") is None:
        raise UserError(
            "model.sampler vllm needs vLLM, which is not installed here: see docs/vllm.md, or leave model.sampler out."
        )


class VLLMSampler:
    """Samples as `rlhf.sampling.sampler.sample` does, by an engine that starts at the first call.

    Its weights are those of the model at every call: they are handed over in memory that both processes share. On a
    GPU the engine sleeps between the calls, without weights or cache.

    Args:
        cache_gib: memory of the engine's cache of keys and values.
        setting: of it, for error messages.
    """

    takes_all = True  # rows: they need no padding, and the engine splits them itself

    def __init__(self, cache_gib: float, setting: str) -> None:
        check_vllm()
        self.cache_gib, self.setting = cache_gib, setting
        self._room = 0
        self._close: Any = lambda: None

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
            raise UserError(f"model.sampler vllm samples at temperatures of {COLDEST} or more only; raise it.")
        dtype = _dtype(model)
        self._start(model, queries.shape[1] + uniforms.shape[1], dtype)
        self._hand_over(model, dtype)
        prompts = [ids[real].tolist() for ids, real in zip(queries.cpu(), query_mask.bool().cpu(), strict=True)]
        seeds = (uniforms[:, 0].double().cpu() * 2**32).long().tolist()  # a CPU's generators read 32 bits
        ends = list(decoding.eos_ids)
        found = self._ask("sample", Request(prompts, seeds, decoding.temperature, ends, uniforms.shape[1]))
        ids, mask = pad_sequences([tokens for tokens, _ in found], decoding.pad_id)
        logprobs = torch.zeros(ids.shape)
        logprobs[mask.bool()] = torch.tensor([x for _, row in found for x in row])
        return ids.to(queries.device), logprobs.to(queries.device)

    def _start(self, model: PreTrainedModel, room: int, dtype: torch.dtype) -> None:
        """Starts the engine, or again one with more room for longer rows."""
        if room <= self._room:
            return
        self._close()
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or room
        self._room = min(-(-room // STEP) * STEP, max(context, room))
        device = model.device
        with TemporaryDirectory() as folder:
            model.config.architectures = [type(model).__name__]
            model.config.save_pretrained(folder)
            index = device.index or 0 if device.type == "cuda" else None
            shape = Shape(
                folder, str(dtype).removeprefix("torch."), self._room, self.cache_gib, index, torch.get_num_threads()
            )
            spawn = mp.get_context("spawn")
            self._connection, other = spawn.Pipe()
            self.process = spawn.Process(target=serve, args=(other, shape), daemon=True)
            self.process.start()
            other.close()
            self._close = weakref.finalize(self, _end, self._connection, self.process)
            self._answer()

    def _hand_over(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        self._send(("load", None))
        for name, weight in merged_weights(model):
            # A copy on a CPU: what is sent moves to shared memory, and the trained weights stay where they are.
            moved = weight.to(dtype, copy=not weight.is_cuda) if weight.is_floating_point() else weight.clone()
            self._send((name, moved.contiguous()))
            self._answer()
        self._send(None)
        self._answer()

    def _ask(self, command: str, argument: Any) -> Any:
        self._send((command, argument))
        return self._answer()

    def _send(self, message: Any) -> None:
        try:
            self._connection.send(message)
        except OSError:
            self._answer()

    def _answer(self) -> Any:
        """Receives the engine's answer.

        Raises:
            UserError: if the engine has failed, or died.
        """
        try:
            error, answer = self._connection.recv()
        except (EOFError, OSError):
            error = "its process has died; there may not be enough memory"
        if error is not None:
            self._room = 0
            why = " ".join(error.split())[:300].rstrip(".")
            raise UserError(
                f"model.sampler vllm: the engine has failed: {why}. If it lacks memory, change {self.setting} "
                f"({self.cache_gib:g}); without model.sampler the built-in sampler goes on from the last checkpoint."
            )
        return answer


def _end(connection: Any, process: Any) -> None:
    connection.close()  # it ends by itself then
    process.join(10)
    if process.is_alive():
        process.kill()


def _dtype(model: PreTrainedModel) -> torch.dtype:
    """Returns the precision in which a model computes now."""
    device = model.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype
