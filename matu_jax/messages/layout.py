"""What stands where in a message, and how many bytes it takes; `wire` has the whole format."""

import hashlib
import struct
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from matu_jax.messages.quantisation import BLOCK
from matu_jax.trees import PyTree, leaf_items

VERSION = 3
Kind = Literal["upload", "download"]
Precision = Literal["float32", "bfloat16", "int8"]
KINDS: dict[Kind, int] = {"upload": 1, "download": 2}
PRECISIONS: dict[Precision, int] = {"float32": 0, "bfloat16": 1, "int8": 2}
NO_MASKS, MASKS, COMPRESSED = range(3)
HEADER = struct.Struct("<4sBBBBIII16s")
LENGTH = struct.Struct("<Q")
_DTYPES = ("float32", "bfloat16", "float16")

Name = TypeVar("Name")


class WireError(ValueError):
    """A message that is not taken: says what was found, where, and what was expected."""


def fingerprint(like: PyTree) -> bytes:
    """The first 16 bytes of the SHA-256 of a tree's paths, dtypes and shapes, as in a message.

    Args:
      like: leaves `[...]`, arrays or `jax.ShapeDtypeStruct`.

    Raises:
      WireError: for a dtype that messages cannot hold.
    """
    lines = []
    for path, leaf in leaf_items(like):
        dtype = jnp.dtype(leaf.dtype).name
        if dtype not in _DTYPES:
            raise WireError(f"leaf {path}: found {dtype}, expected one of {', '.join(_DTYPES)}.")
        lines.append(f"{path} {dtype} {'x'.join(map(str, leaf.shape))}\n")
    if not lines:
        raise WireError("found a tree without leaves.")
    return hashlib.sha256("".join(lines).encode()).digest()[:16]


def overhead_bytes(tasks: int) -> int:
    """Bytes of a message that are neither vector nor masks nor scales; masks not compressed."""
    return HEADER.size + 4 * tasks + 4


def message_bytes(
    like: PyTree,
    tasks: int,
    *,
    modulators: bool | None = None,
    precision: Precision = "float32",
) -> int:
    """Bytes of a whole message whose masks are not compressed; compressed ones make it smaller.

    Args:
      like: leaves `[...]`, arrays or `jax.ShapeDtypeStruct`.
      tasks: k.
      modulators: whether masks and scales are in it; None = for more than one task, as from
        `unify`.
      precision: how the vector is written, see `encode`.
    """
    if modulators is None:
        modulators = tasks > 1
    size = overhead_bytes(tasks) + _vector_bytes(like, precision)
    return size + (4 * tasks + mask_bytes(like, tasks) if modulators else 0)


def _vector_bytes(like: PyTree, precision: Precision) -> int:
    size = 0
    for leaf in jax.tree.leaves(like):
        count = parameters(leaf)
        if precision == "int8":
            size += count + 4 * -(-count // BLOCK)
        else:
            size += count * (2 if precision == "bfloat16" else jnp.dtype(leaf.dtype).itemsize)
    return size


def mask_bytes(like: PyTree, tasks: int) -> int:
    """Bytes of the masks of so many tasks, not compressed."""
    return sum(tasks * -(-parameters(leaf) // 8) for leaf in jax.tree.leaves(like))


def parameters(leaf: Any) -> int:
    """How many numbers a leaf has, from its shape."""
    return int(np.prod(leaf.shape, dtype=np.int64))


def message_size(
    head: memoryview, like: PyTree, expected: bytes, max_tasks: int, max_bytes: int | None
) -> int:
    """Checks the first bytes of a message, and computes the size of all of it.

    Args:
      head: its header, and the length of compressed masks where they are said to follow.
      like: leaves `[...]`, as for `wire.decode`.
      expected: their fingerprint.
      max_tasks: the largest k that is taken.
      max_bytes: the largest message that is taken; None = any.

    Raises:
      WireError: for what is wrong in these bytes.
    """
    if len(head) < HEADER.size:
        raise WireError(
            f"the message is truncated: found {len(head)} bytes, expected {HEADER.size} or more."
        )
    magic, version, written, kind, form, _, _, tasks, tree = HEADER.unpack(head[: HEADER.size])
    if magic != b"MATU":
        raise WireError(f'bytes 0 to 3: found {magic!r}, expected b"MATU": this is no unified.')
    if version != VERSION:
        raise WireError(f"byte 4: found version {version}, expected {VERSION}.")
    if written not in PRECISIONS.values():
        raise WireError(f"byte 5: found {written}, expected 0 (as it is), 1 (bfloat16), 2 (int8).")
    if kind not in KINDS.values():
        raise WireError(f"byte 6: found {kind}, expected 1 (upload) or 2 (download).")
    if form > COMPRESSED or (form == NO_MASKS and tasks > 1):
        raise WireError(
            f"byte 7: found {form}, expected {'1 or 2' if tasks > 1 else '0 to 2'}: masks and "
            "scales are left out of messages of one task alone."
        )
    if not 1 <= tasks <= max_tasks:
        raise WireError(f"bytes 16 to 19: found {tasks} tasks, expected 1 to {max_tasks}.")
    if tree != expected:
        raise WireError(
            f"bytes 20 to 35: found parameter tree {tree.hex()}, expected {expected.hex()}: the "
            "other side has other leaves, shapes or dtypes."
        )
    precision = named(PRECISIONS, written)
    size = message_bytes(like, tasks, modulators=form != NO_MASKS, precision=precision)
    if max_bytes is not None and size > max_bytes:  # decompressed, it is as large
        raise WireError(f"the message is too large: {size} bytes, expected at most {max_bytes}.")
    if form != COMPRESSED:
        return size
    if len(head) < HEADER.size + LENGTH.size:
        raise WireError(
            f"the message is truncated: found {len(head)} bytes, expected "
            f"{HEADER.size + LENGTH.size} or more."
        )
    (packed,) = LENGTH.unpack(head[HEADER.size :])
    masks = mask_bytes(like, tasks)
    if packed + LENGTH.size >= masks:
        raise WireError(
            f"bytes 36 to 43: found {packed} bytes of compressed masks, expected fewer than "
            f"{max(masks - LENGTH.size, 0)}: otherwise they are not compressed."
        )
    return size - masks + packed + LENGTH.size


def named(codes: Mapping[Name, int], code: int) -> Name:
    """What a code of `KINDS` or `PRECISIONS` stands for."""
    return next(name for name, number in codes.items() if number == code)
