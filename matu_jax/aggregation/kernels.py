"""The equations' blocks as Pallas kernels: each tile is read once, and written once.

On GPU a program has one tile of 1024 parameters of one group, in registers, and finds what it reads
twice in cache; on TPU it has some tiles of all rows in fast memory, and programs run one after the
other. What is computed is `fold_block`; here is only where its numbers come from and go to.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Float32, Int, UInt8

from matu_jax.aggregation.choices import Magnitude
from matu_jax.aggregation.fold_block import FAR, FoldMemory, Grouped, fold_block
from matu_jax.aggregation.storage import LANES, TILE, mask_bytes

MOST_GROUPS = 65535  # blocks in the second dimension of a CUDA grid
MOST_ROWS = 3584  # of a tile in float32, 4 kB each, that a TPU has fast memory for

Folded = tuple[Float[Array, "groups n"], UInt8[Array, "slots bytes"], Float32[Array, "slots 4"]]


def fold_fits(
    source: jax.Array | jax.ShapeDtypeStruct,
    slots: int,
    groups: int,
    platform: Literal["cuda", "tpu"],
) -> bool:
    """Whether there is a kernel on a platform that folds such leaves `[rows, n]`."""
    if source.shape[1] < TILE:
        return False
    if platform == "cuda":
        return groups <= MOST_GROUPS
    return source.dtype != jnp.float16 and _rows(source, slots, groups) <= MOST_ROWS


def _rows(source: jax.Array | jax.ShapeDtypeStruct, slots: int, groups: int) -> int:
    """Rows of float32 in a TPU's fast memory: in two buffers each, and once as they are read."""
    return 3 * (source.shape[0] + groups) + slots // 2


def warps_for(rows: int) -> int:
    """Of a program on GPU that reads a tile of so many rows, and reads it again a little later.

    The more warps it has, the fewer programs run at once: all that they have read shall still be in
    an H100's cache of 50 MB when it is read again. Beyond 40 rows it is not.
    """
    at_once = 132 * 64 * rows * TILE * 4  # bytes, with one warp: 132 multiprocessors of 64 warps
    return next((warps for warps in (4, 8, 16) if at_once / warps <= 40e6), 32)


def _packed(mask: Bool[Array, "*tiles 8 128"]) -> Int[Array, "*tiles 128"]:
    """A byte for each column of a tile, bit k of row k, in int32."""
    bits = jnp.left_shift(1, jax.lax.broadcasted_iota(jnp.int32, mask.shape, mask.ndim - 2))
    return jnp.where(mask, bits, 0).sum(axis=-2)


def gpu_memory(
    task_vector: Callable[[Any], jax.Array], vector: Any, masks: Any, sums: Any
) -> FoldMemory:
    """Where a tile's fold goes on GPU: a program's blocks of the results.

    Args:
      task_vector: see `FoldMemory`.
      vector: `[groups, 1024]`.
      masks: `[slots, 128]`.
      sums: `[1, slots, 4]`.
    """

    def put_vector(carry, group, u):
        vector[group, :] = u.reshape(TILE)
        return carry

    def put_slot(carry, slot, mask, magnitudes):
        masks[slot, :] = _packed(mask).astype(jnp.uint8)
        for i, x in enumerate(magnitudes):
            sums[0, slot, i] = x.sum()
            sums[0, slot, 2 + i] = (FAR * x).sum()
        return carry

    zeros = jnp.zeros((8, LANES), jnp.float32)
    return FoldMemory(task_vector, put_vector, put_slot, zeros, vector.dtype)


def tpu_memory(
    block: tuple[int, int, int],
    task_vector: Callable[[Any], jax.Array],
    made: Any,
    packed: Any,
    sums: Any,
    dtype: Any,
) -> FoldMemory:
    """Where the fold of some tiles goes on TPU, whose rows can be written one by one in 32 bits.

    Args:
      block: tiles, 8 and 128.
      task_vector: see `FoldMemory`.
      made: u, float32 `[groups, parameters]`.
      packed: masks, int32 `[slots, bytes]`.
      sums: float32 `[4 * slots, 128]`, added to.
      dtype: the storage dtype.
    """

    def put_vector(carry, group, u):
        made[pl.ds(group, 1), :] = u.astype(jnp.float32).reshape(1, -1)
        return carry

    def put_slot(carry, slot, mask, magnitudes):
        packed[pl.ds(slot, 1), :] = _packed(mask).reshape(1, -1)
        for i, x in enumerate(magnitudes):
            for row, part in ((i, x), (2 + i, FAR * x)):
                row = pl.ds(4 * slot + row, 1)
                sums[row, :] = sums[row, :] + part.sum(axis=0).sum(axis=0, keepdims=True)
        return carry

    zeros = jnp.zeros(block, jnp.float32)
    return FoldMemory(task_vector, put_vector, put_slot, zeros, dtype)


def fold_on_gpu(
    source: Float[Array, "rows n"],
    rows: Int[Array, "slots"],
    slots: Grouped,
    present: Bool[Array, "slots"],
    *,
    magnitude: Magnitude,
    interpret: bool = False,
) -> Folded:
    """`fold_block` driven over the whole tiles of a flat leaf by a kernel of Triton's.

    Args and results as of `fold.scanned`; what stands behind the tiles is not defined.
    """
    (height, size), count, groups = source.shape, present.shape[0], slots.starts.shape[0] - 1
    tiles = size // TILE

    def kernel(order, starts, rows, present, source, vector, masks, sums):
        group = pl.program_id(1)

        def task_vector(slot):
            x = source[rows[slot], :].reshape(8, LANES).astype(jnp.float32)
            return jnp.where(present[slot] > 0, x, 0.0)

        memory = gpu_memory(task_vector, vector, masks, sums)
        fold_block(memory, Grouped(order, starts), magnitude, (), (group, group + 1))

    def whole(*shape):
        return pl.BlockSpec(shape, lambda tile, group: (0,) * len(shape))

    def columns(height, width):
        return pl.BlockSpec((height, width), lambda tile, group: (0, tile))

    vector, masks, sums = pl.pallas_call(
        kernel,
        grid=(tiles, groups),
        in_specs=[*map(whole, (count, groups + 1, count, count)), columns(height, TILE)],
        out_specs=[
            columns(groups, TILE),
            columns(count, LANES),
            pl.BlockSpec((1, count, 4), lambda tile, group: (tile, 0, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((groups, size), source.dtype),
            jax.ShapeDtypeStruct((count, mask_bytes(size)), jnp.uint8),
            jax.ShapeDtypeStruct((tiles, count, 4), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(
            num_warps=warps_for(-(-count // groups)), num_stages=1
        ),
        interpret=interpret,
        name="fold",
    )(slots.order, slots.starts, rows, present.astype(jnp.int32), source)
    return vector, masks, sums.sum(axis=0)


def fold_on_tpu(
    source: Float[Array, "rows n"],
    rows: Int[Array, "slots"],
    slots: Grouped,
    present: Bool[Array, "slots"],
    *,
    magnitude: Magnitude,
    interpret: bool = False,
) -> Folded:
    """`fold_block` driven over the whole tiles of a flat leaf by a kernel of Mosaic's.

    Args and results as of `fold.scanned`; what stands behind the tiles is not defined. The storage
    dtype is float32 or bfloat16, since TPUs have no float16.
    """
    (height, size), count, groups = source.shape, present.shape[0], slots.starts.shape[0] - 1
    tiles = size // TILE
    together = 8 if 8 * _rows(source, count, groups) <= MOST_ROWS else 1
    block = (together, 8, LANES)

    def kernel(order, starts, rows, present, source, vector, masks, sums, taken, made, packed):
        taken[...] = source[...].astype(jnp.float32)
        first = pl.program_id(0) * together
        inside = first + jax.lax.broadcasted_iota(jnp.int32, block, 0) < tiles

        @pl.when(first == 0)
        def _():
            sums[...] = jnp.zeros(sums.shape, jnp.float32)

        def task_vector(slot):
            x = taken[pl.ds(rows[slot], 1), :].reshape(block)
            return jnp.where(inside & (present[slot] > 0), x, 0.0)

        memory = tpu_memory(block, task_vector, made, packed, sums, vector.dtype)
        fold_block(memory, Grouped(order, starts), magnitude, ())
        vector[...] = made[...].astype(vector.dtype)
        masks[...] = packed[...].astype(jnp.uint8)

    def columns(height, width):
        return pl.BlockSpec((height, width), lambda i, *_: (0, i))

    vector, masks, sums = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(-(-tiles // together),),
            in_specs=[columns(height, together * TILE)],
            out_specs=[
                columns(groups, together * TILE),
                columns(count, together * LANES),
                pl.BlockSpec((4 * count, LANES), lambda i, *_: (0, 0)),
            ],
            scratch_shapes=[
                pltpu.VMEM((height, together * TILE), jnp.float32),
                pltpu.VMEM((groups, together * TILE), jnp.float32),
                pltpu.VMEM((count, together * LANES), jnp.int32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((groups, size), source.dtype),
            jax.ShapeDtypeStruct((count, mask_bytes(size)), jnp.uint8),
            jax.ShapeDtypeStruct((4 * count, LANES), jnp.float32),
        ],
        interpret=interpret,
        name="fold",
    )(slots.order, slots.starts, rows, present.astype(jnp.int32), source)
    return vector, masks, sums.sum(axis=1).reshape(count, 4)
