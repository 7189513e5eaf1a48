"""A unified to bytes and back: what one client sends to the server, or receives from it.

Every number is little-endian. k is the number of tasks in the message.

    offset  bytes      what
    0       4          "MATU"
    4       2          uint16, version of this format: 1
    6       1          1 = upload (client to server), 2 = download (server to client)
    7       1          1 = masks and scales follow; 0 = they are left out, see below
    8       4          uint32, round
    12      4          uint32, client
    16      4          uint32, k, at least 1
    20      16         fingerprint of the parameter tree: the first 16 bytes of the SHA-256 of, for
                       every leaf in order, "<path> <dtype> <axes with x between>" and a line feed,
                       such as "blocks/query/lora_a float32 4x64x8", in UTF-8
    36      4 k        uint32, task ids, all different
    ...     4 k        float32, scales, finite and not negative; if not left out
    ...     n          the vector, leaf after leaf in the order of the fingerprint, row-major, in
                       each leaf's dtype (float32, bfloat16 or float16), all finite
    ...     m          masks, if not left out: for every leaf, k rows of ceil(parameters / 8) bytes;
                       bit i % 8 (least significant first) of byte i // 8 belongs to parameter i,
                       the bits after the last parameter are 0
    end     4          uint32, CRC-32 (IEEE 802.3, as in zlib) of all bytes before it

Leaves are in the order of JAX's pytrees (dictionaries by sorted keys). Masks and scales are left
out where they say nothing: a unified of one task has a one in its mask wherever its vector is not
0, and the scale 1 (0 if the vector is 0 everywhere). So the size of a message follows from its
first 36 bytes and the tree alone, and nothing is allocated before it is known to fit.

Nothing is executed or unpickled. The checksum tells damage, not a forger: who sent a message is for
the transport to establish.
"""

import hashlib
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import BinaryIO, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from matu_jax.aggregation import Slots, Unified
from matu_jax.trees import PyTree, leaf_items

VERSION = 1
Kind = Literal["upload", "download"]
_KINDS: dict[Kind, int] = {"upload": 1, "download": 2}
_HEADER = struct.Struct("<4sHBBIII16s")
_DTYPES = ("float32", "bfloat16", "float16")


class WireError(ValueError):
    """A message that is not taken: says what was found, where, and what was expected."""


class Received(NamedTuple):
    """A message, decoded.

    Attributes:
      kind: "upload" or "download".
      round: the round it belongs to.
      client: who sent it, or whom it is for.
      tasks: task ids, one for each row of masks and scales.
      unified: vector leaves `[...]`, masks uint8 `[k, bytes]`, scales float32 `[k]`; numpy arrays,
        which may be read-only views of the message.
    """

    kind: Kind
    round: int
    client: int
    tasks: tuple[int, ...]
    unified: Unified


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
    """Bytes of a message that are neither vector nor masks nor scales."""
    return _HEADER.size + 4 * tasks + 4


def message_bytes(like: PyTree, tasks: int, *, modulators: bool | None = None) -> int:
    """Bytes of a whole message.

    Args:
      like: leaves `[...]`, arrays or `jax.ShapeDtypeStruct`.
      tasks: k.
      modulators: whether masks and scales are in it; None = for more than one task, as from
        `unify`.
    """
    if modulators is None:
        modulators = tasks > 1
    size = overhead_bytes(tasks)
    for leaf in jax.tree.leaves(like):
        count = int(np.prod(leaf.shape, dtype=np.int64))
        size += count * jnp.dtype(leaf.dtype).itemsize
        size += tasks * -(-count // 8) if modulators else 0
    return size + (4 * tasks if modulators else 0)


def encode(
    unified: Unified,
    tasks: Sequence[int],
    *,
    kind: Kind = "upload",
    client: int = 0,
    round_number: int = 0,
) -> bytes:
    """Writes a unified of a single client as a message.

    Args:
      unified: vector leaves `[...]`, masks uint8 `[k, bytes]`, scales float32 `[k]`, as `unify`
        makes them without slots.
      tasks: k task ids.
      kind: "upload" or "download".
      client: who sends it, or whom it is for.
      round_number: the round.

    Raises:
      WireError: for what `decode` would refuse.
    """
    if kind not in _KINDS:
        raise WireError(f"kind: found {kind!r}, expected 'upload' or 'download'.")
    leaves = [(path, np.asarray(leaf)) for path, leaf in leaf_items(unified.vector)]
    print_ = fingerprint(unified.vector)
    masks = [np.asarray(leaf) for _, leaf in leaf_items(unified.masks)]
    scales = np.asarray(unified.scales, np.float32)
    ids = np.asarray(tasks, np.int64)
    for name, value in (("client", client), ("round", round_number), *(("task", t) for t in ids)):
        if not 0 <= value < 2**32:
            raise WireError(f"{name}: found {value}, expected a whole number from 0 to 2**32 - 1.")
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
    _check(ids, scales, leaves, masks)
    trivial_masks, trivial_scales = _trivial([leaf for _, leaf in leaves])
    plain = (
        len(ids) == 1
        and scales[0] == trivial_scales[0]
        and all((x == y).all() for x, y in zip(masks, trivial_masks, strict=True))
    )
    head = _HEADER.pack(
        b"MATU", VERSION, _KINDS[kind], not plain, round_number, client, len(ids), print_
    )
    parts = [head, ids.astype("<u4").tobytes()]
    parts += [] if plain else [scales.astype("<f4").tobytes()]
    parts += [_words(leaf).tobytes() for _, leaf in leaves]
    parts += [] if plain else [mask.tobytes() for mask in masks]
    body = b"".join(parts)
    return body + struct.pack("<I", zlib.crc32(body))


def decode(
    data: bytes | bytearray | memoryview,
    like: PyTree,
    *,
    num_tasks: int = 2**32,
    max_tasks: int = 1024,
) -> Received:
    """Reads a message, after checking it.

    Args:
      data: the whole message.
      like: the parameter tree that both sides have agreed on; leaves `[...]`, arrays or
        `jax.ShapeDtypeStruct`.
      num_tasks: task ids are below it.
      max_tasks: the largest k that is taken.

    Raises:
      WireError: for a message that is truncated, too long, damaged, of another version or tree, or
        holds a task twice, an unknown task, or a number that is not finite.
    """
    return _decoded(data, like, fingerprint(like), num_tasks, max_tasks)


def _decoded(
    data: bytes | bytearray | memoryview,
    like: PyTree,
    print_: bytes,
    num_tasks: int,
    max_tasks: int,
) -> Received:
    """`decode`, given the fingerprint of the tree."""
    view = memoryview(data).cast("B")
    wanted = _size(view[: _HEADER.size], like, print_, max_tasks)
    if len(view) != wanted:
        what = "is truncated" if len(view) < wanted else "is too long"
        raise WireError(f"the message {what}: found {len(view)} bytes, expected {wanted}.")
    return _parse(view, like, num_tasks)


def read(
    stream: BinaryIO, like: PyTree, *, num_tasks: int = 2**32, max_tasks: int = 1024
) -> Received:
    """Reads one message from a stream, and no byte more; see `decode`.

    Its size is computed from its first 36 bytes and the tree, before anything is allocated: no
    message is larger than `message_bytes(like, max_tasks, modulators=True)`.

    Raises:
      WireError: as `decode`.
      EOFError: if the stream is at its end.
    """
    head = stream.read(_HEADER.size)
    if not head:
        raise EOFError("no further message")
    print_ = fingerprint(like)
    size = _size(memoryview(head), like, print_, max_tasks)
    rest = stream.read(size - len(head))
    return _decoded(head + rest, like, print_, num_tasks, max_tasks)


def gather(
    messages: Mapping[int, bytes | WireError], like: PyTree, slots: Slots, *, round_number: int
) -> tuple[Unified, Slots, list[str]]:
    """Puts the uploads of a round together for `aggregate`, without those that are refused.

    Args:
      messages: by client: its message, or why there is none.
      like: leaves `[...]`, as for `decode`.
      slots: which client holds which task, and how many examples it has.
      round_number: the round that uploads have to be of.

    Returns:
      Uploads: vector leaves `[clients, ...]`, masks `[slots, bytes]`, scales `[slots]`; the slots,
      with weight 0 for every client of which nothing was taken; and one line for each refusal.
    """
    client, task = np.asarray(slots.client), np.asarray(slots.task)
    weight = np.array(slots.weight, np.float32)
    shapes = [(leaf.shape, jnp.dtype(leaf.dtype)) for leaf in jax.tree.leaves(like)]
    vectors = [np.zeros((slots.num_clients, *shape), dtype) for shape, dtype in shapes]
    masks = [
        np.zeros((len(client), -(-int(np.prod(shape, dtype=np.int64)) // 8)), np.uint8)
        for shape, _ in shapes
    ]
    scales = np.zeros(len(client), np.float32)
    refused = []
    taken = np.zeros(slots.num_clients, np.bool_)
    print_ = fingerprint(like)
    for sender, message in messages.items():
        try:
            if isinstance(message, WireError):
                raise message
            found = _decoded(message, like, print_, slots.num_tasks, slots.num_tasks)
            rows = np.flatnonzero((client == sender) & (weight > 0))
            held = sorted(task[rows].tolist())
            if (found.kind, found.client, found.round) != ("upload", sender, round_number):
                raise WireError(
                    f"found a {found.kind} of client {found.client}, round {found.round}, expected "
                    f"an upload of client {sender}, round {round_number}."
                )
            if sorted(found.tasks) != held:
                raise WireError(f"tasks: found {sorted(found.tasks)}, expected {held}.")
        except WireError as error:
            refused.append(f"client {sender}: {error}")
            continue
        taken[sender] = True
        order = [found.tasks.index(t) for t in task[rows]]
        for target, leaf in zip(vectors, jax.tree.leaves(found.unified.vector), strict=True):
            target[sender] = leaf
        for target, leaf in zip(masks, jax.tree.leaves(found.unified.masks), strict=True):
            target[rows] = leaf[order]
        scales[rows] = found.unified.scales[order]
    weight[~taken[client]] = 0
    treedef = jax.tree.structure(like)
    uploads = Unified(treedef.unflatten(vectors), treedef.unflatten(masks), jnp.asarray(scales))
    present = Slots(slots.client, slots.task, weight, slots.num_clients, slots.num_tasks)
    return uploads, present, refused


def of_client(unified: Unified, slots: Slots, client: int) -> tuple[Unified, tuple[int, ...]]:
    """What `encode` takes, for one client of a unified of all.

    Args:
      unified: vector leaves `[clients, ...]`, masks `[slots, bytes]`, scales `[slots]`.
      slots: the slots it was folded with; those of weight 0 are left out.
      client: which one.

    Returns:
      The client's own unified: vector leaves `[...]`, masks `[k, bytes]`, scales `[k]`; its tasks.
    """
    rows = np.flatnonzero((np.asarray(slots.client) == client) & (np.asarray(slots.weight) > 0))
    return (
        Unified(
            jax.tree.map(lambda leaf: leaf[client], unified.vector),
            jax.tree.map(lambda leaf: leaf[rows], unified.masks),
            unified.scales[rows],
        ),
        tuple(np.asarray(slots.task)[rows].tolist()),
    )


def _words(leaf: np.ndarray) -> np.ndarray:
    """A leaf's numbers as unsigned integers in little-endian order."""
    bits = np.dtype(f"u{leaf.dtype.itemsize}")
    return np.ascontiguousarray(leaf).reshape(-1).view(bits).astype(bits.newbyteorder("<"))


def _size(head: memoryview, like: PyTree, expected: bytes, max_tasks: int) -> int:
    """Checks the first bytes of a message, and computes the size of all of it."""
    if len(head) < _HEADER.size:
        raise WireError(
            f"the message is truncated: found {len(head)} bytes, expected {_HEADER.size} or more."
        )
    magic, version, kind, modulators, _, _, tasks, tree = _HEADER.unpack(head)
    if magic != b"MATU":
        raise WireError(f'bytes 0 to 3: found {magic!r}, expected b"MATU": this is no unified.')
    if version != VERSION:
        raise WireError(f"bytes 4 to 5: found version {version}, expected {VERSION}.")
    if kind not in _KINDS.values():
        raise WireError(f"byte 6: found {kind}, expected 1 (upload) or 2 (download).")
    if modulators > 1 or (not modulators and tasks > 1):
        raise WireError(
            f"byte 7: found {modulators}, expected {'1' if tasks > 1 else '0 or 1'}: masks and "
            "scales are left out of messages of one task alone."
        )
    if not 1 <= tasks <= max_tasks:
        raise WireError(f"bytes 16 to 19: found {tasks} tasks, expected 1 to {max_tasks}.")
    if tree != expected:
        raise WireError(
            f"bytes 20 to 35: found parameter tree {tree.hex()}, expected {expected.hex()}: the "
            "other side has other leaves, shapes or dtypes."
        )
    return message_bytes(like, tasks, modulators=bool(modulators))


def _parse(view: memoryview, like: PyTree, num_tasks: int) -> Received:
    """Reads a message of the right size."""
    (checksum,) = struct.unpack("<I", view[-4:])
    found = zlib.crc32(view[:-4])
    if checksum != found:
        raise WireError(
            f"the message is damaged: its checksum is {found:08x}, and it says {checksum:08x}."
        )
    _, _, kind, modulators, number, client, count, _ = _HEADER.unpack(view[: _HEADER.size])
    at = _HEADER.size

    def take(dtype: str, items: int) -> np.ndarray:
        nonlocal at
        array = np.frombuffer(view, dtype, items, at)
        at += array.nbytes
        return array

    ids = take("<u4", count).astype(np.int64)
    scales = take("<f4", count).astype(np.float32) if modulators else None
    leaves, masks = [], []
    for path, leaf in leaf_items(like):
        dtype = jnp.dtype(leaf.dtype)
        words = take(f"<u{dtype.itemsize}", int(np.prod(leaf.shape, dtype=np.int64)))
        words = words.astype(f"u{dtype.itemsize}", copy=False)
        leaves.append((path, words.view(dtype).reshape(leaf.shape)))
    if scales is None:
        masks, scales = _trivial([leaf for _, leaf in leaves])
    else:
        for _, leaf in leaves:
            width = -(-leaf.size // 8)
            masks.append(take("u1", count * width).reshape(count, width))
    wrong = np.flatnonzero(ids >= num_tasks)
    if wrong.size:
        raise WireError(f"task {ids[wrong[0]]}: unknown, expected 0 to {num_tasks - 1}.")
    _check(ids, scales, leaves, masks)
    treedef = jax.tree.structure(like)
    unified = Unified(
        treedef.unflatten([leaf for _, leaf in leaves]),
        treedef.unflatten(masks),
        cast(jax.Array, scales),
    )
    name: Kind = "upload" if kind == _KINDS["upload"] else "download"
    return Received(name, number, client, tuple(ids.tolist()), unified)


def _check(
    ids: np.ndarray,
    scales: np.ndarray,
    leaves: Sequence[tuple[str, np.ndarray]],
    masks: Sequence[np.ndarray],
) -> None:
    """Checks what a message says."""
    unique, counts = np.unique(ids, return_counts=True)
    if not unique.size:
        raise WireError("found no task, expected at least one.")
    if counts.max() > 1:
        raise WireError(f"task {unique[counts.argmax()]}: found {counts.max()} times.")
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
        unused = -leaf.size % 8
        if unused and (mask[:, -1] >> (8 - unused)).any():
            raise WireError(f"masks: leaf {path}: a bit after the last parameter is set.")


def _trivial(leaves: Sequence[np.ndarray]) -> tuple[list[np.ndarray], np.ndarray]:
    """Masks and scales of a unified of one task."""
    masks = [np.packbits((leaf != 0).reshape(1, -1), axis=1, bitorder="little") for leaf in leaves]
    return masks, np.array([float(any(mask.any() for mask in masks))], np.float32)
