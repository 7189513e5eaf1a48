"""The signs of the uploads' task vectors, compared: what eq. 7 and weights by agreement need."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, UInt8

from matu_jax.aggregation.blocks import Block, add_at, loop_zeros, over_blocks
from matu_jax.aggregation.fold_block import Grouped, grouped
from matu_jax.aggregation.platforms import where_lowered
from matu_jax.aggregation.sharding import Axes, total_over
from matu_jax.aggregation.storage import as_bits, from_bits, pack_rows, sign_of, unpack_rows
from matu_jax.aggregation.types import Slots


class Signs(NamedTuple):
    """Sums over parameters.

    Attributes:
      products: of products of two tasks' sums of signs, float32 `[tasks, tasks]`.
      same_client: of products of signs of two slots of one client, float32 `[tasks, tasks]`; these
        are in `products` too.
      common: of a slot's signs times its task's sum of signs, its own too, float32 `[slots]`.
      nonzero: how many of a slot's numbers are not 0, float32 `[slots]`.
    """

    products: Float32[Array, "tasks tasks"]
    same_client: Float32[Array, "tasks tasks"]
    common: Float32[Array, "slots"]
    nonzero: Float32[Array, "slots"]


def compared_signs(
    vector: list[Float[Array, "clients _"]],
    masks: list[UInt8[Array, "slots _"]],
    live: Bool[Array, "slots"],
    slots: Slots,
    axes: Axes,
) -> Signs:
    """Compares the signs of all uploads.

    Args:
      vector: u of every client, flat leaves `[clients, n]`.
      masks: m_s, packed, `[slots, bytes]`.
      live: bool `[slots]`, which slots take part with a scale that is not 0.
      slots: which client and task each is.
      axes: see `ParameterSharding`.
    """
    given = (slots.client, slots.task, live)
    found = [
        _signs_flat(leaf, mask, *given, tasks=slots.num_tasks, clients=slots.num_clients)
        for leaf, mask in zip(vector, masks, strict=True)
    ]
    return Signs(
        *(total_over(jnp.stack(parts).sum(axis=0), axes) for parts in zip(*found, strict=True))
    )


def by_scan(
    vector: Float[Array, "clients n"],
    masks: UInt8[Array, "slots bytes"],
    client: Int[Array, "slots"],
    task: Int[Array, "slots"],
    live: Bool[Array, "slots"],
    *,
    tasks: int,
    clients: int,
) -> Signs:
    """Of the tiles of one flat leaf, block by block, in work that is linear in the slots.

    Two slots of one client have the signs of its u wherever both masks are set, so the product of
    their signs is a count of common mask bits. All other pairs are compared by their tasks' sums.
    """
    count = client.shape[0]
    by_task, by_client = grouped(task, count, tasks), grouped(client, count, clients)
    inputs, bits = (vector, masks, live, *by_task, *by_client), as_bits(vector)

    def visit(block: Block, sums: Signs) -> Signs:
        def unified(client):
            return from_bits(block.take(bits, client), vector.dtype)

        def mask(slot):
            return jnp.where(live[slot], block.take_bytes(masks, slot), 0)

        def sign(slot):
            return jnp.where(unpack_rows(mask(slot)), sign_of(unified(client[slot])), 0.0)

        def of_task(task, carry):
            rows, common, nonzero = carry
            members = _members(by_task, task)

            def add(place, total):
                return total + sign(by_task.order[place])

            total = jax.lax.fori_loop(*members, add, block.zeros(*inputs))
            rows = jax.lax.dynamic_update_slice(rows, total.reshape(1, -1), (task, 0))

            def compare(place, carry):
                slot = by_task.order[place]
                own = sign(slot)
                added = ((own * total).sum(), jnp.abs(own).sum())
                return tuple(add_at(x, slot, y) for x, y in zip(carry, added, strict=True))

            return rows, *jax.lax.fori_loop(*members, compare, (common, nonzero))

        def of_client(client, pairs):
            first, last = _members(by_client, client)
            nonzero = pack_rows(unified(client) != 0)

            def of_slot(place, pairs):
                slot = by_client.order[place]
                own = mask(slot) & nonzero

                def pair(place, pairs):
                    other = by_client.order[place]
                    common = jax.lax.population_count(own & mask(other)).astype(jnp.float32).sum()
                    there = pairs.at[task[slot], task[other]].add(common)
                    back = there.at[task[other], task[slot]].add(common)
                    return jnp.where(slot == other, there, back)

                return jax.lax.fori_loop(first, place + 1, pair, pairs)

            return jax.lax.fori_loop(first, last, of_slot, pairs)

        rows = loop_zeros((tasks, block.length), jnp.float32, *inputs)
        carry = (rows, sums.common, sums.nonzero)
        rows, common, nonzero = jax.lax.fori_loop(0, tasks, of_task, carry)
        met = jnp.matmul(rows, rows.T, precision=jax.lax.Precision.HIGHEST)
        pairs = jax.lax.fori_loop(0, clients, of_client, sums.same_client)
        return Signs(sums.products + met, pairs, common, nonzero)

    square, row = (tasks, tasks), (client.shape[0],)
    zeros = [loop_zeros(shape, jnp.float32, *inputs) for shape in (square, square, row, row)]
    return over_blocks(vector.shape[1], visit, Signs(*zeros))


def _members(groups: Grouped, group: Int[Array, ""]) -> tuple[jax.Array, jax.Array]:
    return groups.starts[group], groups.starts[group + 1]


def of_products(
    products: Float32[Array, "slots slots"],
    client: Int[Array, "slots"],
    task: Int[Array, "slots"],
    tasks: int,
) -> Signs:
    """From the products of signs of every two slots, summed over parameters."""
    held = (task[:, None] == jnp.arange(tasks)[None, :]).astype(jnp.float32)
    one_client = client[:, None] == client[None, :]

    def of_tasks(x):
        return jnp.matmul(
            held.T,
            jnp.matmul(x, held, precision=jax.lax.Precision.HIGHEST),
            precision=jax.lax.Precision.HIGHEST,
        )

    return Signs(
        of_tasks(products),
        of_tasks(jnp.where(one_client, products, 0.0)),
        jnp.where(task[:, None] == task[None, :], products, 0.0).sum(axis=1),
        jnp.diagonal(products),
    )


def _by_kernel(platform):
    def form(vector, masks, client, task, live, *, tasks, clients):
        from matu_jax.aggregation import server_kernels  # Pallas is heavy, and no one else's

        if not server_kernels.fits(vector, clients, client.shape[0], tasks, platform):
            return by_scan(vector, masks, client, task, live, tasks=tasks, clients=clients)
        kernel = {
            "cuda": server_kernels.sign_products_on_gpu,
            "tpu": server_kernels.sign_products_on_tpu,
        }[platform]
        return of_products(kernel(vector, masks, client, live), client, task, tasks)

    return form


def _shapes(vector, masks, client, task, live, *, tasks, clients):
    return [
        jax.ShapeDtypeStruct(shape, jnp.float32)
        for shape in ((tasks, tasks), (tasks, tasks), client.shape, client.shape)
    ]


_signs_flat = where_lowered(
    "matu_signs", _shapes, by_scan, cuda=_by_kernel("cuda"), tpu=_by_kernel("tpu")
)
