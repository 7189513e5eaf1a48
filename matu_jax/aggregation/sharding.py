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
from jaxtyping import Array, Shaped

from matu_jax.aggregation.storage import TILE, in_tiles, mask_bytes

Axes = tuple[str, ...]
"""Names of the mesh axes over which parameters are sharded; () = they are all here."""


def total_over(x: Shaped[Array, "*shape"], axes: Axes) -> Shaped[Array, "*shape"]:
    """Sums of all devices."""
    return jax.lax.psum(x, axes) if axes else x


def largest_over(x: Shaped[Array, "*shape"], axes: Axes) -> Shaped[Array, "*shape"]:
    """The largest of all devices."""
    return jax.lax.pmax(x, axes) if axes else x


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
        """Whole tiles of `[rows, n]`, padded with zeros so that each device has whole tiles."""
        return self._padded(flat, 1)

    def pad_masks(self, flat: Sequence[Shaped[Array, "rows _"]]) -> list[Shaped[Array, "rows _"]]:
        """The same for packed masks `[rows, ceil(n / 8)]`."""
        return self._padded(flat, 8)

    def unpad_vectors(
        self, flat: Sequence[Shaped[Array, "rows _"]]
    ) -> list[Shaped[Array, "rows _"]]:
        """The inverse of `pad_vectors`."""
        return [_resized(x, n) for x, n in zip(flat, self._own_sizes, strict=True)]

    def unpad_masks(self, flat: Sequence[Shaped[Array, "rows _"]]) -> list[Shaped[Array, "rows _"]]:
        """The inverse of `pad_masks`."""
        return [_resized(x, mask_bytes(n)) for x, n in zip(flat, self._own_sizes, strict=True)]

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

    def _padded(self, flat: Sequence[jax.Array], unit: int) -> list[jax.Array]:
        """Whole tiles, then zeros; an element of the arrays is of `unit` parameters."""
        if self._mesh is None:
            return list(flat)
        sizes = zip(self._own_sizes, self._padded_sizes, strict=True)
        return [
            _resized(_resized(x, own // unit), padded // unit)
            for x, (own, padded) in zip(flat, sizes, strict=True)
        ]

    @property
    def _own_sizes(self) -> list[int]:
        """Parameters in whole tiles; where nothing is sharded, with a leaf's tail behind them."""
        return list(self._sizes) if self._mesh is None else [in_tiles(n) for n in self._sizes]

    @property
    def _padded_sizes(self) -> list[int]:
        multiple = TILE * self._mesh.size if self._mesh else 1
        return [-(-n // multiple) * multiple for n in self._own_sizes]


def _resized(x: Shaped[Array, "rows _"], size: int) -> Shaped[Array, "rows {size}"]:
    """The beginning of rows, or rows with zeros behind."""
    if x.shape[1] >= size:
        return jax.lax.slice_in_dim(x, 0, size, axis=1)
    return jnp.pad(x, ((0, 0), (0, size - x.shape[1])))
