"""What samples responses: the built-in sampler, or another program; both are called alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol

from torch import Tensor

from rlhf.sampling.cuda_graphs import sampling_function
from rlhf.sampling.responses import Drawn
from rlhf.sampling.sampler import Decoding
from rlhf.sampling.vllm_sampler import VLLMSampler

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SamplerName = Literal["builtin", "vllm"]


class Sampler(Protocol):
    """Samples a response per query from the full distribution of a model as it is now; see `sampler.sample`.

    Attributes:
        takes_all: whether it splits what it is given by itself, so that it is called once with all rows.
    """

    takes_all: bool

    def __call__(
        self, model: PreTrainedModel, queries: Tensor, query_mask: Tensor, uniforms: Tensor, decoding: Decoding
    ) -> Drawn:
        """Returns token ids `(B, r)` and, if it has its own, their log-probabilities `(B, r)`."""


class BuiltinSampler:
    """Samples by the model itself.

    Args:
        cuda_graphs: see `cuda_graphs.sampling_function`.
    """

    takes_all = False

    def __init__(self, cuda_graphs: bool | None) -> None:
        self.cuda_graphs = cuda_graphs

    def __call__(
        self, model: PreTrainedModel, queries: Tensor, query_mask: Tensor, uniforms: Tensor, decoding: Decoding
    ) -> Tensor:
        """Returns token ids `(B, r)`."""
        return sampling_function(self.cuda_graphs, queries.device)(model, queries, query_mask, uniforms, decoding)


def make_sampler(name: SamplerName, cuda_graphs: bool | None, cache_gib: float) -> Sampler:
    """Returns the sampler of PPO by its name; `cache_gib` is for vLLM alone."""
    if name == "builtin":
        return BuiltinSampler(cuda_graphs)
    otherwise = "without model.sampler vllm and its settings the built-in sampler goes on from the last checkpoint"
    return VLLMSampler(cache_gib, ("model.sampler", "model.ppo.vllm_cache_gib"), otherwise)
