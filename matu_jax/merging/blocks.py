"""The parameters of models as a row of blocks of one size."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from matu_jax.aggregation.storage import TILE, pack, unpack
from matu_jax.models.tensors import FLOATING, READABLE, TensorFileError, TensorFiles

BUDGET = 1 << 22  # entries, of all models and of the base and the result, in a block
_SMALLEST, _LARGEST = TILE, 1 << 22  # up to 2**22 signs, float32 sums of signs / size are exact


class Segment(NamedTuple):
    """Entries of one tensor inside a block.

    Attributes:
      name: of the tensor.
      start: the first entry in the tensor, row-major; a multiple of 1024, as is `place`, so that it
        is made of the tensor's tiles, see `matu_jax.Unified`.
      size: how many entries.
      place: the first entry in the block.
    """

    name: str
    start: int
    size: int
    place: int

    @property
    def part(self) -> slice:
        """Its entries in the block."""
        return slice(self.place, self.place + self.size)

    @property
    def mask_part(self) -> slice:
        """Its bytes in the block's packed mask, which has whole tiles."""
        return slice(self.place // 8, (self.place + self._padded) // 8)

    @property
    def _padded(self) -> int:
        return -(-self.size // TILE) * TILE

    def of_block(self, packed: UInt8[np.ndarray, "bytes"]) -> UInt8[np.ndarray, "_"]:
        """The tensor's part of its packed mask, from the bytes at `mask_part`."""
        return packed if self.size % TILE == 0 else pack(unpack(packed, self.size))

    def for_block(self, packed: UInt8[np.ndarray, "bytes"]) -> UInt8[np.ndarray, "_"]:
        """The inverse of `of_block`."""
        if self.size % TILE == 0:
            return packed
        return pack(np.pad(unpack(packed, self.size), (0, self._padded - self.size)))


class Block(NamedTuple):
    """One block of the base and of every model, padded with zeros, in the storage dtype.

    Attributes:
      segments: what stands where.
      base: `[block]`.
      tuned: `[models, block]`.
    """

    segments: list[Segment]
    base: np.ndarray
    tuned: np.ndarray

    @property
    def size(self) -> int:
        """The number of entries that are not padding."""
        return sum(segment.size for segment in self.segments)


def block_size(models: int, budget: int = BUDGET) -> int:
    """How long blocks are, a power of two: the largest that keeps everything in the budget."""
    most = max(_SMALLEST, budget // (models + 2))  # 2: the base and the result
    return min(_LARGEST, 1 << (most.bit_length() - 1))


def plan(files: TensorFiles, names: Sequence[str], size: int) -> list[list[Segment]]:
    """Distributes tensors over blocks of `size` entries, each block of one dtype."""
    blocks: list[list[Segment]] = []
    for dtype in FLOATING:
        place = size
        for name in names:
            tensor = files.tensors[name]
            start = 0 if tensor.dtype == dtype else tensor.size
            while start < tensor.size:
                if place == size:
                    blocks.append([])
                    place = 0
                count = min(tensor.size - start, size - place)
                blocks[-1].append(Segment(name, start, count, place))
                start += count
                place += -(-count // TILE) * TILE
    return blocks


def fill(
    row: Float[np.ndarray, "size"], files: TensorFiles, segments: list[Segment], prefix: str = ""
) -> None:
    """Reads a block of a model into `row`, `[block]`; `prefix` stands before its names."""
    for segment in segments:
        row[segment.part] = files.read(prefix + segment.name, segment.start, segment.size)


def read_blocks(
    base: TensorFiles, models: Mapping[str, TensorFiles], names: Sequence[str], size: int
) -> Iterator[Block]:
    """Yields the blocks of `plan`, each in arrays of its own."""
    for segments in plan(base, names, size):
        dtype = READABLE[base.tensors[segments[0].name].dtype]
        block = Block(segments, np.zeros(size, dtype), np.zeros((len(models), size), dtype))
        fill(block.base, base, segments)
        for row, files in zip(block.tuned, models.values(), strict=True):
            fill(row, files, segments)
        yield block


def check_finite(
    block: Block, finite: Any, base: TensorFiles, models: Mapping[str, TensorFiles]
) -> None:
    """Refuses a block unless all models' task vectors are finite: `finite`, bool `[models]`.

    Raises:
      TensorFileError: names the model, or the base, and the tensor.
    """
    if np.all(finite):
        return
    named = {"the base": (base, block.base)} | {
        f"model {name}": (files, row)
        for (name, files), row in zip(models.items(), block.tuned, strict=True)
    }
    for segment in block.segments:
        for name, (files, row) in named.items():
            bad = int((~np.isfinite(row[segment.part])).sum())
            if bad:
                raise TensorFileError(
                    f"{name} ({files.path}): tensor {segment.name}: {bad} of the "
                    f"{segment.size} numbers from entry {segment.start} on are not finite; "
                    "expected no NaN and no infinity. Did its training diverge?"
                )
    which = int(np.argmin(finite))
    name, files = list(models.items())[which]
    difference = np.abs(block.tuned[which].astype(np.float64) - block.base.astype(np.float64))
    worst = max(block.segments, key=lambda segment: difference[segment.part].max())
    raise TensorFileError(
        f"model {name} ({files.path}): tensor {worst.name}: its difference from the base "
        f"{base.path} is {difference[worst.part].max():g}, beyond the largest {block.base.dtype}."
    )
