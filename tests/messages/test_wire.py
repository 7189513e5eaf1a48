"""Messages: bytes and back, the documented layout, damage of every kind, and the server's round."""

import dataclasses
import hashlib
import io
import struct
import tracemalloc
import zlib
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from federations import TINY, one_device
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import matu_jax as matu
from matu_jax import algorithms
from matu_jax.aggregation.storage import pack
from matu_jax.config import EvaluationConfig, MatuConfig
from matu_jax.messages import wire
from matu_jax.messages.clients import gather, of_client
from matu_jax.messages.layout import (
    Precision,
    WireError,
    fingerprint,
    message_bytes,
    overhead_bytes,
)
from matu_jax.messages.quantisation import restored, rounded
from matu_jax.messages.traffic import frame_bits, message_bits
from matu_jax.simulation import rounds
from matu_jax.trees import leaf_items

SLOTS = matu.Slots(
    np.array([0, 0, 1, 2, 2]),
    np.array([2, 0, 1, 1, 2]),
    np.array([4.0, 4.0, 2.0, 3.0, 3.0], np.float32),
    3,
    3,
)


def tree(rows, seed=0, dtypes=("float32", "bfloat16", "float16")):
    rng = np.random.default_rng(seed)

    def leaf(shape, dtype):
        return jnp.asarray(rng.normal(size=(*rows, *shape)), dtype)

    return {
        "b": {"w": leaf((3, 5), dtypes[0]), "a": leaf((7,), dtypes[1])},
        "c": [leaf((), dtypes[2]), leaf((2, 0), dtypes[0])],
    }


def like(*arguments, **fields):
    return tree((), *arguments, **fields)


def unified(tasks=3, seed=0, **fields):
    return matu.unify(tree((tasks,), seed, **fields))


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def resealed(data):
    """A message that was changed on purpose, with the checksum of what it says now."""
    body = bytes(data[:-4])
    return body + struct.pack("<I", zlib.crc32(body))


@pytest.mark.parametrize("tasks", [1, 2, 3, 9])
@pytest.mark.parametrize("dtypes", [("float32",) * 3, ("float32", "bfloat16", "float16")])
def test_what_goes_in_comes_out(tasks, dtypes):
    sent = unified(tasks, dtypes=dtypes)
    ids = [7 * t + 1 for t in reversed(range(tasks))]
    data = wire.encode(sent, ids, kind="download", client=5, round_number=11)
    found = wire.decode(data, like(dtypes=dtypes))
    assert (found.kind, found.round, found.client, found.tasks) == ("download", 11, 5, tuple(ids))
    assert_same(found.unified, sent)
    assert len(data) == message_bytes(like(dtypes=dtypes), tasks)
    assert wire.encode(found.unified, ids, kind="download", client=5, round_number=11) == data
    assert_same(matu.modulate(found.unified), matu.modulate(sent))


def test_the_layout_is_the_documented_one():
    rows = {"x": jnp.array([[1.0, -2.0, 0.5], [3.0, 1.0, 0.5]])}
    sent = matu.unify(rows, magnitude="max")
    data = wire.encode(sent, [4, 9], client=3, round_number=2)
    tree_hash = hashlib.sha256(b"x float32 3\n").digest()[:16]
    expected = b"MATU" + bytes([3, 0, 1, 1]) + struct.pack("<III", 2, 3, 2) + tree_hash
    expected += struct.pack("<II", 4, 9)
    expected += struct.pack("<ff", *np.asarray(sent.scales))
    expected += struct.pack("<fff", 3.0, -2.0, 0.5)
    expected += bytes([0b111, 0b101])
    expected += struct.pack("<I", zlib.crc32(expected))
    assert data == expected


def test_masks_and_scales_are_left_out_only_where_they_say_nothing():
    for vector, scale in (([1.0, 0.0, -2.0], 1.0), ([0.0, 0.0, 0.0], 0.0)):
        sent = matu.unify({"x": jnp.array([vector])})
        data = wire.encode(sent, [0])
        assert len(data) == overhead_bytes(1) + 12
        assert np.asarray(sent.scales).tolist() == [scale]
        assert_same(wire.decode(data, {"x": jnp.zeros(3)}).unified, sent)
    scaled = sent._replace(scales=jnp.array([2.0]))
    data = wire.encode(scaled, [0])
    assert len(data) == message_bytes({"x": jnp.zeros(3)}, 1, modulators=True)
    assert_same(wire.decode(data, {"x": jnp.zeros(3)}).unified, scaled)


LOSSY: tuple[Precision, ...] = ("bfloat16", "int8")


def wide(rows=(), seed=0, dtypes=("float32", "bfloat16", "float16")):
    """Leaves of more than a block, of whole blocks, of a part of one, and of nothing."""
    rng = np.random.default_rng(seed)
    shapes = {"a": (2, 150), "b": (512,), "c": (3, 7), "d": (0, 2)}
    return {
        name: jnp.asarray(rng.normal(size=(*rows, *shape)), dtypes[i % 3])
        for i, (name, shape) in enumerate(shapes.items())
    }


def sent_as(vector, precision):
    """What the simulation makes of a vector that has crossed the network."""
    rows = jax.tree.map(lambda x: x[None], vector)
    return jax.tree.map(lambda x: x[0], restored(rounded(rows, precision), rows))


@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("dtypes", [("float32",) * 3, ("float32", "bfloat16", "float16")])
@pytest.mark.parametrize("precision", LOSSY)
def test_fewer_bits_are_those_of_the_simulation(tasks, dtypes, precision):
    sent = matu.unify(wide((tasks,), 5, dtypes))
    data = wire.encode(sent, range(tasks), precision=precision)
    found = wire.decode(data, wide(dtypes=dtypes))
    assert found.precision == precision
    assert len(data) == message_bytes(wide(dtypes=dtypes), tasks, precision=precision)
    expected = sent._replace(vector=sent_as(sent.vector, precision))
    assert_same(found.unified.vector, expected.vector)
    assert_same(matu.modulate(found.unified), matu.modulate(expected))
    if tasks > 1:
        assert_same(found.unified, expected)


def numbers_of(data, at, count, precision):
    """Reads a leaf as the docstring says, number by number."""
    if precision == "float32":
        return list(struct.unpack_from(f"<{count}f", data, at)), at + 4 * count
    if precision == "bfloat16":
        halves = struct.unpack_from(f"<{count}H", data, at)
        return [struct.unpack("<f", struct.pack("<I", h << 16))[0] for h in halves], at + 2 * count
    whole = struct.unpack_from(f"<{count}b", data, at)
    blocks = (count + 255) // 256
    scales = struct.unpack_from(f"<{blocks}f", data, at + count)
    numbers = [np.float32(w) * np.float32(scales[i // 256]) for i, w in enumerate(whole)]
    return numbers, at + count + 4 * blocks


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("precision", ["float32", *LOSSY])
def test_another_language_can_read_it(precision, compress):
    """A reader written from the docstring alone, with struct and zlib."""
    rng = np.random.default_rng(0)
    vectors = {"x": rng.normal(size=(2, 300)) + 2, "y": rng.normal(size=(2, 9)) + 2}
    sent = matu.unify(jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), vectors))
    data = wire.encode(sent, [4, 9], client=3, precision=precision, compress=compress)
    written = {"float32": 0, "bfloat16": 1, "int8": 2}[precision]
    assert data[4:8] == bytes([3, written, 1, 1 + compress])
    at, packed = 36, 0
    if compress:
        (packed,), at = struct.unpack_from("<Q", data, at), 44
    assert struct.unpack_from("<II", data, at) == (4, 9)
    assert struct.unpack_from("<ff", data, at + 8) == tuple(np.asarray(sent.scales).tolist())
    at += 16
    for name, count in (("x", 300), ("y", 9)):
        found, at = numbers_of(data, at, count, precision)
        expected = np.asarray(sent_as(sent.vector, precision)[name])
        np.testing.assert_array_equal(np.array(found, np.float32), expected)
    masks = data[at:-4]
    if compress:
        assert len(masks) == packed
        masks = zlib.decompress(masks)
    assert masks == b"".join(np.asarray(sent.masks[name]).tobytes() for name in "xy")


def with_masks(density, size=40_000, tasks=2, seed=0):
    bits = np.random.default_rng(seed).random((tasks, size)) < density
    masks = pack(bits)
    return matu.Unified({"x": np.ones(size, np.float32)}, {"x": masks}, jnp.ones(tasks))


@pytest.mark.parametrize("density", [0.7, 0.8, 0.9, 0.99, 1.0])
def test_masks_are_compressed_towards_their_entropy(density):
    sent, size, tree = with_masks(density), 40_000, {"x": jnp.zeros(40_000)}
    plain = wire.encode(sent, [0, 1])
    data = wire.encode(sent, [0, 1], compress=True)
    assert_same(wire.decode(data, tree).unified, jax.tree.map(np.asarray, sent))
    assert_same(wire.read(io.BytesIO(data), tree).unified, jax.tree.map(np.asarray, sent))
    bits = 2 * size - 8 * (len(plain) - len(data))
    parts = [p * -np.log2(p) for p in (density, 1 - density) if p > 0]
    assert bits < max(1.05 * sum(parts), sum(parts) + 0.06) * 2 * size
    if density < 0.99:
        assert bits > 2 * size * sum(parts) * 0.97  # a sample's own entropy is a little off


def test_masks_that_compression_does_not_shorten_stay_as_they_are():
    for sent in (with_masks(0.5), with_masks(1.0, size=20), matu.unify(tree((1,)))):
        tasks = range(len(sent.scales))
        assert wire.encode(sent, tasks, compress=True) == wire.encode(sent, tasks)


def forged_masks(stream, tasks=2, size=40_000, length=None):
    """A valid message whose compressed masks are replaced."""
    data = wire.encode(with_masks(0.99, size, tasks), range(tasks), compress=True)
    (packed,) = struct.unpack_from("<Q", data, 36)
    length = len(stream) if length is None else length
    changed = data[:36] + struct.pack("<Q", length) + data[44 : -4 - packed] + stream
    return resealed(changed + b"    ")


@pytest.mark.parametrize(
    ("stream", "words"),
    [
        (zlib.compress(bytes(9_999)), "masks: found 9999 bytes of what was compressed, expected"),
        (zlib.compress(bytes(10_001)), "masks: found more than 10000 bytes"),
        (zlib.compress(bytes(10_000)) + b"xy", "masks: found 2 bytes after the end of what was"),
        (zlib.compress(bytes(10_000))[:-1], "masks: found no end of what was compressed"),
        (zlib.compress(bytes(10_000))[:-4] + b"adle", "masks: cannot be decompressed"),
        (b"this is not zlib's", "masks: cannot be decompressed"),
        (b"", "masks: found 0 bytes"),
    ],
)
def test_compressed_masks_that_are_wrong_are_refused(stream, words):
    with pytest.raises(WireError) as error:
        wire.decode(forged_masks(stream), {"x": jnp.zeros(40_000)})
    assert words in str(error.value)


@pytest.mark.parametrize("length", [9_992, 10_000, 2**31, 2**64 - 1])
def test_compressed_masks_are_shorter_than_masks(length):
    data, tree = forged_masks(zlib.compress(bytes(10_000)), length=length), {"x": jnp.zeros(40_000)}
    stream = Greedy(data)
    for read in (lambda: wire.decode(data, tree), lambda: wire.read(stream, tree)):
        with pytest.raises(WireError, match=f"found {length} bytes .*fewer than 9992"):
            read()
    assert stream.asked == 36
    whole = message_bytes(tree, 2)
    assert len(wire.encode(with_masks(0.99), [0, 1], compress=True)) < whole


def test_a_bomb_gets_no_more_memory_than_masks_have():
    """Half a gigabyte in half a megabyte; the tree's masks have 1 MB."""
    size = 4_000_000
    bomb = zlib.compress(bytes(500_000_000), 9)
    data, tree = forged_masks(bomb, size=size), {"x": jax.ShapeDtypeStruct((size,), "float32")}
    tracemalloc.start()
    try:
        with pytest.raises(WireError, match="found more than 1000000 bytes"):
            wire.decode(data, tree)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2 * size / 8 * 2 + 4 * size + 1_000_000  # twice the masks, and the vector


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d[:64] + b"\x80" + d[65:], "leaf a: found -128, expected numbers from -127"),
        (
            lambda d: d[:360] + b"\0\0\xc0\x7f" + d[364:],
            "leaf a: the scale of block 0 is nan, expected a finite number",
        ),
        (
            lambda d: d[:364] + b"\0\0\x80\xbf" + d[368:],
            "leaf a: the scale of block 1 is -1.0, expected a finite number",
        ),
        (
            lambda d: d[:360] + b"\xff\xff\x7f\x7f" + d[364:],
            "numbers are not finite",  # the scale is, its products are not
        ),
    ],
)
def test_wrong_blocks_are_said(change, words):
    """Three tasks: header 36, ids 12, scales 12; 300 numbers from 60, their scales from 360."""
    data = wire.encode(matu.unify(wide((3,))), [0, 1, 2], precision="int8")
    with pytest.raises(WireError) as error:
        wire.decode(resealed(change(data)), wide())
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("precision", "dtype", "value"),
    [("bfloat16", "float32", 3.4e38), ("bfloat16", "float16", 65504.0)],
)
def test_what_rounds_to_infinity_is_not_written(precision, dtype, value):
    sent = matu.Unified(
        {"x": np.full(3, value, dtype)}, {"x": np.full((1, 1), 7, np.uint8)}, jnp.ones(1)
    )
    assert wire.encode(sent, [0])
    with pytest.raises(WireError, match="leaf x: 3 of 3 numbers are not finite"):
        wire.encode(sent, [0], precision=precision)


@pytest.mark.parametrize("downloads", ["unified", "task_vectors"])
@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_bits_are_those_that_a_run_reports(federation, model, precision, downloads):
    """A real run, one client absent in round 2: every message of every client, to the bit."""
    config = dataclasses.replace(
        TINY,
        rounds=2,
        matu=MatuConfig(precision=precision, downloads=downloads),
        evaluation=EvaluationConfig(every_rounds=9, batch_examples=16),
    )
    algorithm = algorithms.build(config)
    # The last client has a single task.
    held = federation._replace(
        slots=first_slots(federation.slots, 5),
        indices=federation.indices[:5],
        trace={2: {0: "x"}},
    )

    def aggregate(state, uploads, slots):
        new, metrics = algorithm.aggregate(state[0], uploads, slots)
        return (new, uploads), metrics

    def init(base, slots):
        zero = jax.tree.map(lambda x: jnp.zeros((5, *x.shape), x.dtype), base)
        return algorithm.init(base, slots), algorithm.upload(zero, slots)

    recording = algorithm._replace(
        init=init,
        download=lambda state, slots: algorithm.download(state[0], slots),
        aggregate=aggregate,
        traffic=algorithm.traffic._replace(
            sent=lambda state, uploads: algorithm.traffic.sent(state[0], uploads)
        ),
    )
    state = algorithm.init(model.base, held.slots)
    for result in rounds.run(config, recording, model, held, mesh=one_device()):
        there = [c for c in range(3) if not (result.round == 2 and c == 0)]
        up = encoded(result.state[1], held.slots, "upload", there, precision)
        if downloads == "unified":
            down = encoded(state.downloads, held.slots, "download", range(3), precision)
        else:
            down = one_for_each_task(algorithm, state, model.base, held.slots, precision)
        frames = frame_bits(algorithm.traffic, held.slots)
        sent = jax.eval_shape(algorithm.traffic.sent, result.state[0], result.state[1])
        for messages, message, frame in zip((up, down), sent, frames, strict=True):
            payload = message_bits(message, held.slots)
            for client, data in messages.items():
                assert 8 * len(data) == payload[client] + frame[client]
        for name, messages in (("uplink", up), ("downlink", down)):
            reported = result.record[f"{name}_bits"] + result.record[f"{name}_frame_bits"]
            assert 8 * sum(map(len, messages.values())) == reported
        if result.round != 2:
            found, _, refused = gather(up, model.base, held.slots, round_number=1)
            assert not refused
            # Numbers that were rounded before hardly move when they are rounded again.
            jax.tree.map(
                lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6),
                found.vector,
                result.state[1].vector,
            )
        state = jax.tree.map(np.array, result.state[0])
    assert overhead_bytes(2) == 36 + 4 * 2 + 4


def one_for_each_task(algorithm, state, base, slots, precision):
    """All messages of a client in a row; what it reads in them is where its slots start."""
    messages, starts = {}, algorithm.download(state, slots)
    for row, (client, task) in enumerate(
        zip(slots.client.tolist(), slots.task.tolist(), strict=True)
    ):
        vector = jax.tree.map(lambda x, task=task: x[task][None], state.server.task_vectors)
        alone = matu.Slots(*map(jnp.array, ([0], [0], [1.0])), num_clients=1, num_tasks=1)
        one, _ = of_client(matu.unify(vector, alone), alone, 0)
        data = wire.encode(one, [task], kind="download", client=client, precision=precision)
        read = wire.decode(data, base).unified.vector
        jax.tree.map(lambda x, y, row=row: np.testing.assert_array_equal(x, y[row]), read, starts)
        messages[client] = messages.get(client, b"") + data
    return messages


def encoded(unified, slots, kind, clients, precision):
    messages = {}
    for client in clients:
        one, tasks = of_client(unified, slots, client)
        messages[client] = wire.encode(
            one, tasks, kind=kind, client=client, round_number=1, precision=precision
        )
    return messages


def first_slots(slots, count):
    columns = (x[:count] for x in (slots.client, slots.task, slots.weight))
    return matu.Slots(*columns, num_clients=slots.num_clients, num_tasks=slots.num_tasks)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d[:-1], "is truncated: found 151 bytes, expected 152"),
        (lambda d: d[:20], "is truncated: found 20 bytes, expected 36 or more"),
        (lambda d: b"", "is truncated: found 0 bytes"),
        (lambda d: d + b"x", "is too long: found 153 bytes, expected 152"),
        (lambda d: b"P" + d[1:], "bytes 0 to 3: found b'PATU'"),
        (lambda d: d[:4] + b"\1" + d[5:], "byte 4: found version 1, expected 3"),
        (lambda d: d[:5] + b"\3" + d[6:], "byte 5: found 3, expected 0"),
        (lambda d: d[:6] + b"\3" + d[7:], "byte 6: found 3, expected 1 (upload) or 2"),
        (lambda d: d[:7] + b"\0" + d[8:], "byte 7: found 0, expected 1"),
        (lambda d: d[:7] + b"\3" + d[8:], "byte 7: found 3"),
        (lambda d: d[:16] + b"\0\0\0\0" + d[20:], "bytes 16 to 19: found 0 tasks, expected 1 to 5"),
        (lambda d: d[:16] + b"\xff" * 4 + d[20:], "found 4294967295 tasks, expected 1 to 5"),
        (lambda d: d[:20] + bytes(16) + d[36:], "bytes 20 to 35: found parameter tree 0000"),
        (lambda d: d[:60] + bytes([d[60] ^ 1]) + d[61:], "is damaged: its checksum is"),
        (lambda d: resealed(d[:36] + d[40:44] + d[40:]), "task 1: found 2 times"),
        (lambda d: resealed(d[:36] + b"\x09" + d[37:]), "task 9: unknown, expected 0 to 4"),
        (lambda d: resealed(d[:48] + b"\0\0\xc0\x7f" + d[52:]), "task 0: its scale is nan"),
        (lambda d: resealed(d[:48] + b"\0\0\x80\xbf" + d[52:]), "task 0: its scale is -1.0"),
        (
            lambda d: resealed(d[:60] + b"\x80\x7f" + d[62:]),
            "leaf b/a: 1 of 7 numbers are not finite, the first at position 0",
        ),
        (lambda d: resealed(d[:-5] + b"\xff" + d[-4:]), "a bit after the last parameter is set"),
    ],
)
def test_what_is_wrong_is_said(change, words):
    data = wire.encode(unified(), [0, 1, 2])
    with pytest.raises(WireError) as error:
        wire.decode(change(data), like(), num_tasks=5, max_tasks=8)
    assert words in str(error.value)


def test_every_flipped_bit_is_noticed():
    data = wire.encode(unified(2), [0, 1])
    for bit in range(8 * len(data)):
        wrong = bytearray(data)
        wrong[bit // 8] ^= 1 << bit % 8
        with pytest.raises(WireError):
            wire.decode(wrong, like())


def test_another_tree_is_refused():
    data = wire.encode(unified(), [0, 1, 2])
    for other in (like(dtypes=("float32",) * 3), {"b": like()["b"]}, {"x": jnp.zeros(26)}):
        with pytest.raises(WireError, match="parameter tree"):
            wire.decode(data, other)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tasks": [0, 0, 1]}, "task 0: found 2 times"),
        ({"tasks": [0, 1]}, r"scales: found \[3\], expected \[2\]"),
        ({"tasks": [0, 1, -1]}, "task: found -1"),
        ({"client": 2**32}, "client: found 4294967296"),
        ({"round_number": -1}, "round: found -1"),
        ({"kind": "letter"}, "kind: found .letter."),
        ({"precision": "int4"}, "precision: found .int4., expected one of .float32., .bfloat16."),
    ],
)
def test_what_would_be_refused_is_not_written(change, words):
    with pytest.raises(WireError, match=words):
        wire.encode(unified(), **({"tasks": [0, 1, 2]} | change))


def test_infinities_of_both_signs_are_no_warning():
    data = bytearray(wire.encode(matu.unify({"x": jnp.array([[1.0, -1.0]])}), [0]))
    data[40:48] = struct.pack("<ff", np.inf, -np.inf)
    with pytest.raises(WireError, match="leaf x: 2 of 2 numbers are not finite"):
        wire.decode(resealed(data), {"x": jnp.zeros(2)})


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_signalling_nan_is_no_warning(dtype):
    data = wire.encode(matu.unify({"x": jnp.ones((1, 2), dtype)}), [0])
    signalling = {"bfloat16": 0x7F81, "float16": 0x7C01}[dtype]
    data = resealed(data[:40] + struct.pack("<HH", signalling, signalling) + data[44:])
    with pytest.raises(WireError, match="leaf x: 2 of 2 numbers are not finite"):
        wire.decode(data, {"x": jnp.zeros(2, dtype)})


def test_values_and_dtypes_that_would_be_refused_are_not_written():
    sent = unified(1)
    bad = jax.tree.map(lambda x: x + jnp.asarray(jnp.inf, x.dtype), sent.vector)
    with pytest.raises(WireError, match="leaf b/a: 7 of 7 numbers are not finite"):
        wire.encode(sent._replace(vector=bad), [0])
    whole = matu.Unified(
        {"x": np.zeros(3, np.int32)}, {"x": np.zeros((1, 1), np.uint8)}, jnp.ones(1)
    )
    with pytest.raises(WireError, match="leaf x: found int32, expected one of float32"):
        wire.encode(whole, [0])


def test_a_stream_is_read_message_by_message_and_no_further():
    first, second = (wire.encode(unified(k, k), range(k)) for k in (2, 3))
    stream = io.BytesIO(first + second + second[:30])
    assert wire.read(stream, like()).tasks == (0, 1)
    assert stream.tell() == len(first)
    assert wire.read(stream, like()).tasks == (0, 1, 2)
    with pytest.raises(WireError, match="truncated"):
        wire.read(stream, like())
    with pytest.raises(EOFError):
        wire.read(stream, like())


class Greedy(io.BytesIO):
    """A stream that notes how much was asked of it."""

    asked = 0

    def read(self, size=-1):
        self.asked = max(self.asked, size)
        return super().read(size)


def test_nothing_is_allocated_before_it_is_known_to_fit():
    data = bytearray(wire.encode(unified(2), [0, 1]))
    data[16:20] = b"\xff\xff\xff\x7f"
    stream = Greedy(bytes(data))
    with pytest.raises(WireError, match="expected 1 to 64"):
        wire.read(stream, like(), max_tasks=64)
    assert stream.asked == 36

    whole = wire.encode(unified(3), [0, 1, 2])
    limit = len(whole) - 1
    stream = Greedy(whole)
    words = f"too large: {len(whole)} bytes, expected at most {limit}"
    with pytest.raises(WireError, match=words):
        wire.read(stream, like(), max_bytes=limit)
    assert stream.asked == 36
    with pytest.raises(WireError, match=words):
        wire.decode(whole, like(), max_bytes=limit)
    assert wire.decode(whole, like(), max_bytes=len(whole)).tasks == (0, 1, 2)

    # Masks that would be large when decompressed count as large.
    sent, there = with_masks(1.0), {"x": jnp.zeros(40_000)}
    small = wire.encode(sent, [0, 1], compress=True)
    largest = message_bytes(there, 2)
    assert len(small) < largest
    stream = Greedy(small)
    with pytest.raises(WireError, match=f"too large: {largest} bytes"):
        wire.read(stream, there, max_bytes=len(small))
    assert stream.asked == 36
    assert wire.decode(small, there, max_bytes=largest).tasks == (0, 1)


class Promising(io.BytesIO):
    """A stream like a pipe, with few bytes at a time, that would allocate whatever is asked."""

    def __init__(self, data):
        super().__init__(data)
        self.asked = 0

    def read(self, size=-1):
        self.asked = max(self.asked, size or 0)
        return super().read(min(size or 0, 1000))


def test_memory_is_taken_as_bytes_come_whatever_a_header_promises():
    large = {"x": jax.ShapeDtypeStruct((10**10,), jnp.float32)}
    head = bytearray(wire.encode(unified(2), [0, 1])[:36])
    head[20:36] = fingerprint(large)
    tracemalloc.start()
    stream = Promising(bytes(head) + bytes(5000))
    with pytest.raises(WireError, match="truncated: found 5036 bytes, expected 4"):
        wire.read(stream, large)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert stream.asked <= 2**20
    assert peak < 2**23


def test_a_stream_may_give_a_message_in_pieces():
    message = wire.encode(with_masks(1.0), [0, 1], compress=True)
    there = {"x": jnp.zeros(40_000)}
    found, whole = wire.read(Promising(message + b"more"), there), wire.decode(message, there)
    assert found.tasks == whole.tasks
    for one, other in zip(
        jax.tree.leaves(found.unified), jax.tree.leaves(whole.unified), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_no_message_has_more_tasks_than_there_are():
    message = wire.encode(unified(3), [0, 1, 2])
    for read in (
        wire.decode,
        lambda data, *args, **words: wire.read(io.BytesIO(data), *args, **words),
    ):
        with pytest.raises(WireError, match="found 3 tasks, expected 1 to 2"):
            read(message, like(), num_tasks=2)


def test_a_round_over_messages_is_the_round_over_arrays():
    uploads = matu.unify(tree((5,)), SLOTS)
    messages = {}
    for client in range(3):
        one, tasks = of_client(uploads, SLOTS, client)
        # Clients list their tasks in an order of their own.
        order = list(reversed(range(len(tasks))))
        one = one._replace(
            masks=jax.tree.map(lambda m, o=order: m[np.array(o)], one.masks),
            scales=one.scales[np.array(order)],
        )
        messages[client] = wire.encode(one, [tasks[i] for i in order], client=client)
    found, slots, refused = gather(messages, like(), SLOTS, round_number=0)
    assert refused == []
    assert_same(jax.tree.map(jnp.asarray, found), uploads)
    assert_same(matu.aggregate(found, slots), matu.aggregate(uploads, SLOTS))


def test_the_server_goes_on_without_those_it_refuses():
    uploads = matu.unify(tree((5,)), SLOTS)
    good = {}
    for client in range(3):
        one, tasks = of_client(uploads, SLOTS, client)
        good[client] = wire.encode(one, tasks, client=client, round_number=4)
    wrong = {
        "checksum": good[0][:-1] + bytes([good[0][-1] ^ 1]),
        "expected an upload of client 0, round 4": good[1],
        "no answer in 30 s": WireError("no answer in 30 s"),
    }
    for words, message in wrong.items():
        found, slots, refused = gather(good | {0: message}, like(), SLOTS, round_number=4)
        assert len(refused) == 1
        assert refused[0].startswith("client 0: ")
        assert words in refused[0]
        assert slots.weight.tolist() == [0, 0, 2, 3, 3]
        alone = matu.Slots(SLOTS.client, SLOTS.task, slots.weight, 3, 3)
        expected = matu.aggregate(matu.unify(tree((5,)), alone), alone)
        assert_same(matu.aggregate(found, slots).task_vectors, expected.task_vectors)
    _, slots, refused = gather({1: good[1]}, like(), SLOTS, round_number=4)
    assert (slots.weight.tolist(), refused) == ([0, 0, 2, 0, 0], [])
    one, _ = of_client(uploads, SLOTS, 0)
    other = wire.encode(one, [0, 1], client=0, round_number=4)
    _, _, refused = gather({0: other}, like(), SLOTS, round_number=4)
    assert refused == ["client 0: tasks: found [0, 1], expected [0, 2]."]


# Messages and their trees: as they are, and with fewer bits and compressed masks.
WIDE = matu.unify(jax.tree.map(jnp.abs, wide((3,))))
DATA = [(wire.encode(unified(k, k), range(k)), like()) for k in (1, 2, 3)]
DATA += [
    (wire.encode(WIDE, range(3), precision=precision, compress=True), wide())
    for precision in get_args(Precision)
]
EDITS = st.lists(st.tuples(st.integers(0, 200), st.binary(max_size=8), st.booleans()))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(message=st.sampled_from(DATA), edits=EDITS, from_end=st.booleans(), seal=st.booleans())
def test_edited_messages_are_read_or_refused(message, edits, from_end, seal):
    data, tree = bytearray(message[0]), message[1]
    for at, piece, replaces in edits:
        start = len(data) - at if from_end else at  # the masks are at the end
        start = max(start, 0)
        data[start : start + (len(piece) if replaces else 0)] = piece
    if seal and len(data) >= 4:
        data = resealed(data)
    try:
        found = wire.decode(data, tree, num_tasks=5, max_tasks=5)
    except WireError:
        return
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(found.unified))


SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)
LEAVES = st.tuples(SHAPES, st.sampled_from(["float32", "bfloat16", "float16"]))
NESTED = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text("abc/", min_size=1, max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)


def is_leaf(x):
    return isinstance(x, tuple)


@settings(max_examples=150, deadline=None)
@given(kinds=NESTED, tasks=st.integers(1, 9), seed=st.integers(0, 2**32 - 1), data=st.data())
def test_every_tree_and_every_number_comes_out_as_it_went_in(kinds, tasks, seed, data):
    """Of any nesting, shapes and dtypes; with zeros of both signs, subnormals and extremes."""
    rng = np.random.default_rng(seed)

    def leaf(kind):
        shape, dtype = kind
        bits = rng.integers(0, 2 ** (8 * jnp.dtype(dtype).itemsize), shape, np.uint32)
        found = bits.astype(f"u{jnp.dtype(dtype).itemsize}").view(jnp.dtype(dtype))
        return np.where(np.isfinite(found.astype(np.float32)), found, -np.zeros_like(found))

    def masks(x):
        bits = rng.random((tasks, x.size)) < 0.5
        return pack(bits)

    vector = jax.tree.map(leaf, kinds, is_leaf=is_leaf)
    scales = rng.integers(0, 2**31, tasks, np.uint32).view(np.float32)
    scales[~np.isfinite(scales)] = 0.0
    sent = matu.Unified(vector, jax.tree.map(masks, vector), scales)
    paths = [path for path, _ in leaf_items(vector)]
    ids = data.draw(st.permutations(range(tasks)))
    compress = data.draw(st.booleans())
    assume(paths and len(set(paths)) == len(paths))  # as every tree of parameters has them
    message = wire.encode(sent, ids, compress=compress)
    whole = len(wire.encode(sent, ids))  # compressed masks count as they are
    found = wire.read(io.BytesIO(message), vector, max_bytes=whole)
    assert found.tasks == tuple(ids)
    assert_same(found.unified, sent)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(edits=EDITS, sender=st.integers(-1, 3), seal=st.booleans())
def test_the_server_takes_or_refuses_what_was_edited(edits, sender, seal):
    uploads = matu.unify(tree((5,)), SLOTS)
    messages: dict = {}
    for client in range(3):
        one, tasks = of_client(uploads, SLOTS, client)
        messages[client] = wire.encode(one, tasks, client=client)
    changed = bytearray(messages.pop(max(sender, 0) % 3))
    for at, piece, replaces in edits:
        changed[at : at + (len(piece) if replaces else 0)] = piece
    messages[sender] = resealed(changed) if seal and len(changed) >= 4 else bytes(changed)
    found, slots, refused = gather(messages, like(), SLOTS, round_number=0)
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(found))
    present = set(SLOTS.client[slots.weight > 0].tolist())
    assert present <= set(messages)
    assert len(present) + len(refused) == len(messages)
    for client in present - {sender}:
        for sent, taken in zip(
            of_client(uploads, SLOTS, client),
            of_client(found, slots, client),
            strict=True,
        ):
            assert_same(jax.tree.map(jnp.asarray, taken), jax.tree.map(jnp.asarray, sent))


@settings(max_examples=100, deadline=None)
@given(
    masks=st.binary(max_size=400),
    size=st.integers(-1, 1),
    tail=st.binary(max_size=3),
    tasks=st.integers(1, 5),
)
def test_masks_of_any_length_are_read_or_refused(masks, size, tail, tasks):
    """Streams of zlib's that are whole, and hold what they should, or more, or less, or junk."""
    wanted = tasks * 25 + size
    stream = zlib.compress((masks * (wanted // max(len(masks), 1) + 1))[:wanted]) + tail
    data = forged_masks(stream, tasks, 200)
    try:
        found = wire.decode(data, {"x": jnp.zeros(200)})
    except WireError:
        return
    assert (size, tail) == (0, b"")
    assert np.asarray(found.unified.masks["x"]).tobytes() == zlib.decompress(stream)


@settings(deadline=None)
@given(data=st.binary(max_size=300))
def test_noise_is_refused(data):
    with pytest.raises(WireError):
        wire.decode(data, like())
