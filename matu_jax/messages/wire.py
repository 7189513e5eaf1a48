"""A unified to bytes and back: what one client sends to the server, or receives from it.

Every number is little-endian. k is the number of tasks in the message.

    offset  bytes      what
    0       4          "MATU"
    4       1          version of this format: 2
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
                       bit i % 8 (least significant first) of byte i // 8 belongs to parameter i,
                       the bits after the last parameter are 0. Compressed: these m bytes as one
                       zlib stream (RFC 1950), where c + 8 < m
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

import hashlib
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO, Literal, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np

from matu_jax.aggregation import Slots, Unified
from matu_jax.messages.quantisation import BLOCK, Blocks, rounded
from matu_jax.trees import PyTree, leaf_items

VERSION = 2


Kind = Literal["upload", "download"]


Precision = Literal["float32", "bfloat16", "int8"]


_KINDS: dict[Kind, int] = {"upload": 1, "download": 2}


_PRECISIONS: dict[Precision, int] = {"float32": 0, "bfloat16": 1, "int8": 2}


_HEADER = struct.Struct("<4sBBBBIII16s")


_LENGTH = struct.Struct("<Q")


_PIECE = 2**20  # bytes read at once: some streams allocate whatever they are asked for


# Overflows, infinities of both signs and signalling NaNs are refused, not warned of as well.
_quietly = np.errstate(over="ignore", invalid="ignore")


_NO_MASKS, _MASKS, _COMPRESSED = range(3)


Name = TypeVar("Name")


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
    return _HEADER.size + 4 * tasks + 4


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
    return size + (4 * tasks + _mask_bytes(like, tasks) if modulators else 0)


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
    for name, found, choices in (("kind", kind, _KINDS), ("precision", precision, _PRECISIONS)):
        if found not in choices:
            expected = ", ".join(map(repr, choices))
            raise WireError(f"{name}: found {found!r}, expected one of {expected}.")
    print_ = fingerprint(unified.vector)
    written, leaves = _written(unified.vector, precision)
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
    _check_ids(ids, 2**32)
    _check(ids, scales, leaves, masks)
    modulators, form = [], _NO_MASKS
    if len(ids) > 1 or not _says_nothing(scales, masks, [leaf for _, leaf in leaves]):
        modulators, form = [mask.tobytes() for mask in masks], _MASKS
        packed = _compressed(b"".join(modulators)) if compress else None
        if packed is not None:
            modulators, form = [packed], _COMPRESSED
    parts = [
        _HEADER.pack(
            b"MATU",
            VERSION,
            _PRECISIONS[precision],
            _KINDS[kind],
            form,
            round_number,
            client,
            len(ids),
            print_,
        )
    ]
    parts += [_LENGTH.pack(len(modulators[0]))] if form == _COMPRESSED else []
    parts += [ids.astype("<u4").tobytes()]
    parts += [] if form == _NO_MASKS else [scales.astype("<f4").tobytes()]
    parts += [_words(array).tobytes() for array in written]
    body = b"".join(parts + modulators)
    return body + struct.pack("<I", zlib.crc32(body))


def decode(
    data: bytes | bytearray | memoryview,
    like: PyTree,
    *,
    num_tasks: int = 2**32,
    max_tasks: int = 1024,
    max_bytes: int | None = None,
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

    Raises:
      WireError: for a message that is truncated, too long, damaged, of another version or tree, or
        holds a task twice, an unknown task, or a number that is not finite.
    """
    return _decoded(data, like, fingerprint(like), num_tasks, max_tasks, max_bytes)


def _decoded(
    data: bytes | bytearray | memoryview,
    like: PyTree,
    print_: bytes,
    num_tasks: int,
    max_tasks: int,
    max_bytes: int | None,
) -> Received:
    """`decode`, given the fingerprint of the tree."""
    view = memoryview(data).cast("B")
    head = view[: _HEADER.size + _LENGTH.size]
    wanted = _size(head, like, print_, min(max_tasks, num_tasks), max_bytes)
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
    head = _taken(stream, b"", _HEADER.size)
    if not head:
        raise EOFError("no further message")
    if len(head) == _HEADER.size and head[7] == _COMPRESSED:
        head = _taken(stream, head, _HEADER.size + _LENGTH.size)
    print_ = fingerprint(like)
    size = _size(memoryview(head), like, print_, min(max_tasks, num_tasks), max_bytes)
    message = _taken(stream, head, size)
    return _decoded(message, like, print_, num_tasks, max_tasks, max_bytes)


def _taken(stream: BinaryIO, start: bytes | bytearray, size: int) -> bytearray:
    """What is there of so many bytes, of which the start was read; memory is taken as they come."""
    data = bytearray(start)
    while len(data) < size:
        piece = stream.read(min(size - len(data), _PIECE))
        if not piece:
            break
        data += piece
    return data


def gather(
    messages: Mapping[int, bytes | WireError], like: PyTree, slots: Slots, *, round_number: int
) -> tuple[Unified, Slots, list[str]]:
    """Puts the uploads of a round together for `aggregate`, without those that are refused.

    No message is larger than `message_bytes` says for the tasks that its client holds.

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
            rows = np.flatnonzero((client == sender) & (weight > 0))
            held = sorted(task[rows].tolist())
            found = _decoded(message, like, print_, slots.num_tasks, max(len(held), 1), None)
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


def _vector_bytes(like: PyTree, precision: Precision) -> int:
    size = 0
    for leaf in jax.tree.leaves(like):
        count = _parameters(leaf)
        if precision == "int8":
            size += count + 4 * -(-count // BLOCK)
        else:
            size += count * (2 if precision == "bfloat16" else jnp.dtype(leaf.dtype).itemsize)
    return size


def _mask_bytes(like: PyTree, tasks: int) -> int:
    return sum(tasks * -(-_parameters(leaf) // 8) for leaf in jax.tree.leaves(like))


def _parameters(leaf: Any) -> int:
    return int(np.prod(leaf.shape, dtype=np.int64))


_round = jax.jit(rounded, static_argnames="precision")


@_quietly
def _written(
    vector: PyTree, precision: Precision
) -> tuple[list[np.ndarray], list[tuple[str, np.ndarray]]]:
    """The arrays that are written of a vector, and the leaves that the other side makes of them."""
    items = [(path, np.asarray(leaf)) for path, leaf in leaf_items(vector)]
    if precision == "float32":
        return [leaf for _, leaf in items], items
    arrays, leaves = [], []
    for path, leaf in items:
        part = _round(leaf[None], precision=precision)
        if isinstance(part, Blocks):
            arrays += [np.asarray(part.values)[0], np.asarray(part.scales)[0]]
            flat = _product(*arrays[-2:])
        else:
            arrays.append(np.asarray(part)[0])
            flat = arrays[-1]
        leaves.append((path, _cast(flat, leaf)))
    return arrays, leaves


def _product(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Numbers from int8 `[parameters]` and float32 `[ceil(parameters / 256)]`, in float32."""
    numbers = values.astype(np.float32)
    whole = numbers.size - numbers.size % BLOCK
    numbers[:whole].reshape(-1, BLOCK)[:] *= scales[: whole // BLOCK, None]
    numbers[whole:] *= scales[whole // BLOCK :]
    return numbers


def _cast(flat: np.ndarray, like: Any) -> np.ndarray:
    """Numbers in a leaf's own shape and dtype."""
    return flat.astype(like.dtype, copy=False).reshape(like.shape)


def _compressed(masks: bytes) -> bytes | None:
    """The masks as a zlib stream, or None where that makes the message no smaller."""

    def deflated(strategy: int) -> bytes:
        # The level does not matter: these two strategies do not search for matches.
        work = zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, strategy)
        return work.compress(masks) + work.flush()

    packed = deflated(zlib.Z_HUFFMAN_ONLY)
    if 4 * len(packed) < len(masks):  # most bytes are one and the same; a byte costs a bit at least
        packed = min(packed, deflated(zlib.Z_RLE), key=len)
    return packed if len(packed) + _LENGTH.size < len(masks) else None


def _decompressed(packed: memoryview, size: int) -> bytes:
    """Masks of a known size; never allocates more than that for them."""
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


def _words(leaf: np.ndarray) -> np.ndarray:
    """A leaf's numbers as unsigned integers in little-endian order."""
    bits = np.dtype(f"u{leaf.dtype.itemsize}")
    return np.ascontiguousarray(leaf).reshape(-1).view(bits).astype(bits.newbyteorder("<"))


def _size(
    head: memoryview, like: PyTree, expected: bytes, max_tasks: int, max_bytes: int | None
) -> int:
    """Checks the first bytes of a message, and computes the size of all of it."""
    if len(head) < _HEADER.size:
        raise WireError(
            f"the message is truncated: found {len(head)} bytes, expected {_HEADER.size} or more."
        )
    magic, version, written, kind, form, _, _, tasks, tree = _HEADER.unpack(head[: _HEADER.size])
    if magic != b"MATU":
        raise WireError(f'bytes 0 to 3: found {magic!r}, expected b"MATU": this is no unified.')
    if version != VERSION:
        raise WireError(f"byte 4: found version {version}, expected {VERSION}.")
    if written not in _PRECISIONS.values():
        raise WireError(f"byte 5: found {written}, expected 0 (as it is), 1 (bfloat16), 2 (int8).")
    if kind not in _KINDS.values():
        raise WireError(f"byte 6: found {kind}, expected 1 (upload) or 2 (download).")
    if form > _COMPRESSED or (form == _NO_MASKS and tasks > 1):
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
    precision = _named(_PRECISIONS, written)
    size = message_bytes(like, tasks, modulators=form != _NO_MASKS, precision=precision)
    if max_bytes is not None and size > max_bytes:  # decompressed, it is as large
        raise WireError(f"the message is too large: {size} bytes, expected at most {max_bytes}.")
    if form != _COMPRESSED:
        return size
    if len(head) < _HEADER.size + _LENGTH.size:
        raise WireError(
            f"the message is truncated: found {len(head)} bytes, expected "
            f"{_HEADER.size + _LENGTH.size} or more."
        )
    (packed,) = _LENGTH.unpack(head[_HEADER.size :])
    masks = _mask_bytes(like, tasks)
    if packed + _LENGTH.size >= masks:
        raise WireError(
            f"bytes 36 to 43: found {packed} bytes of compressed masks, expected fewer than "
            f"{max(masks - _LENGTH.size, 0)}: otherwise they are not compressed."
        )
    return size - masks + packed + _LENGTH.size


def _named(codes: Mapping[Name, int], code: int) -> Name:
    return next(name for name, number in codes.items() if number == code)


@_quietly
def _parse(view: memoryview, like: PyTree, num_tasks: int) -> Received:
    """Reads a message of the right size."""
    (checksum,) = struct.unpack("<I", view[-4:])
    found = zlib.crc32(view[:-4])
    if checksum != found:
        raise WireError(
            f"the message is damaged: its checksum is {found:08x}, and it says {checksum:08x}."
        )
    _, _, written, kind, form, number, client, count, _ = _HEADER.unpack(view[: _HEADER.size])
    precision = _named(_PRECISIONS, written)
    at = _HEADER.size + (_LENGTH.size if form == _COMPRESSED else 0)

    def take(dtype: str, items: int) -> np.ndarray:
        nonlocal at
        array = np.frombuffer(view, dtype, items, at)
        at += array.nbytes
        return array

    ids = take("<u4", count).astype(np.int64)
    _check_ids(ids, num_tasks)
    scales = take("<f4", count).astype(np.float32) if form != _NO_MASKS else None
    leaves = [(path, _leaf(path, leaf, precision, take)) for path, leaf in leaf_items(like)]
    masks = []
    if scales is None:
        masks, scales = _trivial([leaf for _, leaf in leaves])
    else:
        packed = view[at:-4]
        flat = np.frombuffer(
            _decompressed(packed, _mask_bytes(like, count)) if form == _COMPRESSED else packed,
            np.uint8,
        )
        start = 0
        for _, leaf in leaves:
            width = -(-leaf.size // 8)
            masks.append(flat[start : start + count * width].reshape(count, width))
            start += count * width
    _check(ids, scales, leaves, masks)
    treedef = jax.tree.structure(like)
    unified = Unified(
        treedef.unflatten([leaf for _, leaf in leaves]),
        treedef.unflatten(masks),
        cast(jax.Array, scales),
    )
    return Received(_named(_KINDS, kind), number, client, tuple(ids.tolist()), precision, unified)


def _leaf(
    path: str, like: Any, precision: Precision, take: Callable[[str, int], np.ndarray]
) -> np.ndarray:
    """Reads a leaf of the vector, in the leaf's own shape and dtype."""
    count = _parameters(like)
    if precision == "int8":
        values, scales = take("i1", count), take("<f4", -(-count // BLOCK)).astype(np.float32)
        if count and values.min() < -127:
            raise WireError(f"leaf {path}: found -128, expected numbers from -127 to 127.")
        wrong = np.flatnonzero(~(np.isfinite(scales) & (scales >= 0)))
        if wrong.size:
            raise WireError(
                f"leaf {path}: the scale of block {wrong[0]} is {scales[wrong[0]]}, expected a "
                "finite number, 0 or more."
            )
        return _cast(_product(values, scales), like)
    dtype = jnp.dtype(jnp.bfloat16 if precision == "bfloat16" else like.dtype)
    words = take(f"<u{dtype.itemsize}", count).astype(f"u{dtype.itemsize}", copy=False)
    return _cast(words.view(dtype), like)


def _check_ids(ids: np.ndarray, num_tasks: int) -> None:
    """Checks the tasks of a message."""
    unique, counts = np.unique(ids, return_counts=True)
    if not unique.size:
        raise WireError("found no task, expected at least one.")
    if counts.max() > 1:
        raise WireError(f"task {unique[counts.argmax()]}: found {counts.max()} times.")
    if unique[-1] >= num_tasks:
        raise WireError(f"task {unique[-1]}: unknown, expected 0 to {num_tasks - 1}.")


@_quietly
def _check(
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
        unused = -leaf.size % 8
        if unused and (mask[:, -1] >> (8 - unused)).any():
            raise WireError(f"masks: leaf {path}: a bit after the last parameter is set.")


def _trivial(leaves: Sequence[np.ndarray]) -> tuple[list[np.ndarray], np.ndarray]:
    """Masks and scales of a unified of one task."""
    masks = [np.packbits((leaf != 0).reshape(1, -1), axis=1, bitorder="little") for leaf in leaves]
    return masks, np.array([float(any(mask.any() for mask in masks))], np.float32)


def _says_nothing(
    scales: np.ndarray, masks: Sequence[np.ndarray], leaves: Sequence[np.ndarray]
) -> bool:
    """Whether masks and scale of one task follow from its vector."""
    expected, scale = _trivial(leaves)
    return scales[0] == scale[0] and all(
        ((mask & ones) == ones).all() for mask, ones in zip(masks, expected, strict=True)
    )
