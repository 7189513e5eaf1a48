"""Which tensors are merged, which are copied, and every way in which models do not fit."""

import shlex
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matu_jax.models.tensors import FLOATING, TensorFileError, TensorFiles, some_of


class Alignment(NamedTuple):
    """What happens to each tensor.

    Attributes:
      merged: floating tensors that base and models all have, in the order of the base's file.
      equal: others, such as position ids, that are equal in all and copied.
      from_base: tensors of the base outside the chosen prefixes: copied, whatever models hold.
      left_out: by model, tensors outside the prefixes that only that model has.
      parameters: number of entries of the merged tensors.
    """

    merged: tuple[str, ...]
    equal: tuple[str, ...]
    from_base: tuple[str, ...]
    left_out: dict[str, tuple[str, ...]]
    parameters: int


def align(
    base: TensorFiles, models: Mapping[str, TensorFiles], only: Sequence[str] = ()
) -> Alignment:
    """Compares models by their headers, and by value where a tensor is not floating.

    Args:
      base: the model that the others were fine-tuned from.
      models: fine-tuned models by name.
      only: prefixes of tensor names; tensors that begin with none of them come from the base, and
        so do those that begin with a prefix after a "!". Without any that is not so: all others.

    Returns:
      What happens to each tensor.

    Raises:
      TensorFileError: lists per model the tensors that are missing, unknown or of another dtype or
        shape, or values that are not floating and differ; or names a prefix without tensors.
    """
    out = tuple(prefix.removeprefix("!") for prefix in only if prefix.startswith("!"))
    inside = tuple(prefix for prefix in only if not prefix.startswith("!"))
    of_models = {name for files in models.values() for name in files.tensors}
    for prefix in (*inside, *out):
        names = base.tensors.keys() | (of_models if prefix in out else set())
        if not any(name.startswith(prefix) for name in names):
            raise TensorFileError(
                f"--only: no tensor of the base {base.path} begins with {prefix!r}. Its names "
                f"begin with: {some_of({_top(name) for name in base.tensors})}."
            )

    def chosen(name: str) -> bool:
        return (not inside or name.startswith(inside)) and not name.startswith(out)

    wanted = {name: tensor for name, tensor in base.tensors.items() if chosen(name)}
    problems, bad = [], set()
    for model, files in models.items():
        found = {name: tensor for name, tensor in files.tensors.items() if chosen(name)}
        missing, unknown = wanted.keys() - found.keys(), found.keys() - wanted.keys()
        differing = {
            name: f"{name} (found {found[name]}, expected {wanted[name]})"
            for name in wanted.keys() & found.keys()
            if found[name] != wanted[name]
        }
        bad |= missing | unknown | differing.keys()
        for what, names in (
            ("missing", missing),
            ("not in the base", unknown),
            ("of another dtype or shape", differing.values()),
        ):
            if names:
                problems.append(f"  {model} ({files.path}): {len(names)} {what}: {some_of(names)}")
    if problems:
        raise TensorFileError(
            f"the tensors of these models differ from those of the base {base.path}:\n"
            + "\n".join(problems)
            + f"\n{_hint(set(wanted), bad)}"
        )
    merged = tuple(name for name, tensor in wanted.items() if tensor.dtype in FLOATING)
    equal = tuple(name for name, tensor in wanted.items() if tensor.dtype not in FLOATING)
    _check_equal(base, models, equal)
    parameters = sum(wanted[name].size for name in merged)
    if not parameters:
        raise TensorFileError(
            f"{base.path}: found no parameters to merge; expected {', '.join(FLOATING)} tensors, "
            f"found {some_of({str(tensor) for tensor in wanted.values()})}."
        )
    return Alignment(
        merged,
        equal,
        tuple(name for name in base.tensors if not chosen(name)),
        {
            model: tuple(name for name in files.tensors if name not in base.tensors)
            for model, files in models.items()
        },
        parameters,
    )


def _hint(wanted: set[str], bad: set[str]) -> str:
    """What to do where tensors do not fit; `bad` may hold others than the `wanted` of the base."""
    good = {_top(name) for name in wanted} - {_top(name) for name in bad}
    if good:
        return f"To merge what fits in all: --only {_words(sorted(good)[:5])}"
    if len(bad) <= 5 and len(bad) < len(wanted | bad):
        return f"To merge what fits in all: --only {_words(['!' + name for name in bad])}"
    return "Give checkpoints of one architecture and dtype (cast them first)."


def _words(prefixes: Sequence[str]) -> str:
    """Prefixes as the command line takes them."""
    return shlex.quote(",".join(sorted(prefixes)))


def _top(name: str) -> str:
    """The part of a name up to its first dot, and the dot."""
    head, dot, _ = name.partition(".")
    return head + dot


def _check_equal(
    base: TensorFiles, models: Mapping[str, TensorFiles], names: Sequence[str]
) -> None:
    problems = []
    for name in names:
        for model, files in models.items():
            pairs = zip(base.pieces(name), files.pieces(name), strict=True)
            if any(ours != theirs for ours, theirs in pairs):
                problems.append(f"  {name} {base.tensors[name]}: {model} ({files.path})")
    if problems:
        raise TensorFileError(
            f"only {', '.join(FLOATING)} tensors are merged; others must equal the base's "
            f"({base.path}), and these differ:\n"
            + "\n".join(problems[:20])
            + ("\n  ..." if len(problems) > 20 else "")
            + "\nCast floating ones first, or leave such tensors to the base with --only."
        )
