"""What Pallas kernels read and write, from their grids, blocks and bodies.

To XLA a kernel is a custom call that takes whole arrays. How often it reads which part of them is
known where it is made:

- On a TPU, the programs of a kernel run one after the other, and a block is fetched (or, of a
  result, written) whenever it is another one than that of the program before.
- On a GPU nothing is kept from one program to another. A program reads what its body loads, each
  number of its block once if all its blocks fit its part of the second-level cache, else as often
  as it is loaded. Where it loads in a loop whose length depends on data, all programs together are
  taken to read an array once, and the kernel is among `unsure`.
"""

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np
from jax.experimental import pallas
from jax.extend.core import Jaxpr, Var, jaxpr_as_fun

from compiled.hlo import Array, Instruction, Type

_Shapes = tuple[tuple[int, ...], ...]
_LOADS = {"get", "masked_load", "load", "addupdate"}
_STORES = {"swap", "masked_swap", "store", "addupdate"}


class Moved(NamedTuple):
    """What a kernel moves.

    Attributes:
      operands: how many numbers of each it reads.
      results: how many numbers of each it writes.
      sure: whether the numbers follow from its grid and body.
    """

    operands: tuple[int, ...]
    results: tuple[int, ...]
    sure: bool = True


class _UnknownError(Exception):
    """Nothing says what a kernel moves."""


class Kernels:
    """The kernels that are made while programs are traced and lowered.

    Args:
      platform: that they are made for, "tpu" or "cuda".
      cache_bytes: of a GPU's second-level cache, one core's part.
    """

    def __init__(self, platform: str, cache_bytes: float) -> None:
        self._platform, self._cache_bytes = platform, cache_bytes
        self._made: dict[tuple[str, _Shapes], list[Mapping[str, Any]]] = {}

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Notes all that is made by `jax.experimental.pallas.pallas_call` meanwhile."""
        make = pallas.pallas_call

        def made(*arguments: Any, **options: Any) -> Callable[..., Any]:
            kernel = make(*arguments, **options)

            def call(*operands: Any) -> Any:
                self._note(jax.make_jaxpr(kernel)(*operands).jaxpr)
                return kernel(*operands)

            return call

        with mock.patch.object(pallas, "pallas_call", made):
            yield

    def _note(self, jaxpr: Jaxpr) -> None:
        (equation,) = (x for x in _equations(jaxpr) if x.primitive.name == "pallas_call")
        name = str(equation.params.get("name") or "pallas_call")
        key = name, tuple(np.shape(x.aval) for x in equation.invars)
        self._made.setdefault(key, []).append(equation.params)

    def find(self, call: Instruction, given: list[Type]) -> Moved | None:
        """What a custom call moves, by its place in the program and its operands."""
        shapes = tuple(x.dims if isinstance(x, Array) else () for x in given)
        places = re.split(r"[/\[\]]", call.operation)
        for (name, expected), made in self._made.items():
            if expected == shapes and name in places:
                return self._moved_by(made, shapes)
        return None

    def _moved_by(self, made: list[Mapping[str, Any]], shapes: _Shapes) -> Moved | None:
        """What kernels move that cannot be told apart where they are called, if it is the same."""
        try:
            found = {_moved(x, shapes, self._platform, self._cache_bytes) for x in made}
        except _UnknownError:
            return None
        return found.pop() if len(found) == 1 else None


def _equations(jaxpr: Jaxpr) -> Iterator[Any]:
    """All equations of a program, but for those of kernels."""
    for equation in jaxpr.eqns:
        yield equation
        if equation.primitive.name != "pallas_call":
            for inner in _inner(equation.params):
                yield from _equations(inner)


def _inner(params: Mapping[str, Any]) -> Iterator[Jaxpr]:
    for value in params.values():
        for part in value if isinstance(value, (tuple, list)) else [value]:
            part = getattr(part, "jaxpr", part)
            if hasattr(part, "eqns"):
                yield part


def _moved(params: Mapping[str, Any], shapes: _Shapes, platform: str, cache_bytes: float) -> Moved:
    grid = params["grid_mapping"]
    if not all(isinstance(size, int) for size in grid.grid):
        raise _UnknownError
    first, mappings = grid.num_index_operands, grid.block_mappings
    sure = True
    if platform == "tpu":
        counts = [_fetched(x, grid) for x in mappings]
    else:
        blocks = [_block_sizes(x, grid) for x in mappings]
        widths = [x.array_aval.dtype.itemsize for x in mappings]
        held = sum(int(b.max()) * width for b, width in zip(blocks, widths, strict=True))
        counts = []
        accesses = _accesses(params["jaxpr"], first, len(mappings))
        for mapping, sizes, numbers in zip(mappings, blocks, accesses, strict=True):
            if numbers == math.inf:
                sure = False
                counts.append(math.prod(mapping.array_aval.shape))
            else:
                loaded = np.full_like(sizes, numbers)
                kept = np.minimum(sizes, loaded) if held <= cache_bytes else loaded
                counts.append(int(kept.sum()))
    # Scalars that index maps look at stand in front: they are few, and read once.
    scalars = [math.prod(shape) for shape in shapes[:first]]
    inputs = grid.num_inputs
    return Moved((*scalars, *counts[:inputs]), tuple(counts[inputs:]), sure)


def _starts(mapping: Any, grid: Any) -> np.ndarray:
    """Where each program's block is, by its number along each axis: `[programs, axes]`."""
    closed, axes = mapping.index_map_jaxpr, len(grid.grid)
    scalars = closed.jaxpr.invars[axes:]
    used = {x for equation in closed.jaxpr.eqns for x in equation.invars if isinstance(x, Var)}
    if used & set(scalars):
        raise _UnknownError  # blocks that data chooses
    block_of = jaxpr_as_fun(closed)
    programs = np.indices(grid.grid, dtype=np.int32).reshape(axes, -1)
    unused = [np.zeros((), np.int32)] * len(scalars)
    each = jax.vmap(lambda *place: block_of(*place, *unused))
    found = each(*programs) if axes else block_of(*unused)
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


def _accesses(jaxpr: Jaxpr, first: int, count: int) -> list[float]:
    """How many numbers of each of so many references a body loads, or stores.

    Infinitely many where it does so in a loop of which it is not known how often it runs.
    """
    numbers = [0.0] * count
    known = dict(zip(jaxpr.invars[first:], range(count), strict=False))
    for which, size in _touched(jaxpr, known, 1):
        numbers[which] += size
    return numbers


def _touched(jaxpr: Jaxpr, known: Mapping[Any, int], times: float) -> Iterator[tuple[int, float]]:
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name in _LOADS | _STORES:
            which = known.get(equation.invars[0])
            loads = name in _LOADS and equation.outvars
            moved = equation.outvars[0] if loads else equation.invars[1]
            if which is not None:
                yield which, times * math.prod(getattr(moved.aval, "shape", ()))
            continue
        again = times * {"scan": params.get("length", 1), "while": math.inf}.get(name, 1)
        for inner, given in _called(equation):
            own = {
                new: known[old]
                for new, old in zip(inner.invars, given, strict=False)
                if isinstance(old, Var) and old in known
            }
            yield from _touched(inner, own, again)


def _called(equation: Any) -> Iterator[tuple[Jaxpr, list[Any]]]:
    """The programs within an equation, and what they are given."""
    params, given = equation.params, list(equation.invars)
    if equation.primitive.name == "while":
        tests, bodies = params["cond_nconsts"], params["body_nconsts"]
        carried = given[tests + bodies :]
        yield params["cond_jaxpr"].jaxpr, given[:tests] + carried
        yield params["body_jaxpr"].jaxpr, given[tests : tests + bodies] + carried
        return
    for inner in _inner(params):
        yield inner, given[-len(inner.invars) :]  # behind a predicate, or the like
