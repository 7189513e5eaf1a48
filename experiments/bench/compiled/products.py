"""Multiplications and additions of matrix products in HLO."""

import functools
import math
import re

from compiled.hlo import Array, Instruction, Type, arrays


def product_operations(instruction: Instruction, given: list[Type]) -> dict[str, int]:
    """Multiplications and additions of a matrix product or a convolution, by dtype; or nothing.

    Args:
      instruction: of a computation that runs, or of a fused one.
      given: types of what it takes.
    """
    if len(given) < 2 or not (isinstance(given[0], Array) and isinstance(given[1], Array)):
        return {}
    left, right, result = given[0], given[1], next(arrays(instruction.type))
    attributes, target, count = instruction.attributes, instruction.target, 0
    if instruction.opcode == "dot":
        summed = _contracted(left, attributes, r"lhs_contracting_dims=\{([\d,]*)")
        count = 2 * result.size * summed
    elif instruction.opcode == "convolution" or target.startswith("__cudnn$conv"):
        count = _convolution_operations(attributes, left, right, result)
    elif target.startswith("__cublas"):
        summed = _contracted(left, attributes, r'"lhs_contracting_dimensions":\s*\[([^\]]*)')
        count = 2 * result.size * summed
    elif target.startswith("__cudnn$fmha"):
        # Two products forward and five backward, each of scores times the width of a head.
        found = re.search(
            r'"intermediate_tensor_shape":\s*\{.*?"dimensions":\s*\[([^\]]*)', attributes
        )
        scores = [int(x) for x in re.findall(r"\d+", found[1])] if found else []
        products = 5 if "Backward" in target else 2
        count = 2 * products * math.prod(scores) * left.size // math.prod(scores[:3])
    return {left.dtype: count} if count else {}


def _contracted(array: Array, attributes: str, pattern: str) -> int:
    found = re.search(pattern, attributes)
    dims = re.findall(r"\d+", found[1]) if found else []
    return math.prod(array.dims[int(x)] for x in dims)


def _convolution_operations(attributes: str, image: Array, kernel: Array, out: Array) -> int:
    """As XLA counts them: padding and holes multiply nothing."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
    if not labels:
        return 0
    window = dict(re.findall(r"(\w+)=([\w\-]+)", _between(attributes, "window={", "}")))
    features = kernel.dims[labels[2].index("i")] * out.dims[labels[3].index("f")]
    total = 2 * features * out.dims[labels[3].index("b")]
    spatial = sorted(x for x in labels[1] if x.isdigit())
    for number, dim in enumerate(spatial):

        def of(name: str, default: str, number: int = number) -> str:
            parts = window.get(name, "").split("x")
            return parts[number] if number < len(parts) and parts[number] else default

        total *= _positions(
            image.dims[labels[1].index(dim)],
            kernel.dims[labels[2].index(dim)],
            out.dims[labels[3].index(dim)],
            int(of("stride", "1")),
            int(of("pad", "0_0").split("_")[0]),
            int(of("lhs_dilate", "1")),
            int(of("rhs_dilate", "1")),
        )
    groups = re.search(r"batch_group_count=(\d+)", attributes)
    return total // (int(groups[1]) if groups else 1)


def _between(text: str, before: str, after: str) -> str:
    return text.split(before, 1)[1].split(after, 1)[0] if before in text else ""


@functools.cache
def _positions(
    image: int, kernel: int, out: int, stride: int, pad: int, dilated: int, spread: int
) -> int:
    """How often a window along one axis meets a number of the image."""
    found = 0
    for place in range(out):
        for tap in range(kernel):
            position = place * stride - pad + tap * spread
            if position % dilated == 0 and 0 <= position // dilated < image:
                found += 1
    return found
