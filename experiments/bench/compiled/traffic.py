"""What an optimised HLO module costs.

XLA prints what it has compiled: every instruction of the computations that run is a kernel, and its
operands and results say what it moves. `traffic` adds them up. The rules:

- Arrays take what they take in memory: TPU tiles, `T(8,128)`, are filled up. What lies in the fast
  memory of a TPU core, `S(1)`, moves nothing; neither do tuples and bitcasts.
- Within one kernel everything is read at most once, and of an operand no more than is needed for
  the result: through slices and gathers, also within a fusion, only what they take.
- What is updated in place (a dynamic update or a scatter that is what a fusion yields, of what it
  was given) is written as far as it is new.
- An asynchronous copy or slice, which is how a TPU brings arrays to fast memory, moves what it
  would move otherwise; it counts where it starts.
- A loop counts as often as it runs: as XLA notes it, else as a counter from one constant to another
  makes it, else once, and it is listed among `unknown_loops`.
- Of a conditional the branch that moves least counts; `most_bytes` has the one that moves most.
- A Pallas kernel reads every array that it is given once, however many views of it it takes,
  unless the caller knows what it reads (`pallas.py`).
- Scratch memory of cuBLAS and cuDNN moves nothing.

What is not seen: what a cache saves between kernels, and what a sort or a kernel of a library
moves more often than once.
"""

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from compiled.hlo import Array, Computation, Instruction, Module, Type, arrays, parse, written
from compiled.kernels import Moved
from compiled.loops import trips
from compiled.products import product_operations

FAST_MEMORY = {"tpu": (1,), "cuda": (), "cpu": ()}
"""Memory spaces of a platform that are none of the device's main memory: VMEM of a TPU core."""

_HOST_MEMORY = 5
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("partition-id", "replica-id", "add-dependency", "opt-barrier", "domain"),
    *("send", "recv", "infeed", "outfeed"),
}
_PLACEHOLDERS = {"AllocateBuffer", "PinToDevice", "Sharding", "AssumeGatherIndicesInBound"}
_COLLECTIVES = {
    *("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
}
_PALLAS = {"tpu_custom_call", "triton_kernel_call", "__gpu$xla.gpu.triton", "mosaic_gpu_v2"}


class Mover(NamedTuple):
    """Instructions of one place that move the same.

    Attributes:
      bytes: of all their executions.
      times: how often they run.
      opcode: such as "fusion".
      shape: of the result, as HLO writes it, without layout.
      operation: where the program asked for it.
    """

    bytes: int
    times: int
    opcode: str
    shape: str
    operation: str


class Collective(NamedTuple):
    """What crosses between devices.

    Attributes:
      opcode: such as "all-reduce".
      operation: where the program asked for it.
      group: how many devices exchange with one another.
      times: how often it runs.
      link_bytes: what a device receives in all its executions, sent around in a ring.
    """

    opcode: str
    operation: str
    group: int
    times: int
    link_bytes: int


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What a module, or a part of it, costs on one device.

    Attributes:
      bytes: read from main memory and written to it, with the cheapest branches.
      most_bytes: the same with the dearest.
      launches: kernels and copies, with the cheapest branches.
      operations: multiplications and additions of matrix products, by the operands' dtype.
      collectives: what crosses between devices.
      movers: what moves.
      unknown_loops: loops that count once because nothing says how often they run.
      unknown_kernels: Pallas kernels that are taken to read every array once, or some of them,
        because nothing says how often they do.
    """

    bytes: int = 0
    most_bytes: int = 0
    launches: int = 0
    operations: Mapping[str, int] = dataclasses.field(default_factory=dict)
    collectives: tuple[Collective, ...] = ()
    movers: tuple[Mover, ...] = ()
    unknown_loops: tuple[str, ...] = ()
    unknown_kernels: tuple[str, ...] = ()

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(
            self.bytes + other.bytes,
            self.most_bytes + other.most_bytes,
            self.launches + other.launches,
            Counter(self.operations) + Counter(other.operations),
            self.collectives + other.collectives,
            self.movers + other.movers,
            self.unknown_loops + other.unknown_loops,
            self.unknown_kernels + other.unknown_kernels,
        )

    def repeated(self, times: int) -> "Traffic":
        """The same, so many times."""
        return dataclasses.replace(
            self,
            bytes=times * self.bytes,
            most_bytes=times * self.most_bytes,
            launches=times * self.launches,
            operations={dtype: times * count for dtype, count in self.operations.items()},
            collectives=tuple(
                x._replace(times=times * x.times, link_bytes=times * x.link_bytes)
                for x in self.collectives
            ),
            movers=tuple(
                x._replace(bytes=times * x.bytes, times=times * x.times) for x in self.movers
            ),
        )

    def largest(self, count: int) -> list[Mover]:
        """What moves most, those of one place and shape together."""
        together: dict[tuple, Mover] = {}
        for mover in self.movers:
            key = mover[2:]
            there = together.get(key, mover._replace(bytes=0, times=0))
            together[key] = there._replace(
                bytes=there.bytes + mover.bytes, times=there.times + mover.times
            )
        return sorted(together.values(), reverse=True)[:count]


KernelLookup = Callable[[Instruction, list[Type]], Moved | None]
"""`(custom call, what it takes) -> what it moves`, None if nobody knows."""


def traffic(text: str, platform: str, kernel: KernelLookup = lambda call, given: None) -> Traffic:
    """What a module costs on one device.

    Args:
      text: the optimised module.
      platform: "tpu", "cuda" or "cpu": which memory is fast.
      kernel: finds what Pallas kernels move, see `kernels.Kernels.find`.
    """
    module = parse(text)
    return _Reader(module, FAST_MEMORY[platform], kernel).of(module.entry)


class _Reader:
    """Counts a module's computations, each once."""

    def __init__(self, module: Module, fast: Iterable[int], kernel: KernelLookup) -> None:
        self._module, self._find_kernel = module, kernel
        self._elsewhere = {*fast, _HOST_MEMORY}
        self._counted: dict[str, Traffic] = {}

    def of(self, name: str) -> Traffic:
        """What one execution of a computation costs."""
        if name not in self._counted:
            within = self._module.computations[name]
            parts = (self._one(x, within) for x in within.instructions.values())
            self._counted[name] = sum(parts, start=Traffic())
        return self._counted[name]

    def _one(self, instruction: Instruction, within: Computation) -> Traffic:
        """What one instruction costs."""
        opcode = instruction.opcode
        base = opcode.removesuffix("-start")
        if base in _FREE or opcode.endswith(("-done", "-update")):
            return Traffic()
        if opcode == "custom-call" and instruction.target in _PLACEHOLDERS:
            return Traffic()
        if opcode == "while":
            return self._loop(instruction, within)
        if opcode == "conditional":
            return self._conditional(instruction)
        if base == "call":
            return self.of(instruction.called("to_apply"))
        if base == "async":
            return self.of(instruction.called("calls"))
        if base != opcode:
            finished = _result_of_start(base, instruction.type)
            instruction = instruction._replace(opcode=base, type=finished)
        return self._kernel(instruction, within)

    def _loop(self, instruction: Instruction, within: Computation) -> Traffic:
        once = self.of(instruction.called("body"))
        times = trips(self._module, instruction, within)
        if times is not None:
            return once.repeated(times)
        place = instruction.operation or instruction.name
        once += self.of(instruction.called("condition"))  # which is computed every time
        return dataclasses.replace(once, unknown_loops=(*once.unknown_loops, place))

    def _conditional(self, instruction: Instruction) -> Traffic:
        branches = [self.of(name) for name in instruction.branches]
        least = min(branches, key=lambda x: x.bytes)
        return dataclasses.replace(least, most_bytes=max(x.most_bytes for x in branches))

    def _kernel(self, instruction: Instruction, within: Computation) -> Traffic:
        taken = [within.instructions[name] for name in instruction.operands]
        place, unknown = instruction.operation, ()
        if instruction.opcode == "custom-call" and instruction.target in _PALLAS:
            found = self._find_kernel(instruction, [x.type for x in taken])
            if found is None or not found.sure:
                unknown = (place or instruction.name,)
            moved = self._pallas(instruction, taken, found)
        else:
            moved = self._read(instruction, taken) + self._written(instruction, within)
        operations, collectives = Counter(), []
        for inner, where in self._fused(instruction, within):
            given = [where.instructions[name].type for name in inner.operands]
            operations += Counter(product_operations(inner, given))
            if inner.opcode in _COLLECTIVES:
                group = _group(inner, self._module.devices)
                size = sum(array.bytes for part in given for array in arrays(part))
                link = round(size * _ring_share(inner.opcode, group))
                collectives.append(Collective(inner.opcode, inner.operation, group, 1, link))
        mover = Mover(moved, 1, instruction.opcode, written(instruction.type), place)
        return Traffic(
            bytes=moved,
            most_bytes=moved,
            launches=1,
            operations=operations,
            collectives=tuple(collectives),
            movers=(mover,),
            unknown_kernels=unknown,
        )

    def _pallas(
        self, instruction: Instruction, taken: list[Instruction], moves: Moved | None
    ) -> int:
        """Bytes that a Pallas kernel moves: where nobody knows, of every array once."""
        if moves is None:
            whole = [*{x.name: x.type for x in taken}.values(), instruction.type]
            return sum(self._slow(array) for part in whole for array in arrays(part))
        whole = [x.type for x in taken] + list(arrays(instruction.type))
        total = 0
        # Scratch memory, where there is some, stands behind the results.
        for array, count in zip(whole, [*moves.operands, *moves.results], strict=False):
            if isinstance(array, Array):
                total += self._slow(array) * count // max(1, array.size)
        return total

    def _fused(
        self, instruction: Instruction, within: Computation
    ) -> Iterator[tuple[Instruction, Computation]]:
        """An instruction, or all that a fusion is made of; and where they stand."""
        if instruction.opcode != "fusion":
            yield instruction, within
            return
        body = self._module.computations[instruction.called("calls")]
        for inner in body.instructions.values():
            yield from self._fused(inner, body)

    def _slow(self, array: Array) -> int:
        """An array's bytes in main memory."""
        return 0 if array.space in self._elsewhere else array.bytes

    def _read(self, instruction: Instruction, taken: list[Instruction]) -> int:
        """Bytes of operands that are read."""
        sizes = [result_size(x) for x in taken]
        needed = self._needed(instruction, result_size(instruction), sizes, in_place=True)
        numbers: dict[str, int] = {}
        for operand, count in zip(taken, needed, strict=True):
            numbers[operand.name] = numbers.get(operand.name, 0) + count
        total = 0
        for operand in {x.name: x for x in taken}.values():
            whole, size = sum(map(self._slow, arrays(operand.type))), result_size(operand)
            total += whole * min(numbers[operand.name], size) // max(1, size)
        return total

    def _written(self, instruction: Instruction, within: Computation) -> int:
        """Bytes of results that are written."""
        if instruction.opcode == "custom-call" and instruction.target.startswith("__cu"):
            results = list(arrays(instruction.type))
            scratch = len(results) > 1 and results[-1].dtype in ("s8", "u8")
            return sum(map(self._slow, results[:-1] if scratch else results))
        if instruction.opcode == "fusion":
            body = self._module.computations[instruction.called("calls")]
            roots = _roots(body)
            results = list(arrays(instruction.type))
            if len(roots) != len(results):
                return sum(map(self._slow, results))
            total = 0
            for root, result in zip(roots, results, strict=True):
                total += self._new(result, _updated(body, root))
            return total
        if (new := _updates(instruction, within)) is not None:
            return self._new(next(arrays(instruction.type)), new)
        return sum(map(self._slow, arrays(instruction.type)))

    def _new(self, array: Array, numbers: int | None) -> int:
        """Bytes of so many numbers of an array in main memory; None = all."""
        count = array.size if numbers is None else min(numbers, array.size)
        return self._slow(array) * count // max(1, array.size)

    def _needed(
        self, instruction: Instruction, wanted: int, sizes: list[int], in_place: bool = False
    ) -> list[int]:
        """How many numbers of each operand it takes to make so many of the result.

        Args:
          instruction: what makes them.
          wanted: how many.
          sizes: of the operands.
          in_place: whether what it updates stays where it is.
        """
        opcode = instruction.opcode
        part = wanted / max(1, result_size(instruction))
        if opcode == "fusion":
            return self._needed_of_parameters(instruction.called("calls"))
        if opcode in ("slice", "dynamic-slice", "gather"):
            return [min(wanted, sizes[0]), *sizes[1:]]
        if opcode == "broadcast":
            return [min(wanted, sizes[0])]
        if opcode in ("dot", "convolution", "custom-call", "sort", "get-tuple-element"):
            return sizes
        updated = _updated_operands(instruction)
        if updated:
            kept = 0.0 if in_place else part
            return [math.ceil(kept * size) for size in sizes[:updated]] + sizes[updated:]
        return [math.ceil(part * size) for size in sizes]

    @functools.cache  # noqa: B019 (a reader lives as long as its module)
    def _needed_of_parameters(self, name: str) -> list[int]:
        """How many numbers of each parameter a fused computation needs for what it yields."""
        body = self._module.computations[name]
        sizes = {x.name: result_size(x) for x in body.instructions.values()}
        wanted = dict.fromkeys(body.instructions, 0)
        in_place = set()
        for root in _roots(body):
            wanted[root] = sizes[root]
            if _updated(body, root) is not None:
                in_place |= {x.name for x in _chain(body, root)}
        for instruction in reversed(body.instructions.values()):
            count, opcode = wanted[instruction.name], instruction.opcode
            if not count or opcode in ("parameter", "constant", "iota", "tuple"):
                continue
            if opcode == "bitcast" and instruction.name in in_place:
                continue  # hands on what stays where it is
            of = [sizes[x] for x in instruction.operands]
            needed = self._needed(instruction, count, of, instruction.name in in_place)
            for operand, more in zip(instruction.operands, needed, strict=True):
                wanted[operand] = min(sizes[operand], wanted[operand] + more)
        return [wanted[x.name] for x in body.parameters]


def result_size(instruction: Instruction) -> int:
    """How many numbers the first array of a result has."""
    return next((x.size for x in arrays(instruction.type)), 0)


def _result_of_start(opcode: str, kind: Type) -> Type:
    """What an asynchronous instruction yields, of the type of its start."""
    if isinstance(kind, Array) or opcode == "all-reduce" or len(kind) < 2:
        return kind
    return kind[0] if opcode == "copy" else kind[1]


def _roots(body: Computation) -> list[str]:
    """What a fused computation yields, array by array."""
    root = body.instructions[body.root]
    return list(root.operands) if root.opcode == "tuple" else [root.name]


def _updated_operands(instruction: Instruction) -> int:
    """How many of the first operands are updated; 0 where none is."""
    if instruction.opcode == "dynamic-update-slice":
        return 1
    return (len(instruction.operands) - 1) // 2 if instruction.opcode == "scatter" else 0


def _updates(instruction: Instruction, within: Computation) -> int | None:
    """How many numbers an update writes; None if it is no update."""
    if instruction.opcode == "dynamic-update-slice":
        return result_size(within.instructions[instruction.operands[1]])
    if instruction.opcode == "scatter":
        first = instruction.operands[-_updated_operands(instruction)]
        return result_size(within.instructions[first])
    return None


def _chain(body: Computation, root: str) -> Iterator[Instruction]:
    """From what a fusion yields to what it is made of, through updates and bitcasts."""
    instruction = body.instructions[root]
    yield instruction
    while instruction.opcode in ("bitcast", "dynamic-update-slice", "scatter"):
        instruction = body.instructions[instruction.operands[0]]
        yield instruction


def _updated(body: Computation, root: str) -> int | None:
    """How many numbers are new in a result that is updated in place; None if it is made anew."""
    chain = list(_chain(body, root))
    new = [count for x in chain if (count := _updates(x, body)) is not None]
    return sum(new) if new and chain[-1].opcode == "parameter" else None


def _group(instruction: Instruction, devices: int) -> int:
    """How many devices exchange with one another."""
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", instruction.attributes)
    if listed:
        return len(listed[1].split(","))
    shaped = re.search(r"replica_groups=\[(\d+),(\d+)\]", instruction.attributes)
    if shaped:
        return int(shaped[2])
    meshed = re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", instruction.attributes)
    if meshed:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", meshed[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", meshed[2]))
    return devices


def _ring_share(opcode: str, group: int) -> float:
    """What a device receives in a ring, of the bytes of its operand."""
    if opcode == "all-reduce":
        return 2 * (group - 1) / group
    if opcode == "all-gather":
        return group - 1
    if opcode in ("reduce-scatter", "all-to-all", "ragged-all-to-all"):
        return (group - 1) / group
    return 1.0


def describe(mover: Mover) -> dict[str, Any]:
    """A mover as JSON has it, its place shortened to what a reader looks for."""
    place = re.sub(r"jit\((\w+)\)", r"\1", mover.operation)
    return {
        "MB": mover.bytes / 1e6,
        "times": mover.times,
        "what": mover.opcode,
        "shape": mover.shape if len(mover.shape) <= 80 else mover.shape[:77] + "...",
        "where": place if len(place) <= 90 else "..." + place[-87:],
    }
