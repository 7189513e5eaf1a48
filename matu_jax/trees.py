"""Pytrees of parameters: stacking, task vectors, and the checks behind every error message.

The sign convention lives here and nowhere else: a task vector is *tuned minus base*.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

if TYPE_CHECKING:  # jaxtyping's is unknown to type checkers; here it is Any, whatever its leaves
    from typing_extensions import TypeAliasType, TypeVar

    _Leaf = TypeVar("_Leaf", default=Any)
    PyTree = TypeAliasType("PyTree", Any, type_params=(_Leaf,))
else:
    from jaxtyping import PyTree

Leaf = ArrayLike | np.generic  # numpy's scalars of bfloat16 are no numbers to it


def leaf_items(tree: PyTree) -> list[tuple[str, Any]]:
    """Lists `(path, leaf)` pairs, with paths as a person writes them (`encoder/0/kernel`)."""
    items, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [
        (jax.tree_util.keystr(path, simple=True, separator="/") or "(root)", leaf)
        for path, leaf in items
    ]


def fingerprint(tree: PyTree) -> str:
    """SHA-256 of all leaves' paths, dtypes, shapes and bytes, as hexadecimal digits.

    Args:
      tree: arrays, also such of random keys, and numbers.
    """
    digest = hashlib.sha256()
    for path, leaf in leaf_items(tree):
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        array = np.asarray(leaf)
        digest.update(repr((path, array.dtype.str, array.shape)).encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def as_floating(tree: PyTree, name: str) -> PyTree[Float[Array, "..."]]:
    """Converts every leaf to a JAX array and refuses leaves that are not floating point.

    Args:
      tree: any pytree of numpy or JAX arrays.
      name: what to call the tree in the error.

    Returns:
      The same tree with JAX arrays as leaves.

    Raises:
      ValueError: lists every leaf that is not a floating-point array, with its path and dtype.
    """
    wrong = []
    for path, leaf in leaf_items(tree):
        dtype = getattr(leaf, "dtype", None)
        if dtype is None and isinstance(leaf, float):
            continue
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            wrong.append(f"  {path}: {dtype if dtype is not None else type(leaf).__name__}")
    if wrong:
        raise ValueError(
            f"{name}: every leaf must be a floating-point array (float32, bfloat16 or float16); "
            f"found\n" + "\n".join(wrong) + "\nLeave these leaves out, or cast them first."
        )
    return jax.tree.map(jnp.asarray, tree)


def tree_bytes(tree: PyTree) -> int:
    """Bytes of all leaves, arrays or their shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def check_stacked(tree: PyTree, name: str, *, rows: int | None = None, axis: str = "slots") -> int:
    """Checks that all leaves share one leading axis, and returns its length.

    Args:
      tree: a pytree of arrays, leaves `[axis, ...]`.
      name: what to call the tree in the error.
      rows: the length that the leading axis must have; any, if None.
      axis: the name of the leading axis in the error.

    Returns:
      The length of the leading axis.

    Raises:
      ValueError: if the tree has no leaves, or lists the leaves whose leading axis differs.
    """
    items = leaf_items(tree)
    if not items:
        raise ValueError(f"{name}: found a tree without leaves; expected leaves [{axis}, ...].")
    lengths = Counter(leaf.shape[0] for _, leaf in items if leaf.ndim)
    if rows is None and not lengths:
        raise ValueError(
            f"{name}: leaf {items[0][0]} has shape (); expected a leading axis [{axis}, ...]. "
            "Stack the trees first, with matu_jax.stack."
        )
    length = lengths.most_common(1)[0][0] if rows is None else rows
    wrong = [
        f"  {path}: shape {leaf.shape}"
        for path, leaf in items
        if not leaf.ndim or leaf.shape[0] != length
    ]
    if wrong:
        raise ValueError(
            f"{name}: every leaf must have a leading axis [{axis}] of length {length}; found\n"
            + "\n".join(wrong)
            + "\nStack the trees with matu_jax.stack, in the order of the slots."
        )
    if length == 0:
        raise ValueError(f"{name}: the leading axis [{axis}] is empty; expected at least one row.")
    return length


def check_like(tree: PyTree, reference: PyTree, name: str, *, leading: int) -> None:
    """Checks that `tree` is `reference` with `leading` extra axes in front of every leaf.

    Raises:
      ValueError: if the structures differ (naming the missing and unknown leaves), or lists every
        leaf whose shape differs.
    """
    found, expected = dict(leaf_items(tree)), dict(leaf_items(reference))
    if jax.tree.structure(tree) != jax.tree.structure(reference):
        missing = sorted(expected.keys() - found.keys())
        unknown = sorted(found.keys() - expected.keys())
        raise ValueError(
            f"{name}: the tree differs from the one it must match; missing leaves: "
            f"{', '.join(missing) or 'none'}; unknown leaves: {', '.join(unknown) or 'none'}. "
            "Both must be of one form, such as of the same model and the same trainable parameters."
        )
    wrong = [
        f"  {path}: found {leaf.shape}, expected {'[rows] + ' if leading else ''}"
        f"{expected[path].shape}"
        for path, leaf in found.items()
        if leaf.shape[leading:] != expected[path].shape or leaf.ndim < leading
    ]
    if wrong:
        raise ValueError(f"{name}: leaf shapes differ\n" + "\n".join(wrong))


def check_dtypes(tree: PyTree, reference: PyTree, name: str) -> None:
    """Checks that two trees of one structure have the same dtypes.

    Raises:
      ValueError: lists every leaf whose dtype differs.
    """
    expected = dict(leaf_items(reference))
    wrong = [
        f"  {path}: found {leaf.dtype}, expected {expected[path].dtype}"
        for path, leaf in leaf_items(tree)
        if leaf.dtype != expected[path].dtype
    ]
    if wrong:
        raise ValueError(f"{name}: dtypes differ\n" + "\n".join(wrong) + "\nCast one to the other.")


def stack(trees: Sequence[PyTree[Float[Leaf, "..."]]]) -> PyTree[Float[Array, "slots ..."]]:
    """Stacks trees of the same structure along a new leading axis.

    Args:
      trees: one tree of floating leaves `[...]` per slot.

    Returns:
      One tree, leaves `[slots, ...]`.

    Raises:
      ValueError: if the sequence is empty, or a tree differs in structure, shape or dtype from the
        first (naming the tree's position and the leaf).
    """
    trees = list(trees)
    if not trees:
        raise ValueError("stack: found no trees; expected one tree per slot.")
    trees = [as_floating(tree, f"stack: tree {i}") for i, tree in enumerate(trees)]
    for i, tree in enumerate(trees[1:], start=1):
        check_like(tree, trees[0], f"stack: tree {i} against tree 0", leading=0)
        check_dtypes(tree, trees[0], f"stack: tree {i} against tree 0")
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def task_vectors(
    tuned: PyTree[Float[Leaf, "slots ..."]], base: PyTree[Float[Leaf, "..."]]
) -> PyTree[Float[Array, "slots ..."]]:
    """Task vectors: tuned minus base parameters (Ilharco et al. 2023, arXiv 2212.04089).

    Args:
      tuned: fine-tuned parameters, leaves `[slots, ...]`.
      base: pretrained parameters, leaves `[...]`.

    Returns:
      A tree like `tuned`, leaves `[slots, ...]` in `tuned`'s dtypes; subtracted in float32.

    Raises:
      ValueError: if the trees do not match, naming the leaves.
    """
    tuned, base = as_floating(tuned, "task_vectors: tuned"), as_floating(base, "task_vectors: base")
    check_stacked(tuned, "task_vectors: tuned")
    check_like(tuned, base, "task_vectors: tuned against base", leading=1)
    check_dtypes(tuned, base, "task_vectors: tuned against base")
    return jax.tree.map(
        lambda t, b: (t.astype(jnp.float32) - b.astype(jnp.float32)[None]).astype(t.dtype),
        tuned,
        base,
    )


def apply_vectors(
    base: PyTree[Float[Leaf, "..."]], vectors: PyTree[Float[Leaf, "slots ..."]]
) -> PyTree[Float[Array, "slots ..."]]:
    """Adds task vectors to the base parameters: the inverse of `task_vectors`.

    Args:
      base: pretrained parameters, leaves `[...]`.
      vectors: task vectors, leaves `[slots, ...]`.

    Returns:
      Parameters, leaves `[slots, ...]` in `base`'s dtypes; added in float32.

    Raises:
      ValueError: if the trees do not match, naming the leaves.
    """
    base = as_floating(base, "apply_vectors: base")
    vectors = as_floating(vectors, "apply_vectors: vectors")
    check_stacked(vectors, "apply_vectors: vectors")
    check_like(vectors, base, "apply_vectors: vectors against base", leading=1)
    return jax.tree.map(
        lambda b, v: (b.astype(jnp.float32)[None] + v.astype(jnp.float32)).astype(b.dtype),
        base,
        vectors,
    )
