"""Small leaves put together: one program for many of them instead of one for each.

Adapters of a deep network are hundreds of leaves of a few thousand parameters. Leaf by leaf, the
aggregator's programs would take minutes to trace and compile, and spend their time between leaves.
The tails of large leaves join them, so that what has parameters is in whole tiles everywhere.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from matu_jax.aggregation.storage import LANES, TILE, in_tiles, mask_bytes, tail_rows

_SMALL = 1 << 16  # parameters; the tiles of a leaf of more are a program of their own, not copied


class Joining(NamedTuple):
    """Which leaves are put together; made from shapes and dtypes alone.

    What is put together: first the large leaves, each by itself, with its tiles alone to be looked
    at; then groups of what is left, `[rows, a multiple of 1024]`: the tiles of small leaves, and,
    row by row (see `storage`), the tails of all. A group's packed mask so is made of those of its
    parts, byte for byte.

    Attributes:
      large: positions of large leaves.
      groups: positions of the leaves of which parts are put together, group by group.
      sizes: parameters of each leaf.
    """

    large: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...]

    @property
    def size(self) -> int:
        """Parameters of all leaves."""
        return sum(self.sizes)

    def vectors(self, leaves: Sequence[Shaped[Array, "rows _"]]) -> list[Shaped[Array, "rows _"]]:
        """Flat leaves `[rows, n]` to large ones and groups."""

        def joined(group):
            parts = [leaves[i][:, : in_tiles(self.sizes[i])] for i in self._tiled(group)]
            tails = [leaves[i][:, in_tiles(self.sizes[i]) :] for i in self._tailed(group)]
            if tails:
                rows = jnp.concatenate([tail_rows(tail) for tail in tails], axis=2)
                rows = jnp.pad(rows, ((0, 0), (0, 0), (0, -rows.shape[2] % LANES)))
                tiles = rows.reshape(rows.shape[0], 8, -1, LANES).swapaxes(1, 2)
                parts.append(tiles.reshape(rows.shape[0], -1))
            return jnp.concatenate(parts or [leaves[group[0]]], axis=1)

        return [leaves[i] for i in self.large] + [joined(group) for group in self.groups]

    def masks(self, leaves: Sequence[Shaped[Array, "rows _"]]) -> list[Shaped[Array, "rows _"]]:
        """Packed masks of flat leaves, `[rows, ceil(n / 8)]`, to those of large ones and groups."""

        def joined(group):
            whole = [leaves[i][:, : in_tiles(self.sizes[i]) // 8] for i in self._tiled(group)]
            tails = [leaves[i][:, in_tiles(self.sizes[i]) // 8 :] for i in self._tailed(group)]
            together = jnp.concatenate(whole + tails or [leaves[group[0]]], axis=1)
            return jnp.pad(together, ((0, 0), (0, -together.shape[1] % LANES)))

        return [leaves[i] for i in self.large] + [joined(group) for group in self.groups]

    def leaves(self, vectors: Sequence[Shaped[Array, "rows _"]]) -> list[Shaped[Array, "rows _"]]:
        """The inverse of `vectors`; of a large leaf's own array the tiles alone count."""

        def parts_of(array, group):
            whole, columns = self._extent(group)
            rows = array[:, whole:].reshape(array.shape[0], -1, 8, LANES).swapaxes(1, 2)
            rows = rows.reshape(array.shape[0], 8, -1)

            def tail(start, i):
                w, size = columns[i], self.sizes[i] % TILE
                return rows[:, :, start : start + w].reshape(array.shape[0], -1)[:, :size]

            return array, tail

        return self._parted(vectors, parts_of, 1)

    def leaf_masks(self, masks: Sequence[Shaped[Array, "rows _"]]) -> list[Shaped[Array, "rows _"]]:
        """The inverse of `masks`; of a large leaf's own mask the tiles alone count."""

        def parts_of(array, group):
            whole, columns = self._extent(group)
            behind = array[:, whole // 8 :]
            return array, lambda start, i: behind[:, start : start + columns[i]]

        return self._parted(masks, parts_of, 8)

    def _tiled(self, group: tuple[int, ...]) -> list[int]:
        """Leaves of a group whose tiles are put together."""
        return [i for i in group if i not in self.large and in_tiles(self.sizes[i])]

    def _tailed(self, group: tuple[int, ...]) -> list[int]:
        """Leaves of a group whose tails are."""
        return [i for i in group if self.sizes[i] % TILE]

    def _extent(self, group: tuple[int, ...]) -> tuple[int, dict[int, int]]:
        """Parameters in the whole tiles of a group's leaves, and the columns of each tail."""
        whole = sum(in_tiles(self.sizes[i]) for i in self._tiled(group))
        return whole, {i: mask_bytes(self.sizes[i] % TILE) for i in self._tailed(group)}

    def _parted(
        self,
        arrays: Sequence[jax.Array],
        parts_of: Callable[..., Any],
        unit: int,
    ) -> list[Any]:
        """Leaves of large arrays and groups; parameters per element of them are `unit`."""
        count = len(self.large)
        leaves: list[Any] = [None] * len(self.sizes)
        for i, array in zip(self.large, arrays[:count], strict=True):
            leaves[i] = array
        for group, array in zip(self.groups, arrays[count:], strict=True):
            tiles, tail = parts_of(array, group)
            start = 0
            for i in self._tiled(group):
                stop = start + in_tiles(self.sizes[i]) // unit
                leaves[i], start = tiles[:, start:stop], stop
            start = 0
            for i in self._tailed(group):
                found = tail(start, i)
                start += mask_bytes(self.sizes[i] % TILE)
                if leaves[i] is None:
                    leaves[i] = found
                elif leaves[i].shape[1] > in_tiles(self.sizes[i]) // unit:
                    at = (0, in_tiles(self.sizes[i]) // unit)
                    leaves[i] = jax.lax.dynamic_update_slice(leaves[i], found, at)
                else:
                    leaves[i] = jnp.concatenate([leaves[i], found], axis=1)
            for i in group:  # a leaf without parameters
                if leaves[i] is None:
                    leaves[i] = array[:, :0]
        return leaves


def joining(*trees: Sequence[Shaped[Array, "_ _"]]) -> Joining:
    """Puts small leaves together that have the same dtype in every one of the trees.

    Args:
      *trees: flat leaves `[rows, n]`, with the same sizes in all trees.
    """
    sizes = tuple(leaf.shape[1] for leaf in trees[0])
    large = tuple(i for i, size in enumerate(sizes) if size > _SMALL)
    groups: dict[Any, list[int]] = {}
    for i, size in enumerate(sizes):
        if i not in large or size % TILE:
            groups.setdefault(tuple(tree[i].dtype for tree in trees), []).append(i)
    return Joining(large, tuple(map(tuple, groups.values())), sizes)
