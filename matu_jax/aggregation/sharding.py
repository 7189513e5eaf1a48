"""Parameters sharded over devices: each computes its own shard, and sums go over all.

What the aggregator computes is made parameter by parameter, but for sums over parameters (lengths,
scales, products of signs) of a few numbers per slot or pair of tasks. So devices over which the
parameters are sharded exchange next to nothing, and each needs memory for its shard alone. On CPU
this is how XLA comes to use more than one core for one fold: with a virtual device for each.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, PartitionSpec
from jaxtyping import Array, Bool, Shaped

Axes = tuple[str, ...]
"""Names of the mesh axes over which parameters are sharded; () = they are all here."""


def total_over(x: Shaped[Array, "*shape"], axes: Axes) -> Shaped[Array, "*shape"]:
    """Sums of all devices."""
    return jax.lax.psum(x, axes) if axes else x


def largest_over(x: Shaped[Array, "*shape"], axes: Axes) -> Shaped[Array, "*shape"]:
    """The largest of all devices."""
    return jax.lax.pmax(x, axes) if axes else x


def all_over(x: Bool[Array, "*shape"], axes: Axes) -> Bool[Array, "*shape"]:
    """Whether bools hold on all devices."""
    return jax.lax.pmin(x.astype(jnp.int32), axes) > 0 if axes else x


def any_over(x: Bool[Array, "*shape"], axes: Axes) -> Bool[Array, "*shape"]:
    """Whether bools hold on some device."""
    return jax.lax.pmax(x.astype(jnp.int32), axes) > 0 if axes else x


def check_mesh(mesh: Mesh | None, name: str) -> Mesh | None:
    """The mesh, if its axes are such that `ParameterSharding` can use it.

    Raises:
      ValueError: for axes of a type other than Auto, naming them.
    """
    if mesh is not None:
        types = zip(mesh.axis_names, mesh.axis_types, strict=True)
        wrong = [f"{axis} is {kind.name}" for axis, kind in types if kind != AxisType.Auto]
        if wrong:
            raise ValueError(
                f"{name}: mesh: axis {', '.join(wrong)}, expected Auto. Make it with "
                "jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names)), AxisType "
                "from jax.sharding."
            )
    return mesh


class ParameterSharding:
    """Shards the parameters of flat arrays over the devices of a mesh, or leaves them whole.

    Args:
      mesh: the devices, all of its axes; None leaves everything where it is.
      sizes: parameters of each flat array, before they are padded with zeros.
    """

    def __init__(self, mesh: Mesh | None, sizes: Sequence[int]):
        self._mesh, self._sizes = mesh, tuple(sizes)
        self.axes: Axes = tuple(mesh.axis_names) if mesh else ()

    def pad_vectors(self, flat: Sequence[Shaped[Array, "rows _"]]) -> list[Shaped[Array, "rows _"]]:
        """Pads `[rows, n]` with zeros, so that each device has whole bytes of the masks."""
        return [_padded(x, n) for x, n in zip(flat, self._padded_sizes, strict=True)]

    def pad_masks(self, flat: Sequence[Shaped[Array, "rows _"]]) -> list[Shaped[Array, "rows _"]]:
        """The same for packed masks `[rows, ceil(n / 8)]`."""
        return [_padded(x, -(-n // 8)) for x, n in zip(flat, self._padded_sizes, strict=True)]

    def unpad_vectors(
        self, flat: Sequence[Shaped[Array, "rows _"]]
    ) -> list[Shaped[Array, "rows _"]]:
        """The inverse of `pad_vectors`."""
        return [_unpadded(x, n) for x, n in zip(flat, self._sizes, strict=True)]

    def unpad_masks(self, flat: Sequence[Shaped[Array, "rows _"]]) -> list[Shaped[Array, "rows _"]]:
        """The inverse of `pad_masks`."""
        return [_unpadded(x, -(-n // 8)) for x, n in zip(flat, self._sizes, strict=True)]

    def run(self, work: Callable[..., Any], columns: Any, rest: Any, out: Any) -> Any:
        """Calls `work(columns, rest)` on every device, with its shard of the columns.

        Args:
          work: uses `axes` for what goes over all parameters.
          columns: arrays `[rows, parameters]` or `[rows, bytes]`.
          rest: arrays that every device has whole.
          out: a prefix of the result's tree; True where arrays have columns.
        """
        if self._mesh is None:
            return work(columns, rest)
        spec, whole = PartitionSpec(None, self.axes), PartitionSpec()
        return jax.shard_map(
            work,
            mesh=self._mesh,
            in_specs=(spec, whole),
            out_specs=jax.tree.map(lambda columns: spec if columns else whole, out),
            check_vma=False,
        )(columns, rest)

    @property
    def _padded_sizes(self) -> list[int]:
        if self._mesh is None:
            return list(self._sizes)
        multiple = 8 * self._mesh.size
        return [-(-n // multiple) * multiple for n in self._sizes]


def _padded(x: Shaped[Array, "rows _"], size: int) -> Shaped[Array, "rows {size}"]:
    return x if x.shape[1] == size else jnp.pad(x, ((0, 0), (0, size - x.shape[1])))


def _unpadded(x: Shaped[Array, "rows _"], size: int) -> Shaped[Array, "rows {size}"]:
    return x if x.shape[1] == size else jax.lax.slice_in_dim(x, 0, size, axis=1)
