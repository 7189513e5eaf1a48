"""The server's blocks as Pallas kernels; see `matu_jax.aggregation.kernels`."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, BFloat16, Bool, Float, Float32, Int, UInt8

from matu_jax.aggregation.choices import Magnitude
from matu_jax.aggregation.fold_block import Grouped, fold_block, grouped
from matu_jax.aggregation.kernels import (
    MOST_GROUPS,
    MOST_ROWS,
    gpu_memory,
    tpu_memory,
    warps_for,
)
from matu_jax.aggregation.same_task_block import Holders, TaskMemory, same_task_block
from matu_jax.aggregation.storage import LANES, TILE, clip_to, mask_bytes, sign_of

_PROGRAMS = 264  # on GPU, that share the tiles where each adds up a matrix: two per multiprocessor
_MOST_SLOTS = 1024  # beyond, comparing every two of them costs more than reading them


def fits(
    vector: jax.Array | jax.ShapeDtypeStruct,
    clients: int,
    slots: int,
    tasks: int,
    platform: Literal["cuda", "tpu"],
) -> bool:
    """Whether a platform's kernels take leaves of such size and dtype, of so many rows of each."""
    if vector.shape[1] < TILE or slots > _MOST_SLOTS:
        return False
    if platform == "cuda":
        return tasks <= MOST_GROUPS
    # What `finish_on_tpu` has in two buffers each, and once as it is computed.
    rows = 7 * tasks + 3 * clients + slots
    return vector.dtype != jnp.float16 and rows <= MOST_ROWS


def _products(
    first: BFloat16[Array, "rows n"], second: BFloat16[Array, "others n"]
) -> Float32[Array, "rows others"]:
    return jax.lax.dot_general(
        first, second, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )


def sign_products_on_gpu(
    vector: Float[Array, "clients n"],
    masks: UInt8[Array, "slots bytes"],
    client: Int[Array, "slots"],
    live: Bool[Array, "slots"],
    *,
    interpret: bool = False,
) -> Float32[Array, "slots slots"]:
    """Products of signs of every two slots, summed over the parameters of whole tiles.

    Args:
      vector: u of every client.
      masks: m_s, packed.
      client: int32, whose slot it is.
      live: which slots count; others are 0.
      interpret: whether to run it where there is no GPU.
    """
    tiles, count = vector.shape[1] // TILE, client.shape[0]
    rows = min(max(16, 1 << (count - 1).bit_length()), LANES)
    blocks, programs = -(-count // rows), min(_PROGRAMS, tiles)
    behind = (0, blocks * rows - count)
    client, live = jnp.pad(client, behind), jnp.pad(live.astype(jnp.int32), behind)

    def kernel(client, live, vector, masks, out):
        column = jax.lax.broadcasted_iota(jnp.int32, (LANES,), 0)

        def slots_of(block):
            slot = block * rows + jax.lax.broadcasted_iota(jnp.int32, (rows,), 0)
            # Behind the last slot, the last one is read, and does not count.
            return jnp.minimum(slot, count - 1), client[slot], live[slot]

        def signs(slots, tile, k):
            slot, client, live = slots
            u = vector[client[:, None], (tile * TILE + k * LANES + column)[None, :]]
            byte = masks[slot[:, None], (tile * LANES + column)[None, :]].astype(jnp.int32)
            there = ((byte >> k) & 1) * live[:, None]
            return jnp.where(there > 0, sign_of(u), 0.0).astype(jnp.bfloat16)

        first, second = slots_of(pl.program_id(0)), slots_of(pl.program_id(1))
        program = pl.program_id(2)

        def visit(step, total):
            tile, k = program + jnp.right_shift(step, 3) * programs, step & 7
            return total + _products(signs(first, tile, k), signs(second, tile, k))

        mine = jax.lax.div(tiles - program + programs - 1, programs)
        zeros = jnp.zeros((rows, rows), jnp.float32)
        out[0, :, :] = jax.lax.fori_loop(0, 8 * mine, visit, zeros)

    def whole(array):
        return pl.BlockSpec(array.shape, lambda *_: (0,) * array.ndim)

    arrays = (client, live, vector, masks)
    sums = pl.pallas_call(
        kernel,
        grid=(blocks, blocks, programs),
        in_specs=[whole(array) for array in arrays],
        out_specs=pl.BlockSpec((1, rows, rows), lambda i, j, program: (program, i, j)),
        out_shape=jax.ShapeDtypeStruct((programs, blocks * rows, blocks * rows), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=1),
        interpret=interpret,
        name="sign_products",
    )(*arrays)
    return sums.sum(axis=0)[:count, :count]


def sign_products_on_tpu(
    vector: Float[Array, "clients n"],
    masks: UInt8[Array, "slots bytes"],
    client: Int[Array, "slots"],
    live: Bool[Array, "slots"],
    *,
    interpret: bool = False,
) -> Float32[Array, "slots slots"]:
    """`sign_products_on_gpu` on TPU."""
    tiles, (count, _) = vector.shape[1] // TILE, masks.shape
    clients = vector.shape[0]

    def kernel(client, live, vector, masks, out, taken, bytes_, signs):
        taken[...] = vector[...].astype(jnp.float32)
        bytes_[...] = masks[...].astype(jnp.int32)

        @pl.when(pl.program_id(0) == 0)
        def _():
            out[...] = jnp.zeros(out.shape, jnp.float32)

        shift = jax.lax.broadcasted_iota(jnp.int32, (8, LANES), 0)

        def of_slot(slot, _):
            u = taken[pl.ds(client[slot], 1), :].reshape(8, LANES)
            byte = jnp.broadcast_to(bytes_[pl.ds(slot, 1), :], (8, LANES))
            there = (jnp.right_shift(byte, shift) & 1) * live[slot] > 0
            signs[pl.ds(slot, 1), :] = jnp.where(there, sign_of(u), 0.0).reshape(1, TILE)
            return _

        jax.lax.fori_loop(0, count, of_slot, ())
        rows = signs[...].astype(jnp.bfloat16)
        out[...] += _products(rows, rows)

    def columns(height, width):
        return pl.BlockSpec((height, width), lambda i, *_: (0, i))

    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(tiles,),
            in_specs=[columns(clients, TILE), columns(count, LANES)],
            out_specs=pl.BlockSpec((count, count), lambda i, *_: (0, 0)),
            scratch_shapes=[
                pltpu.VMEM((clients, TILE), jnp.float32),
                pltpu.VMEM((count, LANES), jnp.int32),
                pltpu.VMEM((count, TILE), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((count, count), jnp.float32),
        interpret=interpret,
        name="sign_products",
    )(client, live.astype(jnp.int32), vector, masks)


def _modulated(u: jax.Array, byte: jax.Array, scale: jax.Array, dtype: Any) -> jax.Array:
    """Eq. 4's lambda * m * u of a tile; `byte` int32 `[8, 128]`, the same in every row."""
    there = (jnp.right_shift(byte, jax.lax.broadcasted_iota(jnp.int32, (8, LANES), 0)) & 1) > 0
    product = jnp.where(there, scale * u, 0.0)
    return clip_to(product, dtype).astype(jnp.float32)


def same_task_on_gpu(
    vector: Float[Array, "clients n"],
    masks: UInt8[Array, "slots bytes"],
    holders: Holders,
    old: Float[Array, "tasks n"] | None,
    *,
    threshold: float,
    trim: int,
    interpret: bool = False,
) -> tuple[Float[Array, "tasks n"], Float32[Array, "tasks"], Float32[Array, "tasks"]]:
    """`same_task_block` driven over the whole tiles of a flat leaf; as `same_task.by_scan`."""
    (clients, size), (count,), (tasks,) = vector.shape, holders.client.shape, holders.held.shape
    tiles, dtype = size // TILE, vector.dtype

    def kernel(*refs):
        order, starts, *rest, vector, masks = refs[:9]
        kept, (own, squares, largest) = refs[9:-3], refs[-3:]
        slots = Holders(Grouped(order, starts), *rest)
        task = pl.program_id(1)

        def task_vector(slot):
            taken = slots.accepted[slot] > 0
            u = vector[slots.client[slot], :].reshape(8, LANES).astype(jnp.float32)
            byte = jnp.broadcast_to(masks[slot, :].astype(jnp.int32)[None, :], (8, LANES))
            scale = jnp.where(taken, slots.scales[slot], 0.0)
            return jnp.where(taken, _modulated(u, byte, scale, dtype), 0.0)

        def put_task(carry, task, value, reported, added):
            value = clip_to(value, dtype)
            before = kept[0][task, :].reshape(8, LANES) if kept else jnp.zeros_like(value)
            value = jnp.where(reported, value, before)
            own[task, :] = value.reshape(TILE)
            squares[0, task] = added.sum()
            largest[0, task] = jnp.abs(value.astype(jnp.float32)).max()
            return carry

        memory = TaskMemory(task_vector, put_task, jnp.zeros((8, LANES), jnp.float32))
        same_task_block(memory, slots, threshold, trim, (), (task, task + 1))

    def whole(array):
        return pl.BlockSpec(array.shape, lambda *_: (0,) * array.ndim)

    def columns(height, width):
        return pl.BlockSpec((height, width), lambda tile, task: (0, tile))

    arrays, kept = jax.tree.leaves(holders), [] if old is None else [old]
    part = pl.BlockSpec((1, tasks), lambda tile, task: (tile, 0))
    own, squares, largest = pl.pallas_call(
        kernel,
        grid=(tiles, tasks),
        in_specs=[
            *map(whole, arrays),
            columns(clients, TILE),
            columns(count, LANES),
            *(columns(tasks, TILE) for _ in kept),
        ],
        out_specs=[columns(tasks, TILE), part, part],
        out_shape=[
            jax.ShapeDtypeStruct((tasks, size), dtype),
            *[jax.ShapeDtypeStruct((tiles, tasks), jnp.float32)] * 2,
        ],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="same_task",
    )(*arrays, vector, masks, *kept)
    return own, squares.sum(axis=0), largest.max(axis=0)


def same_task_on_tpu(
    vector: Float[Array, "clients n"],
    masks: UInt8[Array, "slots bytes"],
    holders: Holders,
    old: Float[Array, "tasks n"] | None,
    *,
    threshold: float,
    trim: int,
    interpret: bool = False,
) -> tuple[Float[Array, "tasks n"], Float32[Array, "tasks"], Float32[Array, "tasks"]]:
    """`same_task_on_gpu` on TPU."""
    (clients, size), (count,), (tasks,) = vector.shape, holders.client.shape, holders.held.shape
    tiles, dtype = size // TILE, vector.dtype

    def kernel(*refs):
        order, starts, *rest, vector, masks = refs[:9]
        kept, (own, squares, largest, taken, bytes_, made) = refs[9:-6], refs[-6:]
        slots = Holders(Grouped(order, starts), *rest)
        taken[...] = vector[...].astype(jnp.float32)
        bytes_[...] = masks[...].astype(jnp.int32)
        # Where nobody has reported, what was there stays.
        made[...] = kept[0][...].astype(jnp.float32) if kept else jnp.zeros(made.shape, jnp.float32)

        @pl.when(pl.program_id(0) == 0)
        def _():
            squares[...] = jnp.zeros(squares.shape, jnp.float32)
            largest[...] = jnp.zeros(largest.shape, jnp.float32)

        def task_vector(slot):
            there = slots.accepted[slot] > 0
            u = taken[pl.ds(slots.client[slot], 1), :].reshape(8, LANES)
            byte = jnp.broadcast_to(bytes_[pl.ds(slot, 1), :], (8, LANES))
            scale = jnp.where(there, slots.scales[slot], 0.0)
            return jnp.where(there, _modulated(u, byte, scale, dtype), 0.0)

        def put_task(carry, task, value, reported, added):
            row = pl.ds(task, 1)
            value = clip_to(value, dtype).astype(jnp.float32)
            value = jnp.where(reported, value, made[row, :].reshape(8, LANES))
            made[row, :] = value.reshape(1, TILE)
            squares[row, :] = squares[row, :] + added.sum(axis=0, keepdims=True)
            top = jnp.abs(value).max(axis=0, keepdims=True)
            largest[row, :] = jnp.maximum(largest[row, :], top)
            return carry

        memory = TaskMemory(task_vector, put_task, jnp.zeros((8, LANES), jnp.float32))
        same_task_block(memory, slots, threshold, trim, ())
        own[...] = made[...].astype(own.dtype)

    def columns(height, width):
        return pl.BlockSpec((height, width), lambda i, *_: (0, i))

    arrays, kept = jax.tree.leaves(holders), [] if old is None else [old]
    part = pl.BlockSpec((tasks, LANES), lambda i, *_: (0, 0))
    own, squares, largest = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(arrays),
            grid=(tiles,),
            in_specs=[
                columns(clients, TILE),
                columns(count, LANES),
                *(columns(tasks, TILE) for _ in kept),
            ],
            out_specs=[columns(tasks, TILE), part, part],
            scratch_shapes=[
                pltpu.VMEM((clients, TILE), jnp.float32),
                pltpu.VMEM((count, LANES), jnp.int32),
                pltpu.VMEM((tasks, TILE), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((tasks, size), dtype),
            *[jax.ShapeDtypeStruct((tasks, LANES), jnp.float32)] * 2,
        ],
        interpret=interpret,
        name="same_task",
    )(*arrays, vector, masks, *kept)
    return own, squares.sum(axis=1), largest.max(axis=1)


def finish_on_gpu(
    own: Float[Array, "tasks n"],
    mixing: Float32[Array, "tasks tasks"],
    start: Float[Array, "tasks n"] | None,
    by_client: Grouped,
    task: Int[Array, "slots"],
    *,
    magnitude: Magnitude,
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    """`finish.by_scan` in one kernel: a tile's task vectors are read once, mixed, and folded twice.

    Args and results as there.
    """
    (tasks, size), (count,) = own.shape, task.shape
    clients, tiles, dtype = by_client.starts.shape[0] - 1, size // TILE, own.dtype
    together = min(tasks, 32)

    def kernel(*refs):
        one_order, one_starts, order, starts, task, mixing, own = refs[:7]
        before, (mixed, one, one_masks, one_sums, down, down_masks, down_sums) = (
            refs[7:-7],
            refs[-7:],
        )

        def row_of(ref, row):
            return ref[row, :].reshape(8, LANES).astype(jnp.float32)

        def mix(piece, _):
            # Some tasks at a time, so that what they are made of is read as seldom as can be.
            borrowers = [jnp.minimum(piece * together + i, tasks - 1) for i in range(together)]

            def add(lender, totals):
                x = row_of(own, lender)
                pairs = zip(totals, borrowers, strict=True)
                return tuple(total + mixing[row, lender] * x for total, row in pairs)

            zeros = jnp.zeros((8, LANES), jnp.float32)
            totals = jax.lax.fori_loop(0, tasks, add, (zeros,) * together)
            for row, total in zip(borrowers, totals, strict=True):
                value = clip_to(total, dtype)
                if before:
                    value = clip_to(row_of(before[0], row) + value.astype(jnp.float32), dtype)
                mixed[row, :] = value.reshape(TILE)
            return _

        jax.lax.fori_loop(0, -(-tasks // together), mix, ())
        if not interpret:
            plgpu.debug_barrier()  # other threads read what these have written
        memory = gpu_memory(lambda row: row_of(mixed, row), one, one_masks, one_sums)
        fold_block(memory, Grouped(one_order, one_starts), magnitude, ())
        memory = gpu_memory(lambda slot: row_of(mixed, task[slot]), down, down_masks, down_sums)
        fold_block(memory, Grouped(order, starts), magnitude, ())

    def whole(array):
        return pl.BlockSpec(array.shape, lambda tile: (0,) * array.ndim)

    def columns(height, width):
        return pl.BlockSpec((height, width), lambda tile: (0, tile))

    def partial(height):
        return pl.BlockSpec((1, height, 4), lambda tile: (tile, 0, 0))

    arrays = (*grouped(None, tasks, 1), *by_client, task, mixing)
    before = [] if start is None else [start]
    mixed, one, one_masks, one_sums, down, down_masks, down_sums = pl.pallas_call(
        kernel,
        grid=(tiles,),
        in_specs=[*map(whole, arrays), *(columns(tasks, TILE) for _ in (own, *before))],
        out_specs=[
            columns(tasks, TILE),
            columns(1, TILE),
            columns(tasks, LANES),
            partial(tasks),
            columns(clients, TILE),
            columns(count, LANES),
            partial(count),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((tasks, size), dtype),
            jax.ShapeDtypeStruct((1, size), dtype),
            jax.ShapeDtypeStruct((tasks, mask_bytes(size)), jnp.uint8),
            jax.ShapeDtypeStruct((tiles, tasks, 4), jnp.float32),
            jax.ShapeDtypeStruct((clients, size), dtype),
            jax.ShapeDtypeStruct((count, mask_bytes(size)), jnp.uint8),
            jax.ShapeDtypeStruct((tiles, count, 4), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=warps_for(tasks), num_stages=1),
        interpret=interpret,
        name="finish",
    )(*arrays, own, *before)
    return mixed, one, one_masks, one_sums.sum(0), down, down_masks, down_sums.sum(0)


def finish_on_tpu(
    own: Float[Array, "tasks n"],
    mixing: Float32[Array, "tasks tasks"],
    start: Float[Array, "tasks n"] | None,
    by_client: Grouped,
    task: Int[Array, "slots"],
    *,
    magnitude: Magnitude,
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    """`finish_on_gpu` on TPU."""
    (tasks, size), (count,) = own.shape, task.shape
    clients, tiles, dtype = by_client.starts.shape[0] - 1, size // TILE, own.dtype

    def kernel(*refs):
        one_order, one_starts, order, starts, task, mixing, own = refs[:7]
        before, out, scratch = refs[7:-12], refs[-12:-5], refs[-5:]
        mixed, one, one_masks, one_sums, down, down_masks, down_sums = out
        kept, one_made, one_packed, down_made, down_packed = scratch

        @pl.when(pl.program_id(0) == 0)
        def _():
            one_sums[...] = jnp.zeros(one_sums.shape, jnp.float32)
            down_sums[...] = jnp.zeros(down_sums.shape, jnp.float32)

        rows = own[...].astype(jnp.float32)
        value = jnp.dot(mixing[...], rows, precision=jax.lax.Precision.HIGHEST)
        value = clip_to(value, dtype)
        if before:
            value = before[0][...].astype(jnp.float32) + value.astype(jnp.float32)
            value = clip_to(value, dtype)
        mixed[...] = value
        kept[...] = value.astype(jnp.float32)

        def row_of(row):
            return kept[pl.ds(row, 1), :].reshape(1, 8, LANES)

        block = (1, 8, LANES)
        memory = tpu_memory(block, row_of, one_made, one_packed, one_sums, dtype)
        fold_block(memory, Grouped(one_order, one_starts), magnitude, ())
        memory = tpu_memory(
            block, lambda slot: row_of(task[slot]), down_made, down_packed, down_sums, dtype
        )
        fold_block(memory, Grouped(order, starts), magnitude, ())
        for made, to in ((one_made, one), (down_made, down)):
            to[...] = made[...].astype(dtype)
        for packed, to in ((one_packed, one_masks), (down_packed, down_masks)):
            to[...] = packed[...].astype(jnp.uint8)

    def columns(height, width):
        return pl.BlockSpec((height, width), lambda i, *_: (0, i))

    def total(height):
        return pl.BlockSpec((4 * height, LANES), lambda i, *_: (0, 0))

    arrays = (*grouped(None, tasks, 1), *by_client, task)
    before = [] if start is None else [start]
    mixed, one, one_masks, one_sums, down, down_masks, down_sums = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(arrays),
            grid=(tiles,),
            in_specs=[
                pl.BlockSpec((tasks, tasks), lambda i, *_: (0, 0)),
                *(columns(tasks, TILE) for _ in (own, *before)),
            ],
            out_specs=[
                columns(tasks, TILE),
                columns(1, TILE),
                columns(tasks, LANES),
                total(tasks),
                columns(clients, TILE),
                columns(count, LANES),
                total(count),
            ],
            scratch_shapes=[
                pltpu.VMEM((tasks, TILE), jnp.float32),
                pltpu.VMEM((1, TILE), jnp.float32),
                pltpu.VMEM((tasks, LANES), jnp.int32),
                pltpu.VMEM((clients, TILE), jnp.float32),
                pltpu.VMEM((count, LANES), jnp.int32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((tasks, size), dtype),
            jax.ShapeDtypeStruct((1, size), dtype),
            jax.ShapeDtypeStruct((tasks, mask_bytes(size)), jnp.uint8),
            jax.ShapeDtypeStruct((4 * tasks, LANES), jnp.float32),
            jax.ShapeDtypeStruct((clients, size), dtype),
            jax.ShapeDtypeStruct((count, mask_bytes(size)), jnp.uint8),
            jax.ShapeDtypeStruct((4 * count, LANES), jnp.float32),
        ],
        interpret=interpret,
        name="finish",
    )(*arrays, mixing, own, *before)

    def sums(lanes):
        return lanes.sum(axis=1).reshape(-1, 4)

    return (
        mixed,
        one,
        one_masks,
        sums(one_sums),
        down,
        down_masks,
        sums(down_sums),
    )
