"""How often a loop of an HLO module runs."""

import math
import re
from collections.abc import Callable

from compiled.hlo import Computation, Instruction, Module


def trips(module: Module, loop: Instruction, within: Computation) -> int | None:
    """How often a loop runs, as XLA notes it, or as its counter says; None if nothing says it.

    A counter is a part of what the loop carries that begins at a constant, has a constant added to
    it in every execution, and is compared with a constant.
    """
    noted = re.search(r'"known_trip_count":\s*\{"n":\s*"(\d+)"', loop.attributes)
    if noted:
        return int(noted[1])
    condition = module.computations[loop.called("condition")]
    compare, operand_of = _unfused(module, condition, condition.root)
    direction = re.search(r"direction=(\w+)", compare.attributes)
    if compare.opcode != "compare" or not direction:
        return None
    counter, limit = _position(operand_of(0)), _whole(operand_of(1))
    if counter is None or limit is None:
        return None
    start = _start(within, loop, counter)
    step = _step(module, module.computations[loop.called("body")], counter)
    if start is None or not step:
        return None
    limit += {"LT": 0, "LE": 1, "GT": 0, "GE": -1}.get(direction[1], math.nan)
    if (direction[1] in ("LT", "LE")) != (step > 0) or math.isnan(limit):
        return None
    return max(0, math.ceil((limit - start) / step))


def _unfused(
    module: Module, within: Computation, name: str
) -> tuple[Instruction, Callable[[int], Instruction]]:
    """An instruction, or the last one of a fusion, and what finds its operands by their number."""
    found = _source(within, name)
    if found.opcode != "fusion":
        return found, lambda number: _source(within, found.operands[number])
    body = module.computations[found.called("calls")]
    last = _source(body, body.root)

    def operand_of(number: int) -> Instruction:
        inner = _source(body, last.operands[number])
        if inner.opcode != "parameter":
            return inner
        return _source(within, found.operands[int(inner.literal)])

    return last, operand_of


def _source(within: Computation, name: str) -> Instruction:
    """What an instruction is a copy of."""
    found = within.instructions[name]
    while found.opcode in ("copy", "bitcast"):
        found = within.instructions[found.operands[0]]
    return found


def _position(instruction: Instruction) -> int | None:
    """Which part of the loop's tuple an instruction takes."""
    found = re.search(r"\bindex=(\d+)", instruction.attributes)
    return int(found[1]) if instruction.opcode == "get-tuple-element" and found else None


def _whole(instruction: Instruction) -> int | None:
    """The value of a constant whole number."""
    found = re.fullmatch(r"-?\d+", instruction.literal)
    return int(found[0]) if instruction.opcode == "constant" and found else None


def _start(within: Computation, loop: Instruction, counter: int) -> int | None:
    carried = _source(within, loop.operands[0])
    if carried.opcode != "tuple":
        return None
    return _whole(_source(within, carried.operands[counter]))


def _step(module: Module, body: Computation, counter: int) -> int | None:
    root = body.instructions[body.root]
    if root.opcode != "tuple":
        return None
    new, operand_of = _unfused(module, body, root.operands[counter])
    if new.opcode not in ("add", "subtract"):
        return None
    old, step = operand_of(0), operand_of(1)
    if new.opcode == "add" and _position(old) is None:
        old, step = step, old
    size = _whole(step)
    if _position(old) != counter or size is None:
        return None
    return size if new.opcode == "add" else -size
