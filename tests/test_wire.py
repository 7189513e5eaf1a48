"""Messages: bytes and back, the documented layout, damage of every kind, and the server's round."""

import hashlib
import io
import struct
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import matu_jax as matu
from matu_jax import wire
from matu_jax.algorithms import message_bits
from matu_jax.algorithms.base import Message

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
    assert len(data) == wire.message_bytes(like(dtypes=dtypes), tasks)
    assert wire.encode(found.unified, ids, kind="download", client=5, round_number=11) == data
    assert_same(matu.modulate(found.unified), matu.modulate(sent))


def test_the_layout_is_the_documented_one():
    sent = matu.unify({"x": jnp.array([[1.0, -2.0, 0.5], [3.0, 1.0, 0.5]])})
    data = wire.encode(sent, [4, 9], client=3, round_number=2)
    tree_hash = hashlib.sha256(b"x float32 3\n").digest()[:16]
    expected = b"MATU" + bytes([2, 0, 1, 1]) + struct.pack("<III", 2, 3, 2) + tree_hash
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
        assert len(data) == wire.overhead_bytes(1) + 12
        assert np.asarray(sent.scales).tolist() == [scale]
        assert_same(wire.decode(data, {"x": jnp.zeros(3)}).unified, sent)
    scaled = sent._replace(scales=jnp.array([2.0]))
    data = wire.encode(scaled, [0])
    assert len(data) == wire.message_bytes({"x": jnp.zeros(3)}, 1, modulators=True)
    assert_same(wire.decode(data, {"x": jnp.zeros(3)}).unified, scaled)


def test_bits_are_those_of_the_accounting_and_the_documented_frame():
    uploads = matu.unify(tree((5,)), SLOTS)
    sent = Message(per_client=uploads.vector, per_shared_slot=(uploads.masks, uploads.scales))
    counted = message_bits(sent, SLOTS)
    for client in range(3):
        one, tasks = wire.of_client(uploads, SLOTS, client)
        frame = 8 * wire.overhead_bytes(len(tasks))
        assert 8 * len(wire.encode(one, tasks, client=client)) - frame == counted[client]
    assert wire.overhead_bytes(2) == 36 + 4 * 2 + 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d[:-1], "is truncated: found 151 bytes, expected 152"),
        (lambda d: d[:20], "is truncated: found 20 bytes, expected 36 or more"),
        (lambda d: b"", "is truncated: found 0 bytes"),
        (lambda d: d + b"x", "is too long: found 153 bytes, expected 152"),
        (lambda d: b"P" + d[1:], "bytes 0 to 3: found b'PATU'"),
        (lambda d: d[:4] + b"\1" + d[5:], "byte 4: found version 1, expected 2"),
        (lambda d: d[:5] + b"\3" + d[6:], "byte 5: found 3, expected 0"),
        (lambda d: d[:6] + b"\3" + d[7:], "byte 6: found 3, expected 1 (upload) or 2"),
        (lambda d: d[:7] + b"\0" + d[8:], "byte 7: found 0, expected 1"),
        (lambda d: d[:7] + b"\3" + d[8:], "byte 7: found 3"),
        (lambda d: d[:16] + b"\0\0\0\0" + d[20:], "bytes 16 to 19: found 0 tasks, expected 1 to 8"),
        (lambda d: d[:16] + b"\xff" * 4 + d[20:], "found 4294967295 tasks, expected 1 to 8"),
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
    with pytest.raises(wire.WireError) as error:
        wire.decode(change(data), like(), num_tasks=5, max_tasks=8)
    assert words in str(error.value)


def test_every_flipped_bit_is_noticed():
    data = wire.encode(unified(2), [0, 1])
    for bit in range(8 * len(data)):
        wrong = bytearray(data)
        wrong[bit // 8] ^= 1 << bit % 8
        with pytest.raises(wire.WireError):
            wire.decode(wrong, like())


def test_another_tree_is_refused():
    data = wire.encode(unified(), [0, 1, 2])
    for other in (like(dtypes=("float32",) * 3), {"b": like()["b"]}, {"x": jnp.zeros(26)}):
        with pytest.raises(wire.WireError, match="parameter tree"):
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
    ],
)
def test_what_would_be_refused_is_not_written(change, words):
    with pytest.raises(wire.WireError, match=words):
        wire.encode(unified(), **({"tasks": [0, 1, 2]} | change))


def test_values_and_dtypes_that_would_be_refused_are_not_written():
    sent = unified(1)
    bad = jax.tree.map(lambda x: x + jnp.asarray(jnp.inf, x.dtype), sent.vector)
    with pytest.raises(wire.WireError, match="leaf b/a: 7 of 7 numbers are not finite"):
        wire.encode(sent._replace(vector=bad), [0])
    whole = matu.Unified(
        {"x": np.zeros(3, np.int32)}, {"x": np.zeros((1, 1), np.uint8)}, jnp.ones(1)
    )
    with pytest.raises(wire.WireError, match="leaf x: found int32, expected one of float32"):
        wire.encode(whole, [0])


def test_a_stream_is_read_message_by_message_and_no_further():
    first, second = (wire.encode(unified(k, k), range(k)) for k in (2, 3))
    stream = io.BytesIO(first + second + second[:30])
    assert wire.read(stream, like()).tasks == (0, 1)
    assert stream.tell() == len(first)
    assert wire.read(stream, like()).tasks == (0, 1, 2)
    with pytest.raises(wire.WireError, match="truncated"):
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
    with pytest.raises(wire.WireError, match="expected 1 to 64"):
        wire.read(stream, like(), max_tasks=64)
    assert stream.asked == 36


def test_a_round_over_messages_is_the_round_over_arrays():
    uploads = matu.unify(tree((5,)), SLOTS)
    messages = {}
    for client in range(3):
        one, tasks = wire.of_client(uploads, SLOTS, client)
        # Clients list their tasks in an order of their own.
        order = list(reversed(range(len(tasks))))
        one = one._replace(
            masks=jax.tree.map(lambda m, o=order: m[np.array(o)], one.masks),
            scales=one.scales[np.array(order)],
        )
        messages[client] = wire.encode(one, [tasks[i] for i in order], client=client)
    found, slots, refused = wire.gather(messages, like(), SLOTS, round_number=0)
    assert refused == []
    assert_same(jax.tree.map(jnp.asarray, found), uploads)
    assert_same(matu.aggregate(found, slots), matu.aggregate(uploads, SLOTS))


def test_the_server_goes_on_without_those_it_refuses():
    uploads = matu.unify(tree((5,)), SLOTS)
    good = {}
    for client in range(3):
        one, tasks = wire.of_client(uploads, SLOTS, client)
        good[client] = wire.encode(one, tasks, client=client, round_number=4)
    wrong = {
        "checksum": good[0][:-1] + bytes([good[0][-1] ^ 1]),
        "expected an upload of client 0, round 4": good[1],
        "no answer in 30 s": wire.WireError("no answer in 30 s"),
    }
    for words, message in wrong.items():
        found, slots, refused = wire.gather(good | {0: message}, like(), SLOTS, round_number=4)
        assert len(refused) == 1
        assert refused[0].startswith("client 0: ")
        assert words in refused[0]
        assert slots.weight.tolist() == [0, 0, 2, 3, 3]
        alone = matu.Slots(SLOTS.client, SLOTS.task, slots.weight, 3, 3)
        expected = matu.aggregate(matu.unify(tree((5,)), alone), alone)
        assert_same(matu.aggregate(found, slots).task_vectors, expected.task_vectors)
    _, slots, refused = wire.gather({1: good[1]}, like(), SLOTS, round_number=4)
    assert (slots.weight.tolist(), refused) == ([0, 0, 2, 0, 0], [])
    one, _ = wire.of_client(uploads, SLOTS, 0)
    other = wire.encode(one, [0, 1], client=0, round_number=4)
    _, _, refused = wire.gather({0: other}, like(), SLOTS, round_number=4)
    assert refused == ["client 0: tasks: found [0, 1], expected [0, 2]."]


DATA = [wire.encode(unified(k, k), range(k)) for k in (1, 2, 3)]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    data=st.sampled_from(DATA),
    edits=st.lists(st.tuples(st.integers(0, 200), st.binary(max_size=8), st.booleans())),
    seal=st.booleans(),
)
def test_edited_messages_are_read_or_refused(data, edits, seal):
    data = bytearray(data)
    for at, piece, replaces in edits:
        data[at : at + (len(piece) if replaces else 0)] = piece
    if seal and len(data) >= 4:
        data = resealed(data)
    try:
        found = wire.decode(data, like(), num_tasks=5, max_tasks=5)
    except wire.WireError:
        return
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(found.unified))


@given(data=st.binary(max_size=300))
def test_noise_is_refused(data):
    with pytest.raises(wire.WireError):
        wire.decode(data, like())
