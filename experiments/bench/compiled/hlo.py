"""An optimised HLO module, read from the text that XLA prints."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple, TypeAlias


@dataclasses.dataclass(frozen=True)
class Array:
    """The type of an array in HLO.

    Attributes:
      dtype: such as "f32", "bf16", "pred".
      dims: its shape.
      tile: of a TPU, of the dimensions that vary fastest; () where there is none.
      order: dimensions from the one that varies fastest.
      space: of memory; 0 is the device's main memory.
    """

    dtype: str
    dims: tuple[int, ...]
    tile: tuple[int, ...] = ()
    order: tuple[int, ...] = ()
    space: int = 0

    @property
    def size(self) -> int:
        """How many numbers there are."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """What it takes in memory, with tiles that are filled up."""
        found = re.match(r"(?:pred|(?:bf|f|s|u|c)(\d+))", self.dtype)
        if not found:
            return 0  # tokens and the like
        filled = list(self.dims)
        for dim, tile in zip(self.order, reversed(self.tile), strict=False):
            filled[dim] = -(-filled[dim] // tile) * tile
        return -(-math.prod(filled) * int(found[1] or 8) // 8)


Type: TypeAlias = "Array | tuple[Type, ...]"


class Instruction(NamedTuple):
    """One line of a computation.

    Attributes:
      name: of its result.
      type: of its result.
      opcode: such as "fusion".
      operands: names of others of the computation.
      literal: what stands in place of operands in a constant or a parameter.
      attributes: the rest of the line.
    """

    name: str
    type: Type
    opcode: str
    operands: tuple[str, ...]
    literal: str
    attributes: str

    def called(self, attribute: str) -> str:
        """The computation that an attribute names."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
        if not found:
            raise ValueError(f"HLO: {self.opcode} {self.name} has no {attribute}.")
        return found[1]

    @property
    def branches(self) -> list[str]:
        """The computations that a conditional may call."""
        listed = re.search(r"branch_computations=\{([^}]*)\}", self.attributes)
        if listed:
            return re.findall(r"%?([\w.\-]+)", listed[1])
        return [self.called(f"{x}_computation") for x in ("true", "false")]

    @property
    def target(self) -> str:
        """Of a custom call."""
        found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def operation(self) -> str:
        """Where the program asked for it."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""


class Computation(NamedTuple):
    """Instructions by name, operands before what takes them, and what it yields."""

    instructions: dict[str, Instruction]
    root: str

    @property
    def parameters(self) -> list[Instruction]:
        found = [x for x in self.instructions.values() if x.opcode == "parameter"]
        return sorted(found, key=lambda x: int(x.literal))


class Module(NamedTuple):
    """A module's computations by name, the one that is called, and how many devices run it."""

    computations: dict[str, Computation]
    entry: str
    devices: int


def parse(text: str) -> Module:
    """Reads a module as XLA prints it.

    Raises:
      ValueError: if there is no computation that is called first.
    """
    computations: dict[str, Computation] = {}
    entry = name = root = ""
    instructions: dict[str, Instruction] = {}
    for line in text.splitlines():
        if line[:1] not in ("", " ", "}"):
            head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
            if head:
                name, root, instructions = head[2], "", {}
                entry = name if head[1] else entry
        elif line.startswith("}") and name:
            computations[name] = Computation(instructions, root)
            name = ""
        elif name and (found := re.match(r"\s+(ROOT )?%?([\w.\-]+) = (.*)$", line)):
            instructions[found[2]] = _instruction(found[2], found[3])
            root = found[2] if found[1] else root
    if not entry:
        raise ValueError("HLO: found no line that begins with ENTRY; expected a module as text.")
    header = text.split("\n", 1)[0]
    counts = re.findall(r"(?:num_partitions|replica_count)=(\d+)", header)
    return Module(computations, entry, math.prod(map(int, counts)))


def _instruction(name: str, text: str) -> Instruction:
    kind, rest = _type(re.sub(r"/\*.*?\*/", "", text))
    opcode, rest = rest.strip().split("(", 1)
    end = _closing(rest)
    inside = rest[:end]
    operands = (
        () if opcode in ("constant", "parameter") else tuple(re.findall(r"%([\w.\-]+)", inside))
    )
    return Instruction(name, kind, opcode, operands, inside, rest[end + 1 :])


def _closing(text: str) -> int:
    """Where the bracket closes that was opened before the text."""
    depth, quoted = 1, False
    for position, letter in enumerate(text):
        if letter == '"':
            quoted = not quoted
        elif not quoted and letter in "([{":
            depth += 1
        elif not quoted and letter in ")]}":
            depth -= 1
            if depth == 0:
                return position
    raise ValueError(f"HLO: brackets that do not close: {text[:80]}")


_ARRAY = re.compile(r"([a-z]\w*)\[([^\]]*)\](?:\{([^}]*)\})?")


def _type(text: str) -> tuple[Type, str]:
    """A type at the beginning of a text, and what is behind it."""
    text = text.lstrip()
    if text.startswith("("):
        end = _closing(text[1:]) + 1
        parts, inside = [], text[1:end]
        while inside.strip():
            part, inside = _type(inside)
            parts.append(part)
            inside = inside.lstrip().removeprefix(",")
        return tuple(parts), text[end + 1 :]
    found = _ARRAY.match(text)
    if not found:
        raise ValueError(f"HLO: no type: {text[:80]}")
    return _array(*found.groups()), text[found.end() :]


@functools.cache
def _array(dtype: str, dims: str, layout: str | None) -> Array:
    sizes = tuple(int(x.strip("<= ")) for x in dims.split(",") if x)
    order, _, rest = (layout or "").partition(":")
    tile, space = re.match(r"T\(([\d,]+)\)", rest), re.search(r"S\((\d+)\)", rest)
    return Array(
        dtype,
        sizes,
        tuple(int(x) for x in tile[1].split(",")) if tile else (),
        tuple(int(x) for x in order.split(",") if x),
        int(space[1]) if space else 0,
    )


def arrays(kind: Type) -> Iterator[Array]:
    """All arrays of a type."""
    if isinstance(kind, Array):
        yield kind
    else:
        for part in kind:
            yield from arrays(part)


def written(kind: Type) -> str:
    """A type as HLO writes it, without layouts."""
    if isinstance(kind, Array):
        return f"{kind.dtype}[{','.join(map(str, kind.dims))}]"
    return f"({', '.join(map(written, kind))})"
