"""The contract of a federated algorithm."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
from jax.sharding import Mesh

from matu_jax.aggregation import Slots
from matu_jax.aggregation.choices import NO_DEFENCE, DefenceConfig
from matu_jax.messages.traffic import Traffic
from matu_jax.trees import PyTree, check_dtypes, check_like


class LocalRule(NamedTuple):
    """How a slot trains on its client.

    Attributes:
      penalty: `(vector, download) -> scalar` added to the loss, both one slot's task vectors,
        leaves `[...]`, trained heads among them; None for no penalty.
      trains: `(vector, progress) -> factors`, a tree like the vector whose leaves broadcast against
        its leaves: 1 where a parameter trains in this step, 0 where it does not. Progress is the
        part of the round's steps that is done, a float32 scalar in [0, 1). None: everything trains.
      head_trains: `progress -> factor`, the same for a trained head; None: it always trains.
      linearised: whether the model is replaced by its first-order expansion around the base, in
        training and in evaluation.
    """

    penalty: Callable[[PyTree, PyTree], jax.Array] | None = None
    trains: Callable[[PyTree, jax.Array], PyTree] | None = None
    head_trains: Callable[[jax.Array], jax.Array] | None = None
    linearised: bool = False


Axis = Literal["clients", "slots", "whole"]
"""What the first axis of an array counts: clients, slots, or neither of them."""


class Sums(NamedTuple):
    """A server's round as sums, to which uploads are added and of which none is kept.

    Attributes:
      start: `(state, slots) -> sums`, nothing added yet. Slots weigh what is expected of them: 0
        where nothing will be sent.
      add: `(sums, uploads, group) -> sums`; uploads are what `upload` makes of a group, some
        clients with all of their slots that train: `Slots` that number these clients anew. Their
        weights are 0 where training failed.
      end: `(state, sums, slots) -> (state, metrics)`, as `aggregate`, whose results it reaches but
        for rounding, whatever the groups were. Slots weigh what was sent.
    """

    start: Callable[[Any, Slots], Any]
    add: Callable[[Any, Any, Slots], Any]
    end: Callable[[Any, Any, Slots], tuple[Any, dict[str, jax.Array]]]


class Groups(NamedTuple):
    """How a round may go from one group of clients to the next, without all of them at once.

    `download` then gets the rows of the state that are some slots', and these slots, whose clients
    are numbered anew; `upload` gets the vectors of some clients, with all of their slots. What they
    return must be the same, row by row, as for all slots at once.

    Attributes:
      state: what the first axis of each array of the state counts; a prefix of its tree.
      uploads: the same of uploads, which are kept once, as they are sent; "clients" or "slots".
      sums: for a server that needs no upload twice; None where `aggregate` is given all of them.
    """

    state: PyTree
    uploads: PyTree
    sums: Sums | None = None


def by_axis(axes: PyTree, tree: PyTree, **functions: Callable[[Any], Any]) -> PyTree:
    """Applies to each array of a tree the function that is named like its first axis.

    Args:
      axes: a prefix of the tree; its leaves are of `Axis`.
      tree: the arrays.
      functions: `array -> result` by axis; arrays of other axes stay as they are.

    Raises:
      ValueError: for an axis of another name.
    """

    def apply(axis: str, part: PyTree) -> PyTree:
        if axis not in get_args(Axis):
            raise ValueError(
                f"algorithm.groups: found {axis!r}, expected one of {', '.join(get_args(Axis))}."
            )
        return jax.tree.map(functions.get(axis, lambda x: x), part)

    return jax.tree.map(apply, axes, tree)


class _Parts(NamedTuple):
    """The fields of an `Algorithm`, where they are described."""

    init: Callable[[PyTree, Slots], Any]
    download: Callable[[Any, Slots], PyTree]
    upload: Callable[[PyTree, Slots], Any]
    aggregate: Callable[[Any, Any, Slots], tuple[Any, dict[str, jax.Array]]]
    traffic: Traffic
    local: LocalRule = LocalRule()
    heads: DefenceConfig | None = NO_DEFENCE
    evaluated: Callable[[Any, Slots], PyTree] | None = None
    sends_change: bool = False
    sharded_over: Callable[[Mesh], "Algorithm"] | None = None
    groups: Groups | None = None


class Algorithm(_Parts):
    """A federated algorithm: pure functions, state first in and out; all of them jit.

    Task vectors are stacked over slots (leaves `[slots, ...]`); absent slots have weight 0, and
    what their rows hold must change nothing.

    Attributes:
      init: `(base, slots) -> state`; base leaves `[...]`.
      download: `(state, slots) -> vectors [slots, ...]`, where each slot starts its round, and what
        is evaluated unless `evaluated` says otherwise.
      upload: `(vectors [slots, ...], slots) -> uploads`, the client's side.
      aggregate: `(state, uploads, slots) -> (state, metrics)`, the server's side. Metrics is a dict
        of arrays; "similarity" `[tasks, tasks]` where the algorithm measures one; "accepted" bool
        `[slots]` where it refuses uploads by itself.
      traffic: what of uploads and state crosses the network, and what the server keeps.
      local: how slots train.
      heads: by which defences trained heads are averaged among the holders of a task; None where
        each slot keeps its own. Read by `with_heads`: to be replaced before, not in what it made.
      evaluated: `(state, slots) -> vectors [slots, ...]`, what is evaluated; None = `download`.
      sends_change: whether upload is given what the round has changed, vectors less downloads,
        instead of the vectors. Read by `with_heads` too.
      sharded_over: makes the same algorithm with the parameters of the server's arithmetic, and of
        folding, sharded over the devices of a mesh, whose base, vectors and state have flat
        leaves (`[n]`, `[rows, n]`); None where it runs on one device, or needs the leaves' shapes.
        `_replace` leaves it out unless it is given anew: what it makes knows nothing of the change.
      groups: how a round goes from one group of clients to the next; None where `download`,
        `upload` and `aggregate` are given all slots at once. `_replace` leaves it out with what it
        is about, unless it is given anew.
    """

    __slots__ = ()

    def _replace(self, **fields: Any) -> "Algorithm":
        """The algorithm with other fields; every one of them runs, on however many devices."""
        left_out: dict[str, Any] = {"sharded_over": None}
        if fields.keys() & {"init", "download", "upload", "aggregate", "sends_change"}:
            left_out["groups"] = None
        return super()._replace(**(left_out | fields))

    __replace__ = _replace  # of `copy.replace`, from Python 3.13 on


def check_aggregated(found: Any, state: Any, name: str) -> None:
    """Checks what `aggregate` has returned, or would; arrays or their shapes.

    Args:
      found: what it returned.
      state: what it was given.
      name: of the algorithm, for messages.

    Raises:
      ValueError: if it is no pair of state and dict, or a leaf of the state has changed its place,
        shape or dtype.
    """
    where = f"config.algorithm {name!r}: aggregate"
    if not isinstance(found, tuple) or len(found) != 2 or not isinstance(found[1], dict):
        raise ValueError(
            f"{where}: returned {type(found).__name__}, expected a pair (state, metrics), where "
            "metrics is a dict of arrays, {} if there are none."
        )
    check_like(found[0], state, f"{where}: the new state against the old", leading=0)
    check_dtypes(found[0], state, f"{where}: the new state against the old")
