"""How much memory a program holds at once, told from its jaxpr before anything is compiled.

XLA keeps in memory what a kernel of its own (a matrix product, a loop, a sort) reads or writes;
what is elementwise it computes where it is read, and again behind another kernel if what it is made
of is still there. So the most that is alive during any kernel is what a program needs, but for how
a compiler orders its kernels and lays arrays out.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

_VIEWS = frozenset(
    {
        "broadcast_in_dim",
        "copy",
        "expand_dims",
        "name",
        "optimization_barrier",
        "reduce_precision",
        "reshape",
        "squeeze",
        "stop_gradient",
        "transpose",
    }
)
"""Operations whose results are their arguments, seen otherwise."""

_PARTS = frozenset({"dynamic_slice", "slice", "split"})
"""Operations that read a part of an array; of a program's own arguments where it lies."""

_KERNELS = frozenset(
    {
        "concatenate",
        "conv_general_dilated",
        "cumlogsumexp",
        "cummax",
        "cummin",
        "cumprod",
        "cumsum",
        "dot_general",
        "dynamic_update_slice",
        "fft",
        "gather",
        "pallas_call",
        "ragged_dot",
        "scan",
        "scatter",
        "scatter-add",
        "sort",
        "top_k",
        "triangular_solve",
        "while",
    }
)
"""Operations whose arguments and results are in memory, as those of cuDNN's attention are."""


def peak_bytes(jaxpr: core.ClosedJaxpr, platform: str) -> int:
    """The most bytes that a program holds at once, its results among them, its arguments not.

    Args:
      jaxpr: the program.
      platform: what it is lowered for, such as "cuda"; of what differs by platform, its part
        counts.
    """
    return _Program(jaxpr.jaxpr, platform).peak


class _Program:
    """A jaxpr's values by number: their bytes, and the kernels from the first to the last they see.

    Kernels are counted, the start of the program as the first of them. What is elementwise is there
    from the kernel before it on, and is made of `sources`; whether it is `kept` in memory is
    settled once it is known until when it is read.
    """

    def __init__(self, jaxpr: Any, platform: str, owned: Sequence[Any] = ()):
        """Follows a jaxpr; of its arguments, those in `owned` take memory of the program's."""
        self.platform = platform
        self.besides = [0]  # what each kernel takes besides what it reads and writes
        self.bytes: list[int] = []
        self.first: list[int] = []
        self.last: list[int] = []
        self.kept: list[bool] = []
        self.sources: list[list[int]] = []
        variables = [*jaxpr.constvars, *jaxpr.invars]
        arguments = [self._value(_bytes(v) if v in owned else 0, kept=True) for v in variables]
        self.arguments = frozenset(n for n in arguments if not self.bytes[n])
        results = self._follow(jaxpr, arguments)
        self._kernel_reads([*arguments, *results])
        self._settle()
        self.peak = max(self._held())

    def _value(self, size: int, *, kept: bool, sources: Sequence[int] = ()) -> int:
        self.bytes.append(size)
        self.first.append(len(self.besides) - 1)
        self.last.append(len(self.besides) - 1)
        self.kept.append(kept)
        self.sources.append(list(sources))
        return len(self.bytes) - 1

    def _kernel_reads(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            self.kept[number] = True
            self.last[number] = len(self.besides) - 1

    def _follow(self, jaxpr: Any, arguments: Sequence[int]) -> list[int]:
        """The numbers of a jaxpr's results, from those of its constants and arguments."""
        known = dict(zip((*jaxpr.constvars, *jaxpr.invars), arguments, strict=True))

        def numbers(atoms: Sequence[Any]) -> list[int]:
            return [
                self._value(0, kept=False) if isinstance(atom, core.Literal) else known[atom]
                for atom in atoms
            ]

        for operation in jaxpr.eqns:
            results = self._results(operation, numbers(operation.invars))
            known.update(zip(operation.outvars, results, strict=True))
        return numbers(jaxpr.outvars)

    def _results(self, operation: Any, given: list[int]) -> list[int]:
        name, outs = operation.primitive.name, operation.outvars
        if name == "cond":
            return self._inlined(self._branch(operation.params), given[1:])
        if name in _KERNELS or name.startswith("dot_product_attention"):
            self.besides.append(self._inside(name, operation.params))
            self._kernel_reads(given)
            return [self._value(_bytes(out), kept=True) for out in outs]
        for inside in _jaxprs(operation.params):
            if name != "reduce" and len(inside.invars) == len(given):
                return self._inlined(inside, given)
        widens = name == "convert_element_type" and _bytes(outs[0]) >= _bytes(operation.invars[0])
        if name in _VIEWS and len(given) == len(outs):
            return given
        if widens or (name in _PARTS and given[0] in self.arguments):
            return given[:1] * len(outs)
        for number in given:
            self.last[number] = len(self.besides) - 1
        return [self._value(_bytes(out), kept=False, sources=given) for out in outs]

    def _inlined(self, inside: Any, given: Sequence[int]) -> list[int]:
        constants = [self._value(0, kept=False) for _ in inside.constvars]
        return self._follow(inside, [*constants, *given])

    def _branch(self, parameters: dict[str, Any]) -> Any:
        """That of the platform, or the one that needs most."""
        branches = [branch.jaxpr for branch in parameters["branches"]]
        platforms = parameters.get("branches_platforms") or ()
        for branch, names in zip(branches, platforms, strict=False):
            if names is None or self.platform in names:
                return branch
        return max(branches, key=lambda branch: _Program(branch, self.platform).peak)

    def _inside(self, name: str, parameters: dict[str, Any]) -> int:
        """What one turn of a loop takes, the rows that it reads among it."""
        if name == "scan":
            body = parameters["jaxpr"].jaxpr
            rows = body.invars[parameters["num_consts"] + parameters["num_carry"] :]
            return _Program(body, self.platform, owned=rows).peak
        if name == "while":
            return _Program(parameters["body_jaxpr"].jaxpr, self.platform).peak
        return 0

    def _settle(self) -> None:
        """Keeps what is elementwise and read behind a kernel, or else longer what it is made of."""
        for number, until in enumerate(self.last):
            if self.kept[number] or until == self.first[number]:
                continue
            gone = {n for n in self._made_of(number) if self.last[n] < until}
            if sum(self.bytes[n] for n in gone) > self.bytes[number]:
                self.kept[number] = True
            else:
                for n in gone:
                    self.last[n] = until

    def _made_of(self, number: int) -> Iterator[int]:
        """What is in memory of that which a value is computed from."""
        seen, todo = {number}, [number]
        while todo:
            for source in self.sources[todo.pop()]:
                if source in seen:
                    continue
                seen.add(source)
                if self.kept[source]:
                    yield source
                else:
                    todo.append(source)

    def _held(self) -> Iterator[int]:
        """Bytes during each kernel."""
        change = [0] * (len(self.besides) + 1)
        for number, kept in enumerate(self.kept):
            if kept:
                change[self.first[number]] += self.bytes[number]
                change[self.last[number] + 1] -= self.bytes[number]
        held = 0
        for by, besides in zip(change, self.besides, strict=False):
            held += by
            yield held + besides


def _bytes(atom: Any) -> int:
    """Of an array; random keys and tokens have none."""
    dtype = getattr(atom.aval, "dtype", None)
    if dtype is None or jnp.issubdtype(dtype, jax.dtypes.extended):
        return 0
    return math.prod(atom.aval.shape) * dtype.itemsize


def _jaxprs(parameters: dict[str, Any]) -> Iterator[Any]:
    """Those among an operation's parameters."""
    for parameter in parameters.values():
        inside = getattr(parameter, "jaxpr", parameter)
        if isinstance(inside, core.Jaxpr):
            yield inside
