"""A message's masks: compressed and back, and left out where they say nothing."""

import zlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, Shaped, UInt8

from matu_jax.aggregation.storage import pack
from matu_jax.messages.layout import LENGTH, WireError


def compressed(masks: bytes) -> bytes | None:
    """The masks as a zlib stream, or None where that makes the message no smaller."""

    def deflated(strategy: int) -> bytes:
        # The level does not matter: these two strategies do not search for matches.
        work = zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, strategy)
        return work.compress(masks) + work.flush()

    packed = deflated(zlib.Z_HUFFMAN_ONLY)
    if 4 * len(packed) < len(masks):  # most bytes are one and the same; a byte costs a bit at least
        packed = min(packed, deflated(zlib.Z_RLE), key=len)
    return packed if len(packed) + LENGTH.size < len(masks) else None


def decompressed(packed: memoryview, size: int) -> bytes:
    """Masks of a known size; never allocates more than that for them.

    Raises:
      WireError: if it is no zlib stream of that size.
    """
    work = zlib.decompressobj()
    try:
        masks = work.decompress(packed, size + 1)  # one more, so that the stream's end is seen
    except zlib.error as error:
        raise WireError(f"masks: cannot be decompressed: {error}.") from None
    if len(masks) != size or not work.eof or work.unused_data:
        found = f"{len(masks)} bytes" if len(masks) < size else f"more than {size} bytes"
        if len(masks) == size:
            found = "no end" if not work.eof else f"{len(work.unused_data)} bytes after the end"
        raise WireError(f"masks: found {found} of what was compressed, expected {size} bytes.")
    return masks


def implied(
    leaves: Sequence[Shaped[np.ndarray, "..."]],
) -> tuple[list[UInt8[np.ndarray, "1 _"]], Float32[np.ndarray, "1"]]:
    """The masks and the scale of a unified of one task, which follow from its vector."""
    masks = [pack((leaf != 0).reshape(1, -1)) for leaf in leaves]
    return masks, np.array([float(any(mask.any() for mask in masks))], np.float32)


def are_implied(
    scales: Float32[np.ndarray, "1"],
    masks: Sequence[UInt8[np.ndarray, "1 _"]],
    leaves: Sequence[Shaped[np.ndarray, "..."]],
) -> bool:
    """Whether masks and scale of one task follow from its vector."""
    expected, scale = implied(leaves)
    return bool(scales[0] == scale[0]) and all(
        ((mask & ones) == ones).all() for mask, ones in zip(masks, expected, strict=True)
    )
