"""Caches of keys and values with room for all steps of sampling."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
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
                # Under autocast rotated keys are float32; attention rounds them to the precision of the values anyway.
                self._buffers = [
                    value_states.new_empty(*x.shape[:2], width + steps, x.shape[3]) for x in (key_states, value_states)
                ]
            for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
                buffer[:, :, start : start + width] = new
            self.keys, self.values = (buffer[:, :, : start + width] for buffer in self._buffers)
            return self.keys, self.values

        def unpack(self, rows: int, width: int, places: tuple[Tensor, Tensor]) -> None:
            """Turns packed rows, `(1, heads, N, d)`, into padded ones; `places`: rows and columns of the tokens."""
            before = [buffer[0, :, : self.get_seq_length()] for buffer in self._buffers]
            self._buffers = [x.new_zeros(rows, len(x), width + steps, x.shape[2]) for x in before]
            self.keys, self.values = (buffer[:, :, :width] for buffer in self._buffers)
            for padded, states in zip((self.keys, self.values), before, strict=True):
                padded.transpose(1, 2)[places] = states.transpose(0, 1)

        def buffers(self) -> tuple[Tensor, ...]:
            """Returns keys and values with zeros where there is room: a mask would not hide what is not finite."""
            for buffer in self._buffers:
                buffer[:, :, self.get_seq_length() :] = 0
            return tuple(self._buffers)

        @override
        def reorder_cache(self, beam_idx: Tensor) -> None:
            width = self.get_seq_length()
            self._buffers = [buffer[beam_idx] for buffer in self._buffers]
            self.keys, self.values = (buffer[:, :, :width] for buffer in self._buffers)

    cache = DynamicCache(config=model.config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def fixed_cache(cache: Any) -> Cache:
    """Turns a cache with room, after the queries, into one whose tensors keep their shapes and are changed in place.

    Raises:
        ValueError: if not all of its layers see all tokens.
    """
    from transformers import Cache
    from transformers.cache_utils import StaticLayer

    class FixedLayer(StaticLayer):
        def __init__(self, layer: Any) -> None:
            keys, values = layer.buffers()
            super().__init__(keys.shape[2])
            self.keys, self.values = keys, values
            self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
            self.cumulative_length = torch.tensor(layer.get_seq_length(), device=self.device)

        @override
        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            return super().update(key_states.to(self.dtype), value_states, *args, **kwargs)

    if not all(hasattr(layer, "buffers") for layer in cache.layers):
        raise ValueError("not all layers see all tokens")
    return Cache(layers=[FixedLayer(layer) for layer in cache.layers])
