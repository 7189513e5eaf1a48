"""Checks that a model of one's own does what `matu_jax.models.contract` asks of it."""

import collections
import sysconfig
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from matu_jax.data import Task, example_shapes
from matu_jax.models.contract import ContractError, Metric, Model
from matu_jax.trees import PyTree, leaf_items

_EXAMPLES = 13  # of the batch that loss and outputs are tried with; few other axes are as long
_LIBRARIES = {
    Path(__file__).parents[1],
    *(Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")),
}


def check_model(model: Model, tasks: Sequence[Task]) -> None:
    """Checks a model's fields, and tries its functions on shapes of the first task's examples.

    Nothing is computed but whether what trains is finite.

    Args:
      model: of one's own.
      tasks: of one form.

    Raises:
      ContractError: for what is not as the contract asks, and for what loss, outputs or a metric's
        sums raise.
    """
    if not isinstance(model, Model):
        raise ContractError(
            f"model: found {_kind(model)}, expected a matu_jax.models.Model, such as of "
            "matu_jax.models.modules.of_nnx."
        )
    _check_base(model)
    _check_metrics(model.metrics)
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((_EXAMPLES, *x.shape), x.dtype),
        example_shapes(tasks[0].train),
    )
    task, key = jnp.int32(0), jax.random.key(0) if model.stochastic else None

    def loss(base, frozen, batch):
        check_loss(model.loss(base, frozen, batch, task, key))

    def sums(base, frozen, batch):
        outputs = model.outputs(base, frozen, batch, task)
        if not jax.tree.leaves(outputs):
            raise ContractError("model.outputs: returned no array, expected what is measured.")
        for path, leaf in leaf_items(outputs):
            if jnp.shape(leaf)[:1] != (_EXAMPLES,):
                raise ContractError(
                    f"model.outputs: {path}: found {list(jnp.shape(leaf))}, expected [{_EXAMPLES}, "
                    "...] of as many examples: what the batch has in common is no output."
                )
        for name, metric in model.metrics.items():
            where = f"model.metrics[{name!r}].sums"
            found = _tried(where, lambda metric=metric: metric.sums(outputs, batch))
            check_sums(found, _EXAMPLES, where)

    for where, function in (("model.loss", loss), ("model.outputs", sums)):
        _tried(where, jax.eval_shape, function, model.base, model.frozen, batch)


def _check_base(model: Model) -> None:
    leaves = leaf_items(model.base)
    if not leaves:
        raise ContractError("model.base: found no array, expected what trains: leaves of floats.")
    for path, count in collections.Counter(path for path, _ in leaves).items():
        if count > 1:
            raise ContractError(
                f"model.base: two leaves have the path {path}; give one of them another name, as "
                "files hold leaves by path."
            )
    for path, leaf in leaves:
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            raise ContractError(
                f"model.base: {path}: found {dtype or _kind(leaf)}, expected an array of floats; "
                "what does not train belongs into model.frozen."
            )
        if not np.isfinite(np.asarray(leaf)).all():
            raise ContractError(f"model.base: {path}: holds a number that is not finite.")
    if not model.trains_heads:
        return
    parts = sorted(model.base) if isinstance(model.base, Mapping) else [_kind(model.base)]
    if parts != ["head", "shared"]:
        raise ContractError(
            f"model.base: found {', '.join(map(str, parts))}; with trains_heads expected "
            '{"shared": ..., "head": ...}, of which the head is the task\'s own.'
        )


def _check_metrics(metrics: Mapping[str, Metric]) -> None:
    if not isinstance(metrics, Mapping) or not metrics:
        found = _kind(metrics) if metrics else "none"
        raise ContractError(f"model.metrics: found {found}, expected at least one by its name.")
    for name, metric in metrics.items():
        if not isinstance(name, str) or not isinstance(metric, Metric):
            raise ContractError(
                f"model.metrics[{name!r}]: found {_kind(metric)}, expected a "
                "matu_jax.models.Metric under a name, such as one of matu_jax.models.metrics."
            )
        if not name.strip() or not name.isprintable() or len(name) > 60:
            raise ContractError(
                f"model.metrics: found the name {name!r}, expected 1 to 60 printable characters."
            )


def check_loss(loss: Any) -> jax.Array:
    """A model's loss, checked to be one number.

    Raises:
      ContractError: if it is not.
    """
    if not hasattr(loss, "dtype") and not isinstance(loss, float):
        found = _kind(loss)
    elif jnp.shape(loss) or not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
        found = f"{jnp.result_type(loss)}{list(jnp.shape(loss))}"
    else:
        return jnp.asarray(loss)
    raise ContractError(
        f"model.loss: returned {found}, expected one float, such as the mean over the batch."
    )


def check_sums(sums: PyTree, examples: int, where: str) -> None:
    """Checks that a metric says of each example what it adds.

    Args:
      sums: of a batch.
      examples: how many there are in the batch.
      where: what to call the sums in the error.

    Raises:
      ContractError: names the leaf that has no axis of examples, or holds no numbers.
    """
    leaves = leaf_items(sums)
    if not leaves:
        raise ContractError(f"{where}: returned no array, expected what each example adds.")
    for path, leaf in leaves:
        dtype = getattr(leaf, "dtype", None)
        number = dtype is not None and (
            jnp.issubdtype(dtype, jnp.bool_) or jnp.issubdtype(dtype, jnp.number)
        )
        if not number or jnp.shape(leaf)[:1] != (examples,):
            found = f"{dtype}{list(jnp.shape(leaf))}" if number else _kind(leaf)
            raise ContractError(
                f"{where}: {path}: found {found}, expected [{examples}, ...]: what each of the "
                "batch's examples adds, before any sum or mean over them, so that padding can be "
                "left out."
            )


def told(where: str, error: Exception) -> str:
    """What to say of an error in a function of the user's: which one, what, and in which line.

    Args:
      where: the function's name for people.
      error: what it raised.
    """
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not _LIBRARIES & {*Path(f.filename).parents}]
    line = f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""
    text = str(error).strip().split("\n")[0]
    return f"{where}: {type(error).__name__}: {text}{line}"


def _tried(where: str, function: Callable[..., Any], *given: Any) -> Any:
    """What a function of the user's returns.

    Raises:
      ContractError: for whatever it raises.
    """
    try:
        return function(*given)
    except ContractError:
        raise
    except Exception as error:
        raise ContractError(f"{told(where, error)}.") from error


def _kind(found: Any) -> str:
    return f"{type(found).__name__}"
