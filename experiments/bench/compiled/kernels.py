"""What a program's Pallas kernels read and write, from their grids, blocks and bodies.

To XLA a kernel is a custom call that takes whole arrays. How often it reads which part of them
stands in the program before it is lowered:

- On a TPU, the programs of a kernel run one after the other, and a block is fetched (or, of a
  result, written) whenever it is another one than that of the program before.
- On a GPU nothing is kept from one program to another. A program reads what its body loads, each
  number of its block once if all its blocks fit its part of the second-level cache, else as often
  as it is loaded.
"""

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import Jaxpr, Var, jaxpr_as_fun

from compiled.hlo import Array, Instruction, Type

_LOADS = {"get", "masked_load", "load", "addupdate"}
_STORES = {"swap", "masked_swap", "store", "addupdate"}


class Moved(NamedTuple):
    """How many numbers of each operand a kernel reads and of each result it writes."""

    operands: tuple[int, ...]
    results: tuple[int, ...]


_Key = tuple[str, tuple[tuple[int, ...], ...]]
KernelTable = Mapping[_Key, Moved]
"""By a kernel's name and the shapes of its operands."""


class _UnknownError(Exception):
    """Nothing says what a kernel moves."""


def kernels_of(jaxpr: Jaxpr, platform: str, cache_bytes: float) -> KernelTable:
    """The kernels of a program, but for those of which nothing says what they move.

    Args:
      jaxpr: the program as it was traced.
      platform: that it is lowered for, "tpu" or "cuda".
      cache_bytes: of a GPU's second-level cache, one core's part.
    """
    found: dict[_Key, Moved] = {}
    for equation in _equations(jaxpr, platform):
        if equation.primitive.name == "pallas_call":
            shapes = tuple(tuple(x.aval.shape) for x in equation.invars)
            with contextlib.suppress(_UnknownError):
                moved = _moved(equation.params, platform, cache_bytes)
                found[str(equation.params.get("name") or "pallas_call"), shapes] = moved
    return found


def lookup(kernels: KernelTable) -> Callable[[Instruction, list[Type]], Moved | None]:
    """What finds the numbers that a custom call moves, by its place in the program and operands."""

    def find(call: Instruction, given: list[Type]) -> Moved | None:
        shapes = tuple(x.dims if isinstance(x, Array) else () for x in given)
        places = re.split(r"[/\[\]]", call.operation)
        for (name, expected), moved in kernels.items():
            if expected == shapes and name in places:
                return moved
        return None

    return find


def _equations(jaxpr: Jaxpr, platform: str) -> Iterator[Any]:
    """All equations of a program, of branches by platform those of one, and of no kernel."""
    for equation in jaxpr.eqns:
        yield equation
        if equation.primitive.name != "pallas_call":
            params = dict(equation.params)
            if chosen := params.get("branches_platforms"):
                ours = [x for x in chosen if x is None or platform in x]
                params = {"branch": params["branches"][chosen.index(ours[0])]}
            for inner in _inner(params):
                yield from _equations(inner, platform)


def _inner(params: Mapping[str, Any]) -> Iterator[Jaxpr]:
    for value in params.values():
        for part in value if isinstance(value, (tuple, list)) else [value]:
            part = getattr(part, "jaxpr", part)
            if hasattr(part, "eqns"):
                yield part


def _moved(params: Mapping[str, Any], platform: str, cache_bytes: float) -> Moved:
    grid = params["grid_mapping"]
    if not all(isinstance(size, int) for size in grid.grid):
        raise _UnknownError
    first, mappings = grid.num_index_operands, grid.block_mappings
    if platform == "tpu":
        counts = [_fetched(x, grid) for x in mappings]
    else:
        blocks = [_block_sizes(x, grid) for x in mappings]
        widths = [x.array_aval.dtype.itemsize for x in mappings]
        held = sum(int(b.max()) * width for b, width in zip(blocks, widths, strict=True))
        counts = []
        accesses = _accesses(params["jaxpr"], first, len(mappings))
        for sizes, numbers in zip(blocks, accesses, strict=True):
            loaded = np.full_like(sizes, numbers)
            counts.append(int((np.minimum(sizes, loaded) if held <= cache_bytes else loaded).sum()))
    # Scalars that index maps look at stand in front: they are few, and read once.
    scalars = [math.prod(x.shape) for x in list(grid.in_shapes)[:first]]
    return Moved((*scalars, *counts[: grid.num_inputs]), tuple(counts[grid.num_inputs :]))


def _starts(mapping: Any, grid: Any) -> np.ndarray:
    """Where each program's block is, by its number along each axis: `[programs, axes]`."""
    if grid.num_index_operands:
        raise _UnknownError
    programs = np.indices(grid.grid, dtype=np.int32).reshape(len(grid.grid), -1)
    block_of = jaxpr_as_fun(mapping.index_map_jaxpr)
    found = jax.vmap(block_of)(*programs) if grid.grid else block_of()
    count = math.prod(grid.grid)
    return np.stack([np.broadcast_to(np.asarray(x), (count,)) for x in found], axis=1)


def _block_sizes(mapping: Any, grid: Any) -> np.ndarray:
    """How many numbers of each program's block are inside of the array: int64 `[programs]`."""
    starts = _starts(mapping, grid).astype(np.int64)
    sizes = np.ones(len(starts), np.int64)
    shape = mapping.array_aval.shape
    for axis, (block, length) in enumerate(zip(mapping.block_shape, shape, strict=True)):
        kind, size = type(block).__name__, getattr(block, "block_size", 1)
        if kind not in ("Blocked", "Element", "Squeezed"):
            raise _UnknownError
        begin = starts[:, axis] * (1 if kind == "Element" else size)
        sizes *= np.clip(length - begin, 0, size)
    return sizes


def _fetched(mapping: Any, grid: Any) -> int:
    """Numbers of all blocks that are another one than that of the program before."""
    if str(getattr(mapping.block_aval, "memory_space", "")).lower() in ("any", "hbm"):
        raise _UnknownError  # it stays in main memory, and the body copies what it wants
    sizes, starts = _block_sizes(mapping, grid), _starts(mapping, grid)
    changed = np.ones(len(starts), bool)
    changed[1:] = (starts[1:] != starts[:-1]).any(axis=1)
    return int(sizes[changed].sum())


def _accesses(jaxpr: Jaxpr, first: int, count: int) -> list[int]:
    """How many numbers of each of so many references a body loads, or stores."""
    numbers = [0] * count
    known = dict(zip(jaxpr.invars[first:], range(count), strict=False))
    for which, size in _touched(jaxpr, known, 1):
        numbers[which] += size
    return numbers


def _touched(jaxpr: Jaxpr, known: Mapping[Any, int], times: int) -> Iterator[tuple[int, int]]:
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name in _LOADS | _STORES:
            which = known.get(equation.invars[0])
            moved = (
                equation.outvars[0] if name in _LOADS and equation.outvars else equation.invars[1]
            )
            if which is not None:
                yield which, times * math.prod(getattr(moved.aval, "shape", ()))
            continue
        again = times * params.get("length", 1) if name == "scan" else times
        for inner in _inner(params):
            given = equation.invars[-len(inner.invars) :]  # behind a predicate, or the like
            own = {
                new: known[old]
                for new, old in zip(inner.invars, given, strict=False)
                if isinstance(old, Var) and old in known
            }
            yield from _touched(inner, own, again)
