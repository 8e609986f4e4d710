"""A KV cache that grows in place, for a batch whose sequences all end in its last column."""

from collections.abc import Sequence
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


def gathered(
    parts: Sequence[tuple[DynamicCache, Tensor]], longest: int, order: Tensor
) -> DynamicCache:
    """Rows of some caches, each with the numbers of its own, beneath each other and then in an
    order. Their last `longest` columns are kept, or filled with zeros on the left."""
    found = DynamicCache()
    rows = [own for _, own in parts]
    for layers in zip(*(cache.layers for cache, _ in parts), strict=True):
        together = list(zip(layers, rows, strict=True))
        keys = _beneath([layer.keys[own] for layer, own in together], longest)
        values = _beneath([layer.values[own] for layer, own in together], longest)
        found.layers.append(Columns(keys[order], values[order]))
    return found


def _beneath(parts: Sequence[Tensor], longest: int) -> Tensor:
    _, heads, _, size = parts[0].shape
    rows = sum(len(part) for part in parts)
    buffer = parts[0].new_zeros(rows, heads, longest + ROOM, size)
    places = buffer.split([len(part) for part in parts])
    for part, place in zip(parts, places, strict=True):
        width = min(part.shape[2], longest)
        place[:, :, longest - width : longest] = part[:, :, part.shape[2] - width :]
    return buffer


def _wider(buffer: Tensor, columns: int) -> Tensor:
    wider = buffer.new_zeros(*buffer.shape[:2], columns, buffer.shape[3])
    wider[:, :, : buffer.shape[2]] = buffer
    return wider
