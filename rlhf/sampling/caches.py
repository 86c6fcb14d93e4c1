"""Caches of keys and values with room for all steps of sampling."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from typing_extensions import override

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel


def cache_with_room(model: PreTrainedModel, steps: int) -> Cache:
    """Returns an empty cache whose plain layers allocate room for all steps at once, and so are never copied."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    class RoomyLayer(DynamicLayer):
        @override
        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            start, width = self.get_seq_length(), key_states.shape[2]
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
                self._buffers = [
                    x.new_empty(*x.shape[:2], width + steps, x.shape[3]) for x in (key_states, value_states)
                ]
            for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
                buffer[:, :, start : start + width] = new
            self.keys, self.values = (buffer[:, :, : start + width] for buffer in self._buffers)
            return self.keys, self.values

        def unpack(self, mask: Tensor) -> None:
            """Turns packed rows, `(1, heads, N, d)`, into rows with the padding of a mask `(B, W)`."""
            rows, width = mask.shape
            before = [buffer[0, :, : self.get_seq_length()] for buffer in self._buffers]
            self._buffers = [x.new_zeros(rows, len(x), width + steps, x.shape[2]) for x in before]
            self.keys, self.values = (buffer[:, :, :width] for buffer in self._buffers)
            for padded, states in zip((self.keys, self.values), before, strict=True):
                padded.transpose(1, 2)[mask.bool()] = states.transpose(0, 1)

        @override
        def reorder_cache(self, beam_idx: Tensor) -> None:
            width = self.get_seq_length()
            self._buffers = [buffer[beam_idx] for buffer in self._buffers]
            self.keys, self.values = (buffer[:, :, :width] for buffer in self._buffers)

    cache = DynamicCache(config=model.config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def static_cache(model: PreTrainedModel, width: int) -> Cache:
    """Returns an empty cache of fixed width, for models whose layers all see all tokens."""
    from transformers import StaticCache
    from transformers.cache_utils import StaticLayer

    class OwnPrecision(StaticLayer):
        @override
        def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
            super().lazy_initialization(key_states, value_states)
            values: Any = self.values
            self.values = values.to(value_states.dtype)  # under autocast only the rotated keys are float32

    cache = StaticCache(config=model.config, max_cache_len=width)
    if any(type(layer) is not StaticLayer for layer in cache.layers):
        raise ValueError("not all layers see all tokens")
    cache.layers = [OwnPrecision(width) for _ in cache.layers]
    return cache
