"""Packed rows: one behind the other in a single sequence without padding, where no row attends to another."""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf.hardware import sent
from rlhf.models.library_calls import quiet
from rlhf.models.probes import backbone_of, near, plain_precision

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION = "sdpa_packed"  # the name by which transformers knows `attention`
HALF = (torch.bfloat16, torch.float16)  # what kernels for rows of different lengths take on a GPU

_packs: WeakKeyDictionary[nn.Module, dict[str, bool]] = WeakKeyDictionary()  # what the probe found, by type of device


class Packing(NamedTuple):
    """The rows of a packed sequence.

    Attributes:
        lengths: their numbers of tokens.
        first: the first token of each whose last hidden state is read. On a CPU the last layer computes attention from
            that token on only.
        offsets: where each begins, and where the last one ends, `(B + 1,)`.
    """

    lengths: list[int]
    first: list[int]
    offsets: Tensor


def packed(input_ids: Tensor, attention_mask: Tensor, first: Tensor) -> dict[str, Any]:
    """Packs rows `(B, T)` with padding anywhere: returns inputs for a model that packs, their N real tokens `(1, N)`.

    Positions start at 0 in each row (D09). The mask has four dimensions, so that transformers neither looks at it nor
    makes one of `(N, N)`; nothing reads it. For `first`, `(B,)`, see `Packing`; it is on the mask's device, which may
    be the CPU for ids on a GPU.
    """
    device, real = input_ids.device, attention_mask.flatten().nonzero().squeeze(1)
    ids, positions = input_ids.flatten()[sent(real, device)], (attention_mask.long().cumsum(1) - 1).flatten()[real]
    lengths = attention_mask.sum(1)
    offsets = sent(F.pad(lengths.cumsum(0), (1, 0)).int(), device)
    return {
        "input_ids": ids.unsqueeze(0),
        "position_ids": sent(positions, device).unsqueeze(0),
        "attention_mask": torch.ones(1, 1, 1, len(ids), dtype=torch.bool, device=device),
        "packing": Packing(lengths.tolist(), first.tolist(), offsets),
    }


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packing: Packing | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Computes attention like transformers' `sdpa`, each row of a packed sequence by itself.

    A CPU takes one row after the other, a GPU all in one kernel.

    Args:
        query, key, value: `(1, heads, N, d)`.
        attention_mask: not read with packed rows.

    Returns:
        `(1, N, heads, d)`, in the last layer zeros for tokens that are not read.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if packing is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    window = kwargs.get("sliding_window")
    if query.device.type == "cuda":
        return _variable_length(query, key, value, packing, kwargs.get("scaling"), window), None
    config: Any = module.config
    is_last = getattr(module, "layer_idx", None) == config.num_hidden_layers - 1
    parts = []
    for length, first, q, k, v in zip(
        packing.lengths, packing.first, *(x.split(packing.lengths, 2) for x in (query, key, value)), strict=True
    ):
        skip = first if is_last else 0
        mask = _mask(length, skip, window, query.device)
        part, _ = sdpa_attention_forward(module, q[:, :, skip:], k, v, mask, **kwargs)
        parts.append(F.pad(part, (0, 0, 0, 0, skip, 0)) if skip else part)
    return torch.cat(parts, 1), None


def _variable_length(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, scale: float | None, window: int | None
) -> Tensor:
    """Computes causal attention of packed rows by PyTorch's kernel for rows of different lengths, `(1, N, heads, d)`.

    Args:
        window: how many tokens a token attends to, itself included; None: all before it.
    """
    from torch.nn.attention.varlen import varlen_attn

    # Under autocast rotated queries and keys are float32; values come from a product and have its precision.
    query, key, value = (x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value))
    more: Any = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    out: Any = varlen_attn(
        query, key, value, packing.offsets, packing.offsets, max(packing.lengths), max(packing.lengths), scale=scale,
        window_size=(-1 if window is None else window - 1, 0), **more,
    )  # fmt: skip
    return out.unsqueeze(0)


def _mask(length: int, skip: int, window: int | None, device: torch.device) -> Tensor | None:
    """Returns the mask of a row's tokens from `skip` on, `(1, 1, length - skip, length)`; None: a causal one."""
    windowed = window is not None and length > window
    if not skip and not windowed:
        return None
    mask = torch.ones(1, 1, length - skip, length, dtype=torch.bool, device=device).tril(skip)
    return mask.triu(skip - window + 1) if window is not None and windowed else mask


def packs(model: PreTrainedModel) -> bool:
    """Tells whether a model can take packed rows: its attention is transformers' `sdpa`, and nothing else mixes tokens.

    A forward of two short rows shows it, once per model. On a GPU it takes half precision and PyTorch's kernel for rows
    of different lengths.
    """
    weight = cast(Tensor, model.get_input_embeddings().weight)
    device = weight.device.type
    if hasattr(weight, "ds_id") or (device != "cpu" and not _has_kernel(weight)):
        return False
    found = _packs.setdefault(model, {})
    if device not in found:
        found[device] = _use_attention(model) and _keeps_rows_apart(model)
    return found[device]


def _has_kernel(weight: Tensor) -> bool:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # before torch 2.10
        return False
    device = weight.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    return device == "cuda" and dtype in HALF and "window_size" in inspect.signature(varlen_attn).parameters


def _use_attention(model: PreTrainedModel) -> bool:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    if not set(getattr(model.config, "layer_types", None) or ()) <= {"full_attention", "sliding_attention"}:
        return False
    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(ATTENTION, attention)
        AttentionMaskInterface.register(ATTENTION, sdpa_mask)
        with quiet():
            model.set_attn_implementation(ATTENTION)
    return model.config._attn_implementation == ATTENTION


@torch.no_grad()
def _keeps_rows_apart(model: PreTrainedModel) -> bool:
    """Tells whether a row has the same states behind two different rows, to the last bit, and nearly the same alone."""
    backbone, weight = backbone_of(model), cast(Tensor, model.get_input_embeddings().weight)
    device = weight.device

    def states(*first: int) -> Tensor:
        ids = torch.tensor([first, (0, 1, 0)], device=device)
        inputs = packed(ids, torch.ones_like(ids), first=torch.zeros_like(ids[:, 0]))
        return backbone(**inputs, use_cache=False).last_hidden_state[0, 3:].float()

    # A GPU's kernel takes half precision only.
    own = device.type != "cpu" and torch.is_autocast_enabled(device.type)
    with nullcontext() if own else plain_precision(model):
        try:
            behind, behind_another = states(0, 1, 1), states(1, 0, 0)  # no token is the same: a leak may be of any
        except (TypeError, ValueError, RuntimeError):  # it takes no extra arguments, other masks, or other rows' tokens
            return False
        ids = torch.tensor([[0, 1, 0]], device=device)
        alone = backbone(input_ids=ids, use_cache=False).last_hidden_state[0].float()
    return torch.equal(behind, behind_another) and near(behind, alone)
