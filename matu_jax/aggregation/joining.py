"""Small leaves put together: one program for many of them instead of one for each.

Adapters of a deep network are hundreds of leaves of a few thousand parameters. Leaf by leaf, the
aggregator's programs would take minutes to trace and compile, and spend their time between leaves.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

_SMALL = 1 << 16  # parameters; a leaf of more is a program of its own, and is never copied


class Joining(NamedTuple):
    """Which leaves are put together; made from shapes and dtypes alone.

    Attributes:
      groups: positions of leaves, group by group; every leaf stands in one.
      sizes: parameters of each leaf.
    """

    groups: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...]

    @property
    def size(self) -> int:
        """Parameters of all leaves."""
        return sum(self.sizes)

    def vectors(self, leaves: Sequence[Shaped[Array, "rows _"]]) -> list[Shaped[Array, "rows _"]]:
        """Flat leaves `[rows, n]` to groups `[rows, N]`, with zeros up to multiples of 8."""
        return self._joined(leaves, _padded)

    def masks(self, leaves: Sequence[Shaped[Array, "rows _"]]) -> list[Shaped[Array, "rows _"]]:
        """Packed masks of flat leaves, `[rows, ceil(n / 8)]`, to those of groups."""
        return self._joined(leaves, lambda mask: mask)

    def leaves(self, vectors: Sequence[Shaped[Array, "rows _"]]) -> list[Shaped[Array, "rows _"]]:
        """The inverse of `vectors`."""
        return self._parted(vectors, [8 * n for n in self._bytes], self.sizes)

    def leaf_masks(self, masks: Sequence[Shaped[Array, "rows _"]]) -> list[Shaped[Array, "rows _"]]:
        """The inverse of `masks`."""
        return self._parted(masks, self._bytes, self._bytes)

    @property
    def _bytes(self) -> list[int]:
        return [-(-n // 8) for n in self.sizes]

    def _joined(
        self, leaves: Sequence[jax.Array], whole: Callable[[jax.Array], jax.Array]
    ) -> list[jax.Array]:
        return [
            leaves[group[0]]
            if len(group) == 1
            else jnp.concatenate([whole(leaves[i]) for i in group], axis=1)
            for group in self.groups
        ]

    def _parted(
        self, arrays: Sequence[jax.Array], places: Sequence[int], sizes: Sequence[int]
    ) -> list[Any]:
        leaves: list[Any] = [None] * len(self.sizes)
        for group, array in zip(self.groups, arrays, strict=True):
            start = 0
            for i in group:
                leaves[i] = jax.lax.slice_in_dim(array, start, start + sizes[i], axis=1)
                start += places[i]
        return leaves


def _padded(x: Shaped[Array, "rows _"]) -> Shaped[Array, "rows _"]:
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % 8)))


def joining(*trees: Sequence[Shaped[Array, "_ _"]]) -> Joining:
    """Puts small leaves together that have the same dtype in every one of the trees.

    Args:
      *trees: flat leaves `[rows, n]`, with the same sizes in all trees.
    """
    sizes = tuple(leaf.shape[1] for leaf in trees[0])
    groups: dict[Any, list[int]] = {}
    for i, size in enumerate(sizes):
        together = tuple(tree[i].dtype for tree in trees) if size <= _SMALL else i
        groups.setdefault(together, []).append(i)
    return Joining(tuple(map(tuple, groups.values())), sizes)
