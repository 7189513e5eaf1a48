"""A unified to bytes and back: what one client sends to the server, or receives from it.

Every number is little-endian. k is the number of tasks in the message.

    offset  bytes      what
    0       4          "MATU"
    4       1          version of this format: 3
    5       1          how the vector is written: 0 = every leaf in its own dtype, 1 = bfloat16,
                       2 = int8 in blocks
    6       1          1 = upload (client to server), 2 = download (server to client)
    7       1          0 = masks and scales are left out, see below; 1 = they follow; 2 = they
                       follow, the masks compressed
    8       4          uint32, round
    12      4          uint32, client
    16      4          uint32, k, at least 1
    20      16         fingerprint of the parameter tree: the first 16 bytes of the SHA-256 of, for
                       every leaf in order, "<path> <dtype> <axes with x between>" and a line feed,
                       such as "blocks/query/lora_a float32 4x64x8", in UTF-8
    36      8          uint64, c, bytes of the compressed masks; only if they are compressed
    ...     4 k        uint32, task ids, all different
    ...     4 k        float32, scales, finite and not negative; if not left out
    ...     n          the vector, leaf after leaf in the order of the fingerprint, row-major, all
                       finite: in the leaf's dtype (float32, bfloat16 or float16); or in bfloat16;
                       or as int8, -127 to 127, for every parameter of the leaf, followed by a
                       float32, finite and not negative, for every 256 of them (and one for the
                       rest): a parameter is the product of the two, in float32
    ...     m or c     masks, if not left out: for every leaf, k rows of ceil(parameters / 8) bytes;
                       every 1024 parameters have 128 bytes, of which bit i // 128 (0 the least
                       significant) of byte i % 128 belongs to the i-th of them; the r behind them
                       have w = ceil(r / 8), of which bit i // w of byte i % w belongs to the i-th;
                       bits that belong to none are 0. Compressed: these m bytes as one zlib stream
                       (RFC 1950), where c + 8 < m
    end     4          uint32, CRC-32 (IEEE 802.3, as in zlib) of all bytes before it

Leaves are in the order of JAX's pytrees (dictionaries by sorted keys). Masks and scales are left
out where they say nothing: a unified of one task has a one in its mask wherever its vector is not
0, and the scale 1 (0 if the vector is 0 everywhere); a bit where the vector is 0 means nothing. So
the size of a message follows from its first 36 bytes (44, if masks are compressed) and the tree
alone, is never more than `message_bytes` says, and nothing is allocated before it is known to fit;
masks are decompressed into no more than their m bytes.

Masks are compressed by a Huffman code of their bytes (or, if that is shorter, of runs of them too),
which for independent bits comes within 3 % of the entropy at densities from 0.5 to 0.9:
experiments/bench/bench_masks.py. Trained heads are no part of a unified.

Nothing is executed or unpickled. The checksum tells damage, not a forger: who sent a message is for
the transport to establish.
"""

import struct
import zlib
from collections.abc import Sequence
from typing import BinaryIO, NamedTuple, cast

import jax
import numpy as np

from matu_jax.aggregation import Unified
from matu_jax.aggregation.storage import TILE, in_tiles, unpack
from matu_jax.messages.layout import (
    COMPRESSED,
    HEADER,
    KINDS,
    LENGTH,
    MASKS,
    NO_MASKS,
    PRECISIONS,
    VERSION,
    Kind,
    Precision,
    WireError,
    fingerprint,
    mask_bytes,
    message_size,
    named,
)
from matu_jax.messages.mask_coding import are_implied, compressed, decompressed, implied
from matu_jax.messages.vector_coding import quietly, read_leaf, words, written
from matu_jax.trees import PyTree, leaf_items

__all__ = ["Received", "WireError", "decode", "encode", "read"]

_PIECE = 2**20  # bytes read at once: some streams allocate whatever they are asked for


class Received(NamedTuple):
    """A message, decoded.

    Attributes:
      kind: "upload" or "download".
      round: the round it belongs to.
      client: who sent it, or whom it is for.
      tasks: task ids, one for each row of masks and scales.
      precision: how the vector was written, see `encode`.
      unified: vector leaves `[...]` in the tree's dtypes, masks uint8 `[k, bytes]`, scales float32
        `[k]`; numpy arrays, which may be read-only views of the message.
    """

    kind: Kind
    round: int
    client: int
    tasks: tuple[int, ...]
    precision: Precision
    unified: Unified


def encode(
    unified: Unified,
    tasks: Sequence[int],
    *,
    kind: Kind = "upload",
    client: int = 0,
    round_number: int = 0,
    precision: Precision = "float32",
    compress: bool = False,
) -> bytes:
    """Writes a unified of a single client as a message.

    Args:
      unified: vector leaves `[...]`, masks uint8 `[k, bytes]`, scales float32 `[k]`, as `unify`
        makes them without slots.
      tasks: k task ids.
      kind: "upload" or "download".
      client: who sends it, or whom it is for.
      round_number: the round.
      precision: how the vector is written: "float32" (in its own dtypes, exactly), "bfloat16" or
        "int8", of which the other side makes `quantisation.restored(quantisation.rounded(vector))`.
      compress: whether masks are compressed where that makes the message smaller.

    Raises:
      WireError: for what `decode` would refuse.
    """
    for name, found, choices in (("kind", kind, KINDS), ("precision", precision, PRECISIONS)):
        if found not in choices:
            expected = ", ".join(map(repr, choices))
            raise WireError(f"{name}: found {found!r}, expected one of {expected}.")
    tree = fingerprint(unified.vector)
    arrays, leaves = written(unified.vector, precision)
    masks = [np.asarray(leaf) for _, leaf in leaf_items(unified.masks)]
    scales = np.asarray(unified.scales, np.float32)
    ids = np.asarray(tasks, np.int64)
    for name, value in (("client", client), ("round", round_number), *(("task", t) for t in ids)):
        if not 0 <= value < 2**32:
            raise WireError(f"{name}: found {value}, expected a whole number from 0 to 2**32 - 1.")
    _check_shapes(ids, scales, leaves, masks)
    _check_ids(ids, 2**32)
    _check_numbers(ids, scales, leaves, masks)
    modulators, form = [], NO_MASKS
    if len(ids) > 1 or not are_implied(scales, masks, [leaf for _, leaf in leaves]):
        modulators, form = [mask.tobytes() for mask in masks], MASKS
        packed = compressed(b"".join(modulators)) if compress else None
        if packed is not None:
            modulators, form = [packed], COMPRESSED
    codes = PRECISIONS[precision], KINDS[kind], form
    parts = [HEADER.pack(b"MATU", VERSION, *codes, round_number, client, len(ids), tree)]
    parts += [LENGTH.pack(len(modulators[0]))] if form == COMPRESSED else []
    parts += [ids.astype("<u4").tobytes()]
    parts += [] if form == NO_MASKS else [scales.astype("<f4").tobytes()]
    parts += [words(array).tobytes() for array in arrays]
    body = b"".join(parts + modulators)
    return body + struct.pack("<I", zlib.crc32(body))


def decode(
    data: bytes | bytearray | memoryview,
    like: PyTree,
    *,
    num_tasks: int = 2**32,
    max_tasks: int = 1024,
    max_bytes: int | None = None,
    tree: bytes | None = None,
) -> Received:
    """Reads a message, after checking it.

    Args:
      data: the whole message.
      like: the parameter tree that both sides have agreed on; leaves `[...]`, arrays or
        `jax.ShapeDtypeStruct`.
      num_tasks: task ids are below it.
      max_tasks: the largest k that is taken.
      max_bytes: the largest message that is taken, its masks counted as they are when decompressed;
        None = what `max_tasks` allow.
      tree: `layout.fingerprint(like)`, for who reads many messages of one tree; None = computed.

    Raises:
      WireError: for a message that is truncated, too long, damaged, of another version or tree, or
        holds a task twice, an unknown task, or a number that is not finite.
    """
    tree = fingerprint(like) if tree is None else tree
    view = memoryview(data).cast("B")
    head = view[: HEADER.size + LENGTH.size]
    wanted = message_size(head, like, tree, min(max_tasks, num_tasks), max_bytes)
    if len(view) != wanted:
        what = "is truncated" if len(view) < wanted else "is too long"
        raise WireError(f"the message {what}: found {len(view)} bytes, expected {wanted}.")
    return _parse(view, like, num_tasks)


def read(
    stream: BinaryIO,
    like: PyTree,
    *,
    num_tasks: int = 2**32,
    max_tasks: int = 1024,
    max_bytes: int | None = None,
) -> Received:
    """Reads one message from a stream, and no byte more; see `decode`.

    Its size is computed from its first 36 or 44 bytes and the tree, and held against the limits:
    no message is larger than `max_bytes`, nor than `message_bytes` says for `max_tasks`, which is
    much for a large tree. Memory is taken as the bytes come, whatever the first ones promise.

    Raises:
      WireError: as `decode`.
      EOFError: if the stream is at its end.
    """
    head = _taken(stream, b"", HEADER.size)
    if not head:
        raise EOFError("no further message")
    if len(head) == HEADER.size and head[7] == COMPRESSED:
        head = _taken(stream, head, HEADER.size + LENGTH.size)
    tree = fingerprint(like)
    size = message_size(memoryview(head), like, tree, min(max_tasks, num_tasks), max_bytes)
    limits = {"num_tasks": num_tasks, "max_tasks": max_tasks, "max_bytes": max_bytes}
    return decode(_taken(stream, head, size), like, tree=tree, **limits)


def _taken(stream: BinaryIO, start: bytes | bytearray, size: int) -> bytearray:
    """What is there of so many bytes, of which the start was read; memory is taken as they come."""
    data = bytearray(start)
    while len(data) < size:
        piece = stream.read(min(size - len(data), _PIECE))
        if not piece:
            break
        data += piece
    return data


@quietly
def _parse(view: memoryview, like: PyTree, num_tasks: int) -> Received:
    """Reads a message of the right size."""
    (checksum,) = struct.unpack("<I", view[-4:])
    found = zlib.crc32(view[:-4])
    if checksum != found:
        raise WireError(
            f"the message is damaged: its checksum is {found:08x}, and it says {checksum:08x}."
        )
    _, _, precision_code, kind, form, number, client, count, _ = HEADER.unpack(view[: HEADER.size])
    precision = named(PRECISIONS, precision_code)
    at = HEADER.size + (LENGTH.size if form == COMPRESSED else 0)

    def take(dtype: str, items: int) -> np.ndarray:
        nonlocal at
        array = np.frombuffer(view, dtype, items, at)
        at += array.nbytes
        return array

    ids = take("<u4", count).astype(np.int64)
    _check_ids(ids, num_tasks)
    scales = take("<f4", count).astype(np.float32) if form != NO_MASKS else None
    leaves = [(path, read_leaf(path, leaf, precision, take)) for path, leaf in leaf_items(like)]
    masks = []
    if scales is None:
        masks, scales = implied([leaf for _, leaf in leaves])
    else:
        packed = view[at:-4]
        flat = np.frombuffer(
            decompressed(packed, mask_bytes(like, count)) if form == COMPRESSED else packed,
            np.uint8,
        )
        start = 0
        for _, leaf in leaves:
            width = -(-leaf.size // 8)
            masks.append(flat[start : start + count * width].reshape(count, width))
            start += count * width
    _check_numbers(ids, scales, leaves, masks)
    treedef = jax.tree.structure(like)
    unified = Unified(
        treedef.unflatten([leaf for _, leaf in leaves]),
        treedef.unflatten(masks),
        cast(jax.Array, scales),
    )
    return Received(named(KINDS, kind), number, client, tuple(ids.tolist()), precision, unified)


def _check_ids(ids: np.ndarray, num_tasks: int) -> None:
    """Checks the tasks of a message."""
    unique, counts = np.unique(ids, return_counts=True)
    if not unique.size:
        raise WireError("found no task, expected at least one.")
    if counts.max() > 1:
        raise WireError(f"task {unique[counts.argmax()]}: found {counts.max()} times.")
    if unique[-1] >= num_tasks:
        raise WireError(f"task {unique[-1]}: unknown, expected 0 to {num_tasks - 1}.")


def _check_shapes(
    ids: np.ndarray,
    scales: np.ndarray,
    leaves: Sequence[tuple[str, np.ndarray]],
    masks: Sequence[np.ndarray],
) -> None:
    """Checks that there is a scale per task, and masks that fit the vector."""
    if scales.shape != ids.shape:
        raise WireError(f"scales: found {list(scales.shape)}, expected [{len(ids)}], one per task.")
    if len(masks) != len(leaves):
        raise WireError(f"masks: found {len(masks)} leaves, expected {len(leaves)}.")
    for (path, leaf), mask in zip(leaves, masks, strict=True):
        expected = (len(ids), -(-leaf.size // 8))
        if mask.shape != expected or mask.dtype != np.uint8:
            raise WireError(
                f"masks: leaf {path}: found {mask.dtype}{list(mask.shape)}, expected "
                f"uint8{list(expected)}."
            )


@quietly
def _check_numbers(
    ids: np.ndarray,
    scales: np.ndarray,
    leaves: Sequence[tuple[str, np.ndarray]],
    masks: Sequence[np.ndarray],
) -> None:
    """Checks the numbers and masks of a message."""
    wrong = np.flatnonzero(~(np.isfinite(scales) & (scales >= 0)))
    if wrong.size:
        raise WireError(
            f"task {ids[wrong[0]]}: its scale is {scales[wrong[0]]}, expected a finite number, 0 "
            "or more."
        )
    for (path, leaf), mask in zip(leaves, masks, strict=True):
        # A sum is finite only if every number is; only if it is not do we look closer.
        if not np.isfinite(np.sum(leaf, dtype=np.float64)):
            bad = np.flatnonzero(~np.isfinite(leaf.reshape(-1)))
            raise WireError(
                f"leaf {path}: {bad.size} of {leaf.size} numbers are not finite, the first at "
                f"position {bad[0]}."
            )
        if leaf.size % 8:
            behind = mask[:, in_tiles(leaf.size) // 8 :]
            last = unpack(behind, 8 * behind.shape[1])[:, leaf.size % TILE :]
            if last.any():
                raise WireError(f"masks: leaf {path}: a bit after the last parameter is set.")
