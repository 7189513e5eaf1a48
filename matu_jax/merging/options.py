"""What may be asked of the merging program, and which options belong together."""

import argparse
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from matu_jax.aggregation.choices import Magnitude
from matu_jax.errors import UserError
from matu_jax.merging.methods import Method, given_name
from matu_jax.models.tensors import WHOLE

_ALLOWED: dict[Method, tuple[str, ...]] = {
    "unify": ("magnitude",),
    "ties": ("density", "scale"),
    "arithmetic": ("scale",),
}


@dataclasses.dataclass(frozen=True)
class Merge:
    """Models to merge.

    Attributes:
      base: the model that the others were fine-tuned from.
      models: fine-tuned models by name.
      out: the folder to write to.
      method: one of `merging.PASSES`.
      only: beginnings of the names of tensors to merge, see `align`; None = all.
      magnitude: of "unify".
      density: of "ties", the fraction of entries kept.
      scale: of "ties" and "arithmetic", the factor of the merged vector.
    """

    base: Path
    models: dict[str, Path]
    out: Path
    method: Method
    only: tuple[str, ...] | None
    magnitude: Magnitude | None
    density: float | None
    scale: float | None


@dataclasses.dataclass(frozen=True)
class Rebuild:
    """One model to rebuild.

    Attributes:
      base: the model that all were fine-tuned from.
      unified: what `--method unify` wrote, or its folder.
      task: the name of the model.
      out: the folder to write to.
    """

    base: Path
    unified: Path
    task: str
    out: Path


def settled(given: argparse.Namespace) -> Merge | Rebuild:
    """Refuses options that contradict or do not belong to each other; fills in defaults.

    Args:
      given: by option; None where it was not given.

    Raises:
      UserError: with what is wrong.
    """
    if (given.models is None) == (given.unified is None):
        raise UserError("give either --models to merge, or --unified to rebuild one. See --help.")
    if given.unified is not None:
        if given.task is None:
            raise UserError("--task is missing: the name of the model to rebuild.")
        _refuse_others(given, "--unified", ("task",))
        return Rebuild(given.base, given.unified, given.task, given.out)
    method = cast(Method, given.method or "unify")
    allowed = _ALLOWED[method]
    _refuse_others(given, f"--method {method}", ("method", "names", "only", *allowed))
    defaults = {"magnitude": "max", "density": 0.2, "scale": 1.0 if method == "ties" else 0.3}
    chosen = {
        option: default if getattr(given, option) is None else getattr(given, option)
        for option, default in defaults.items()
        if option in allowed
    }
    density, scale = chosen.get("density"), chosen.get("scale")
    if density is not None and not 0 < density <= 1:
        raise UserError(f"--density: found {density}, expected above 0 and at most 1.")
    if scale is not None and not math.isfinite(scale):
        raise UserError(f"--scale: found {scale}, expected a finite number.")
    only = None if given.only is None else tuple(given.only.split(","))
    if not all(prefix.removeprefix("!") for prefix in only or ()):
        raise UserError("--only: found an empty prefix, expected PREFIX[,PREFIX].")
    models = name_models(given.models, given.names)
    return Merge(
        given.base, models, given.out, method, only, chosen.get("magnitude"), density, scale
    )


def _refuse_others(given: argparse.Namespace, owner: str, allowed: Sequence[str]) -> None:
    for option in ("method", "names", "only", "magnitude", "density", "scale", "task"):
        if option not in allowed and getattr(given, option) is not None:
            raise UserError(f"--{option} has no effect with {owner}; leave it out.")


def name_models(paths: Sequence[Path], names: Sequence[str] | None) -> dict[str, Path]:
    """Names models by `names`, or their folders or files.

    Raises:
      UserError: if names are not as many as paths, or two are the same.
    """
    if names is not None and len(names) != len(paths):
        raise UserError(f"--names: found {len(names)}, expected {len(paths)}, one per model.")
    if names is not None and not all(names):
        raise UserError("--names: found an empty name, expected one or more letters.")

    def default(path: Path) -> str:
        path = path.absolute()
        name = given_name(path.parent if path.name == WHOLE else path)
        return name.removesuffix(".safetensors")

    named: dict[str, Path] = {}
    for path, name in zip(paths, names or map(default, paths), strict=True):
        if name in named:
            raise UserError(
                f"the models {named[name]} and {path} are both called {name!r}. Give each its own "
                "name: --names NAME1 NAME2 ..."
            )
        named[name] = path
    return named
