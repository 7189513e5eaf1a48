"""Spreading slots over devices, of one process or of several, and over time within a device."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int, Int64

from matu_jax.trees import PyTree

AXIS = "slots"


ROWS, WHOLE = PartitionSpec(AXIS), PartitionSpec()
"""How arrays lie on the devices: `[slots, ...]` sharded by slot, or whole on each."""


def slot_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of devices along one axis, "slots"; of all, those of other processes among them."""
    count = jax.device_count() if devices is None else len(devices)
    return jax.make_mesh((count,), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def on_cpu(mesh: Mesh) -> bool:
    """Whether the devices of a mesh are (virtual) CPU devices."""
    return mesh.devices.flat[0].platform == "cpu"


def slots_at_once(mesh: Mesh, slots: int, parallel_slots: int = 0) -> int:
    """Slots that one device computes at once, of `slots` that it has; see `map_slots`."""
    return max(1, min(parallel_slots or (1 if on_cpu(mesh) else slots), slots))


def own_devices(mesh: Mesh) -> list[Any]:
    """The devices of a mesh that belong to this process."""
    return [d for d in mesh.devices.flat if d.process_index == jax.process_index()]


def rows_by_process(mesh: Mesh, rows: int) -> dict[int, Int64[np.ndarray, "_"]]:
    """Which of so many rows each process has: `{process: int64 [own rows]}`.

    Args:
      mesh: from `slot_mesh`.
      rows: a multiple of the devices, over which they are sharded in order.
    """
    process = np.array([device.process_index for device in mesh.devices.flat])
    by_device = np.arange(rows).reshape(mesh.size, -1)
    return {int(p): by_device[process == p].reshape(-1) for p in np.unique(process)}


def own_rows(mesh: Mesh, rows: int) -> Int64[np.ndarray, "own"]:
    """Which of so many rows this process has, see `rows_by_process`: int64 `[own rows]`."""
    return rows_by_process(mesh, rows)[jax.process_index()]


def placed(tree: PyTree, mesh: Mesh, spec: PartitionSpec) -> PyTree:
    """Makes arrays over all devices of what each process has; nothing leaves its process.

    Args:
      tree: numpy arrays, or arrays of this process's: with `ROWS`, its `own_rows`, `[own rows,
        ...]`; with `WHOLE`, the same on all processes.
      mesh: from `slot_mesh`.
      spec: `ROWS` or `WHOLE`.
    """
    own = own_devices(mesh)
    if len(own) == mesh.size:
        return jax.device_put(tree, NamedSharding(mesh, spec))
    local = jax.device_put(tree, NamedSharding(Mesh(np.array(own), (AXIS,)), spec))
    return _joined(local, mesh, spec, mesh.size if spec == ROWS else len(own), len(own))


def on_each(tree: PyTree, mesh: Mesh) -> PyTree:
    """Puts what this process has on each of its devices, whole; nothing leaves its process.

    Args:
      tree: numpy arrays `[n, ...]` of any content, but of the same shapes on all processes.
      mesh: from `slot_mesh`.

    Returns:
      Arrays `[devices * n, ...]` in `ROWS`: of each of them, a device has its process's own.
    """
    own = own_devices(mesh)
    local = jax.device_put(tree, NamedSharding(Mesh(np.array(own), (AXIS,)), WHOLE))
    return _joined(local, mesh, ROWS, mesh.size, 1)


def _joined(local: PyTree, mesh: Mesh, spec: PartitionSpec, times: int, parts: int) -> PyTree:
    """Arrays of this process as a part of arrays with `times / parts` as many rows."""

    def whole(x: jax.Array) -> jax.Array:
        shape = (x.shape[0] * times // parts, *x.shape[1:]) if x.ndim else ()
        pieces = [shard.data for shard in x.addressable_shards]
        return jax.make_array_from_single_device_arrays(shape, NamedSharding(mesh, spec), pieces)

    return jax.tree.map(whole, local)


def server_mesh(mesh: Mesh, sharded: bool) -> Mesh:
    """The devices of the server's arithmetic.

    Args:
      mesh: from `slot_mesh`.
      sharded: whether its parameters are sharded over all devices, of all processes; else each
        process computes the whole on its first device.
    """
    return Mesh(mesh.devices if sharded else np.array(own_devices(mesh)[:1]), (AXIS,))


def server_shardings(tree: PyTree, server: Mesh) -> PyTree:
    """How arrays lie at the server, for arrays or their shapes.

    Args:
      tree: leaves `[rows, ...]`, which are parted along the first axis behind the rows that the
        devices divide; where there is none, as in leaves of one axis, they lie whole on each. What
        computes with flat parameters had better have them along one axis.
      server: from `server_mesh`.
    """

    def sharding(leaf):
        axes = [i for i, n in enumerate(leaf.shape) if i and n and n % server.size == 0]
        spec = PartitionSpec(*[None] * axes[0], AXIS) if axes and server.size > 1 else WHOLE
        return NamedSharding(server, spec)

    return jax.tree.map(sharding, tree)


def on_server(tree: PyTree, server: Mesh) -> PyTree:
    """Puts arrays where `server_shardings` says.

    Args:
      tree: of all processes alike: numpy arrays, arrays of this process's, or there already.
      server: from `server_mesh`.
    """
    shardings = server_shardings(tree, server)
    if len(own_devices(server)) == server.size:
        return jax.device_put(tree, shardings)

    def put(leaf, sharding):
        if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
            return leaf
        whole = np.asarray(leaf)
        return jax.make_array_from_callback(whole.shape, sharding, lambda part: whole[part])

    return jax.tree.map(put, tree, shardings)


def collected(tree: PyTree, mesh: Mesh, server: Mesh | None = None) -> PyTree:
    """Brings arrays `[slots, ...]` in `ROWS` to the server: of all rows, each device its part.

    To a server of one device, or without one, all of it to the first device of every process.
    """
    if server and server.size == mesh.size > 1:
        # One by one, since XLA makes copies on the way.
        return jax.tree.map(
            lambda x, sharding: jax.jit(_same, out_shardings=sharding)(x),
            tree,
            server_shardings(tree, server),
        )
    if jax.process_count() > 1:
        tree = jax.jit(_same, out_shardings=NamedSharding(mesh, WHOLE))(tree)
        tree = jax.tree.map(lambda x: x.addressable_data(0), tree)
    return on_server(tree, server) if server else jax.device_put(tree, own_devices(mesh)[0])


def _same(tree: PyTree) -> PyTree:
    return tree


def map_slots(
    function: Callable[..., Any],
    mesh: Mesh,
    *,
    parallel_slots: int = 0,
    shared_specs: Any = WHOLE,
) -> Callable[..., Any]:
    """Maps a function of one slot over slots, sharded over the devices of a mesh.

    Args:
      function: `(shared, *rows) -> result`; `shared` is the same for all slots, each of `rows` is
        one slot's part, leaves `[...]`.
      mesh: from `slot_mesh`.
      parallel_slots: slots computed at once on a device. 0 = by platform: one after the other on
        CPU, which is faster there and takes a fraction of the memory; all at once on accelerators,
        which folds the slots into large matrix products.
      shared_specs: how `shared` lies on the devices, a prefix of its tree.

    Returns:
      `(shared, *stacked) -> results`, leaves `[slots, ...]`; to be jitted by the caller. The number
      of slots must be a multiple of the devices: see `padded_rows`. No device waits for another.
    """

    def on_device(shared, *stacked):
        slots = jax.tree.leaves(stacked)[0].shape[0]
        at_once = slots_at_once(mesh, slots, parallel_slots)
        if at_once == slots > 1:
            return jax.vmap(function, in_axes=(None, *[0] * len(stacked)))(shared, *stacked)
        return jax.lax.map(
            lambda rows: function(shared, *rows),
            stacked,
            batch_size=at_once if at_once > 1 else None,
        )

    def over_slots(shared, *stacked):
        return jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=(shared_specs, *[ROWS] * len(stacked)),
            out_specs=ROWS,
            check_vma=False,
        )(shared, *stacked)

    over_slots.__name__ = function.__name__  # what traces call it
    return over_slots


def padded_rows(rows: Int[np.ndarray, "rows"], multiple: int) -> Int[np.ndarray, "padded"]:
    """Repeats the last row up to a multiple of a number: `[rows]` to `[rows or more]`."""
    return np.pad(rows, (0, -len(rows) % multiple), mode="edge")
