"""A KV cache that grows in place, for a batch whose sequences all end in its last column."""

from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

ROOM = 64  # columns that are free after sequences have come


class Columns(DynamicLayer):
    """Keys and values of one layer, `[n, heads, columns, size]`, in buffers with free columns.
    transformers' own layers copy all that is cached at every token."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        """The buffers have `ROOM` free columns behind what is given, which has none."""
        super().__init__()
        self.lazy_initialization(keys, values)
        self._buffers: list[Tensor] = [keys, values]
        self._show(keys.shape[2] - ROOM)

    def _show(self, width: int) -> tuple[Tensor, Tensor]:
        self._width = width
        keys, values = (buffer[:, :, :width] for buffer in self._buffers)
        self.keys, self.values = keys, values
        return keys, values

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        width = self._width + key_states.shape[2]
        if width > self._buffers[0].shape[2]:
            self._buffers = [_wider(buffer, width + ROOM) for buffer in self._buffers]
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, self._width : width] = states
        return self._show(width)


def joined(cache: DynamicCache, kept: Tensor, new: DynamicCache, longest: int) -> DynamicCache:
    """The rows `kept` of a cache, and beneath them those of a new one. Their last `longest` columns
    are kept, or filled with zeros on the left."""
    found = DynamicCache()
    layers: Any = zip(cache.layers, new.layers, strict=True)
    found.layers = [
        Columns(
            _beneath(old.keys[kept], fresh.keys, longest),
            _beneath(old.values[kept], fresh.values, longest),
        )
        for old, fresh in layers
    ]
    return found


def rows_of(cache: DynamicCache, kept: Tensor, longest: int) -> DynamicCache:
    """The rows `kept` of a cache, and the last `longest` columns of them."""
    found = DynamicCache()
    layers: Any = cache.layers
    found.layers = [
        Columns(
            _beneath(layer.keys[kept], layer.keys[:0], longest),
            _beneath(layer.values[kept], layer.values[:0], longest),
        )
        for layer in layers
    ]
    return found


def _beneath(one: Tensor, other: Tensor, longest: int) -> Tensor:
    rows, heads, _, size = one.shape
    buffer = one.new_zeros(rows + len(other), heads, longest + ROOM, size)
    for part, place in ((one, buffer[:rows]), (other, buffer[rows:])):
        width = min(part.shape[2], longest)
        place[:, :, longest - width : longest] = part[:, :, part.shape[2] - width :]
    return buffer


def _wider(buffer: Tensor, columns: int) -> Tensor:
    wider = buffer.new_zeros(*buffer.shape[:2], columns, buffer.shape[3])
    wider[:, :, : buffer.shape[2]] = buffer
    return wider
