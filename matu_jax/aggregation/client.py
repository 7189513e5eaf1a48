"""The client's side: `unify` and `modulate`, eqs. 1 to 4 on pytrees."""

from functools import partial
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from matu_jax.aggregation.choices import Magnitude
from matu_jax.aggregation.fold import fold
from matu_jax.aggregation.joining import joining
from matu_jax.aggregation.modulation import modulated
from matu_jax.aggregation.sharding import ParameterSharding, check_mesh
from matu_jax.aggregation.storage import flat_leaf
from matu_jax.aggregation.types import Slots, Unified, check_slots, check_unified
from matu_jax.trees import Leaf, PyTree, as_floating, check_stacked


@partial(jax.jit, static_argnames=("magnitude", "mesh"))
def _unify(
    vectors: PyTree[Float[Array, "slots ..."]],
    slots: Slots | None,
    magnitude: Magnitude,
    mesh: Mesh | None,
) -> Unified:
    leaves, treedef = jax.tree.flatten(vectors)
    count = leaves[0].shape[0]
    num_groups = 1 if slots is None else slots.num_clients
    groups = None if slots is None else slots.client
    present = np.ones(count, np.bool_) if slots is None else slots.weight > 0
    flat = [flat_leaf(leaf) for leaf in leaves]
    join = joining(flat)
    flat = join.vectors(flat)
    sharding = ParameterSharding(mesh, [x.shape[1] for x in flat])

    def work(flat, rest):
        groups, present = rest
        return fold(flat, None, groups, present, num_groups, magnitude, sharding.axes)

    columns, out = sharding.pad_vectors(flat), (True, True, False)
    vector, masks, scales = sharding.run(work, columns, (groups, present), out)
    vector, masks = sharding.unpad_vectors(vector), sharding.unpad_masks(masks)
    shaped = [
        vector.reshape(leaf.shape[1:] if slots is None else (num_groups, *leaf.shape[1:]))
        for vector, leaf in zip(join.leaves(vector), leaves, strict=True)
    ]
    return Unified(treedef.unflatten(shaped), treedef.unflatten(join.leaf_masks(masks)), scales)


def unify(
    vectors: PyTree[Float[Leaf, "slots ..."]],
    slots: Slots | None = None,
    *,
    magnitude: Magnitude = "mean",
    mesh: Mesh | None = None,
) -> Unified:
    """Folds task vectors into one vector per client, a mask and a scale per slot (eqs. 1 to 4).

    Args:
      vectors: task vectors, leaves `[slots, ...]` of float32, bfloat16 or float16.
      slots: which client each row belongs to; None folds all rows into one group.
      magnitude: eq. 2 takes the "max" of the agreeing magnitudes (EMR-Merging) or their "mean".
      mesh: devices over which the parameters are sharded, of axes of type Auto; None = all on one.
        Of a leaf of more than 65,536 parameters nothing crosses between them but sums, if it is
        sharded over them already, along its first axis of parameters, and has a multiple of
        1024 parameters per device; smaller leaves are put together first.

    Returns:
      `Unified`: vector leaves `[clients, ...]` (`[...]` without slots) in the storage dtype, masks
      `[slots, bytes]`, scales `[slots]`. Masks and scales are those of the vector as stored.

    Raises:
      ValueError: for an unknown magnitude, a mesh whose axes are not Auto, or trees and slots that
        do not fit, naming the leaves.

    Example:
      >>> import jax.numpy as jnp, matu_jax as matu
      >>> unified = matu.unify({"w": jnp.array([[1.0, -2.0], [3.0, 1.0]])})
      >>> unified.vector["w"].tolist(), unified.scales.tolist()
      ([2.0, -2.0], [0.75, 2.0])
    """
    if magnitude not in get_args(Magnitude):
        raise ValueError(f"unify: magnitude: found {magnitude!r}, expected 'max' or 'mean'.")
    vectors = as_floating(vectors, "unify: vectors")
    rows = None
    if slots is not None:
        slots = check_slots(slots, "unify")
        rows = slots.client.shape[0]
    check_stacked(vectors, "unify: vectors", rows=rows)
    return _unify(vectors, slots, magnitude, check_mesh(mesh, "unify"))


@jax.jit
def modulate_jit(unified: Unified, slots: Slots | None) -> PyTree[Float[Array, "slots ..."]]:
    """`modulate` without its checks."""

    def leaf(vector, mask):
        count = mask.shape[0]
        if slots is None:
            shape, flat = vector.shape, jnp.broadcast_to(vector.reshape(-1), (count, vector.size))
        else:
            shape, flat = vector.shape[1:], flat_leaf(vector)[slots.client]
        rows = modulated(flat, mask, unified.scales)
        return rows.astype(vector.dtype).reshape(count, *shape)

    return jax.tree.map(leaf, unified.vector, unified.masks)


def modulate(unified: Unified, slots: Slots | None = None) -> PyTree[Float[Array, "slots ..."]]:
    """Rebuilds each slot's task vector from a unified: scale * mask * vector (eq. 4).

    Args:
      unified: from `unify`, or a download.
      slots: the slots it was folded with; None for a single group.

    Returns:
      Task vectors, leaves `[slots, ...]` in the storage dtype. For a group of one slot it equals
      what went into `unify`.

    Raises:
      ValueError: if masks, scales or vector do not fit each other or the slots.
    """
    rows = jnp.shape(unified.scales)[0] if jnp.ndim(unified.scales) == 1 else -1
    groups = None
    if slots is not None:
        slots = check_slots(slots, "modulate")
        rows, groups = slots.client.shape[0], slots.num_clients
    return modulate_jit(
        check_unified(unified, "modulate: unified", rows=rows, groups=groups), slots
    )
