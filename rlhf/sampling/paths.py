"""Which reader is right for a model: a few tokens of the model itself decide, against plain forwards."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from rlhf.errors import UserError
from rlhf.models.arguments import accepted
from rlhf.models.finite import check_logits
from rlhf.models.library_calls import quiet
from rlhf.models.probes import half_kept
from rlhf.sampling.token_readers import KeyValueReader, Reader, StateReader, WholeReader

if TYPE_CHECKING:
    from transformers import PreTrainedModel

READERS: tuple[type[Reader], ...] = (KeyValueReader, StateReader, WholeReader)  # the fastest first
TOKENS, STEPS, SAME = 11, 4, 5  # of each of two rows; those that are read one by one; those that both rows end with
# How far logits may be off, as a share of what another context changes. In float32 right readers are off by at most
# 6e-6, steps that drift away from a whole forward (Zamba 2) by 5e-5, wrong ones by 0.2 or more; in bfloat16 right ones
# by up to 0.2, as experts may change.
EXACT, ROUNDED = 2e-5, 0.3
IMPOSSIBLE = -1e4  # logits below are those of tokens that a model never predicts, down to minus infinity

_readers: WeakKeyDictionary[nn.Module, type[Reader]] = WeakKeyDictionary()  # what the test found, while a model lives


def reader_for(model: PreTrainedModel) -> type[Reader]:
    """Returns the fastest reader that is right for a model in evaluation mode, found once per model.

    Raises:
        UserError: if even whole rows give other logits than each row alone.
    """
    if hasattr(model.get_input_embeddings().weight, "ds_id"):  # ZeRO-3: a forward needs all processes
        return KeyValueReader
    if model not in _readers:
        _readers[model] = _find(model)
    return _readers[model]


def _find(model: PreTrainedModel) -> type[Reader]:
    fault = None
    for reader in READERS:
        fault = fault_of(model, reader)
        if fault is None:
            if reader.cost:
                rank_zero_info(f"{type(model).__name__} is sampled in a slower way: {reader.cost}.")
            return reader
    raise UserError(
        f"The model {model.config.name_or_path} ({type(model).__name__}) works in no stage, neither in SFT nor as a "
        f"reward model nor in PPO: {fault}."
    )


@torch.no_grad()
def fault_of(model: PreTrainedModel, reader: type[Reader]) -> str | None:
    """Says what is wrong with a reader for a model, or returns None.

    Weights in float32 are tested without autocast first, where rounding hides nothing, then as the caller runs them.
    """
    device = model.device.type
    half = half_kept(model)
    single = model.dtype == torch.float32 and half is None
    tf32 = device == "cuda" and torch.backends.cuda.matmul.allow_tf32
    autocast = torch.is_autocast_enabled(device) or half is not None
    for enabled in sorted({autocast, autocast and not single}):
        exact = single and not enabled and not tf32
        try:
            with quiet(), torch.autocast(device, half, enabled=enabled):
                error = _error(model, reader, torch.float32 if exact else torch.bfloat16)
        except (torch.OutOfMemoryError, UserError):
            raise
        except Exception as failure:  # of any kind: the code is the model's
            return f"a forward fails with {type(failure).__name__}: {(str(failure) or '?').splitlines()[0]}"
        if not error <= (EXACT if exact else ROUNDED) and (exact or reader is not WholeReader):
            return "its logits are not those of a plain forward of each row"
    return None


def _error(model: PreTrainedModel, reader_class: type[Reader], precision: torch.dtype) -> float:
    """Measures how far a reader's logits are off at most, as a share of what another context changes in them.

    It reads two rows, the longer one of which leaves in between, and is compared with a forward of each row.
    """
    weight: Any = model.get_input_embeddings().weight
    rows = _rows(len(weight), weight.device)
    plain = torch.cat([model(**accepted(model, input_ids=row[None], use_cache=False)).logits for row in rows]).float()
    check_logits(plain.amax(-1), model)
    lengths = [7, 3] if reader_class.takes_padding else [5, 5]
    ids = [F.pad(row[:length], (max(lengths) - length, 0), value=-1) for row, length in zip(rows, lengths, strict=True)]
    queries = torch.stack(ids)
    reader = reader_class(model, queries.clamp(min=0), (queries >= 0).long(), STEPS)
    kept, ends = torch.arange(2, device=rows.device), torch.tensor(lengths, device=rows.device)
    logits = reader.read_queries()
    errors = [_distance(logits, plain[kept, ends - 1])]
    for step in range(STEPS):
        if step == STEPS // 2 and reader.loses_rows:
            reader.keep(kept[1:])
            kept, ends = kept[1:], ends[1:]
        logits = reader.read(rows[kept, ends + step])
        errors.append(_distance(logits, plain[kept, ends + step]))
    context = _distance(plain[0, -SAME:], plain[1, -SAME:]).max()
    rounding = 8 * torch.finfo(precision).eps * _distance(plain, torch.zeros_like(plain)).max()
    return (torch.cat(errors).max() / torch.maximum(context, rounding)).item()


def _rows(vocabulary: int, device: torch.device) -> Tensor:
    """Returns two rows of tokens from all over a vocabulary, different ones before the same."""
    row = torch.arange(1, TOKENS + 1, device=device)
    other = torch.where(row <= TOKENS - SAME, row + TOKENS, row)
    return torch.stack([row, other]) * max(1, vocabulary // 20) % vocabulary


def _distance(logits: Tensor, others: Tensor) -> Tensor:
    """Measures how far apart the distributions of logits are, `(..., V), (..., V) -> (...)`."""
    ours, theirs = (x.float().masked_fill(x < IMPOSSIBLE, 0) for x in (logits, others))
    difference = ours - theirs
    return (difference - difference.mean(-1, keepdim=True)).norm(dim=-1)
