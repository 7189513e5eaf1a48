"""What a merge measures of task vectors, block by block."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Float64

from matu_jax.aggregation import direction_similarity
from matu_jax.models.tensors import TensorFiles, fingerprint

_LANE = 128  # terms that are summed in float32, before float64 takes over


class Summary(NamedTuple):
    """What a merge found out about the models.

    Attributes:
      similarity: float64 `[models, models]`, direction similarity (eq. 7) of the task vectors, over
        the entries that are not zero in both; 1/2 where there is none.
      base_fingerprint: `fingerprint` of the base.
      models: per model: `norm`, Euclidean, of its task vector; `zero`, whether that is 0
        everywhere; and, by method, `scale` and `cosine` (between its task vector and the one
        rebuilt), or `threshold` and `kept` (what trimming left of its entries).
    """

    similarity: np.ndarray
    base_fingerprint: str
    models: dict[str, dict[str, float | int | bool]]


def lanes(x: Float[Array, "models size"]) -> Float[Array, "models lanes"]:
    """Sums of `_LANE` neighbours: `[models, block]` to `[models, block / _LANE]`."""
    return x.reshape(x.shape[0], -1, _LANE).sum(axis=-1)


def relative(
    x: Float[Array, "models size"],
) -> tuple[Float[Array, "models"], Float[Array, "models size"]]:
    """Rows' largest magnitudes `[models]`, and rows relative to them: no sum of them overflows."""
    unit = jnp.abs(x).max(axis=1)
    return unit, x / jnp.where(unit > 0, unit, 1.0)[:, None]


def measure(
    vectors: Float[Array, "models size"],
) -> tuple[dict[str, Float[Array, "models ..."]], Float[Array, "models size"]]:
    """What `Totals` wants of task vectors `[models, block]`, and these relative to their units."""
    unit, own = relative(vectors.astype(jnp.float32))
    zero = (vectors == 0).astype(jnp.float32)
    both = jnp.matmul(zero, zero.T, precision="highest")  # exact, up to 2**24
    return {
        "touched": vectors.shape[1] - both,
        # (2 A - 1) * block is the sum of the products of signs: exact, as blocks are powers of 2.
        "signs": (2 * direction_similarity({"block": vectors}) - 1) * vectors.shape[1],
        "finite": jnp.isfinite(vectors).all(axis=1),  # a maximum may pass over NaN
        "unit": unit,
        "absolute": lanes(jnp.abs(own)),
        "square": lanes(jnp.square(own)),
    }, own


class Totals:
    """Sums over all blocks, in float64."""

    def __init__(self, base: TensorFiles, models: Mapping[str, Any], parameters: int):
        self.names: list[str] = list(models)
        self.parameters: int = parameters
        self.fingerprint: str = fingerprint(base)
        self.signs: np.ndarray = np.zeros((len(models), len(models)))
        self.touched: np.ndarray = np.zeros((len(models), len(models)))
        self.sums: dict[str, np.ndarray] = {}

    def add(self, block: dict[str, Any]) -> None:
        """Adds what one block measured."""
        found = {name: np.asarray(value, np.float64) for name, value in block.items()}
        self.signs += found["signs"]
        self.touched += found["touched"]
        unit, folded = found["unit"], found.get("folded_unit", 0.0)
        for name, factor in (
            ("absolute", unit),
            ("square", unit**2),
            ("folded_absolute", folded),
            ("folded_square", folded**2),
            ("product", unit * folded),
        ):
            if name in found:
                self.sums[name] = self.sums.get(name, 0.0) + factor * found[name].sum(axis=1)

    def scales(self) -> Float32[np.ndarray, "models"]:
        """Lambda of eq. 4, float32 `[models]`."""
        kept = self.sums["folded_absolute"]
        ratio = np.divide(self.sums["absolute"], kept, out=np.zeros_like(kept), where=kept > 0)
        return np.minimum(ratio, np.finfo(np.float32).max).astype(np.float32)

    def cosines(self) -> Float64[np.ndarray, "models"]:
        """Between each task vector and the rebuilt one, float64 `[models]`; 0 where one is 0."""
        size = np.sqrt(self.sums["square"]) * np.sqrt(self.sums["folded_square"])
        return np.divide(self.sums["product"], size, out=np.zeros_like(size), where=size > 0)

    def summary(self, more: Callable[[int], dict[str, Any]]) -> Summary:
        """The summary; `more` gives what the method says of a model by its position."""
        norms = np.sqrt(self.sums["square"])
        return Summary(
            (1 + self.signs / np.maximum(self.touched, 1)) / 2,
            self.fingerprint,
            {
                name: {"norm": float(norms[s]), "zero": bool(norms[s] == 0)} | more(s)
                for s, name in enumerate(self.names)
            },
        )
