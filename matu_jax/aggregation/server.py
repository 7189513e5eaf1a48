"""The server's round, eqs. 5 to 9."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from matu_jax.aggregation.choices import AggregationConfig
from matu_jax.aggregation.directions import gram, same_client_gram
from matu_jax.aggregation.fold import (
    as_bits,
    clip_to,
    flat_leaf,
    fold,
    from_bits,
    joined_eighths,
    loop_zeros,
    modulate_jit,
    modulated,
    over_blocks,
    over_groups,
)
from matu_jax.aggregation.joining import joining
from matu_jax.aggregation.robust import (
    agreement_weights,
    clip_factors,
    counted,
    sign_sums,
    smallest_length,
    vector_lengths,
    within_trim,
)
from matu_jax.aggregation.sharding import (
    Axes,
    ParameterSharding,
    all_over,
    any_over,
    check_mesh,
    total_over,
)
from matu_jax.aggregation.shrinkage import shrinkage
from matu_jax.aggregation.types import (
    Aggregated,
    ServerState,
    Slots,
    Unified,
    check_slots,
    check_unified,
)
from matu_jax.trees import PyTree, as_floating, check_like, check_stacked, leaf_items


def _lending(similarity: jax.Array, allowed: jax.Array, config: AggregationConfig) -> jax.Array:
    """Eq. 8's weights `[tasks, tasks]`: A_tt' for the lenders t' in Z(t), else 0.

    `allowed` `[tasks, tasks]` says who may lend (second axis) to whom (first axis).
    """
    tasks = similarity.shape[0]
    allowed = allowed & ~jnp.eye(tasks, dtype=jnp.bool_)
    ranked = jnp.where(allowed, similarity, -1.0)
    values, index = jax.lax.top_k(ranked, min(config.top_k, tasks))
    values = jnp.where(values >= max(config.min_similarity, 0.0), values, 0.0)
    return jnp.zeros_like(similarity).at[jnp.arange(tasks)[:, None], index].set(values)


def _same_task(
    leaf: jax.Array,
    mask: jax.Array,
    old: jax.Array,
    scales: jax.Array,
    fraction: jax.Array,
    accepted: jax.Array,
    holders: jax.Array,
    slots: Slots,
    config: AggregationConfig,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Eqs. 5 and 6 for one flat leaf: `[tasks, n]` in the storage dtype, `old` where unreported.

    Also the products of the tasks' sums of signs, `[tasks, tasks]`, if slots of different clients
    are to be compared, and sums of squares `[tasks]`, if transfer is by shrinkage; else zeros.
    """
    tasks, (_, size), dtype = slots.num_tasks, leaf.shape, leaf.dtype
    old = as_bits(clip_to(old.astype(jnp.float32), dtype))
    inputs = (leaf, mask, scales, fraction, accepted, slots.client, slots.task)
    source = as_bits(leaf)

    def block(start, length, carry):
        own, products, energies = carry
        zero = loop_zeros((1, length), jnp.float32, *inputs)

        def add_slot(carry, slot, task, first):
            own, signs, energies, mean, sign, rows, extremes = carry
            packed = jax.lax.dynamic_slice(mask, (slot, start // 8), (1, -(-length // 8)))
            x = jax.lax.dynamic_slice(source, (slots.client[slot], start), (1, length))
            ok = accepted[slot]
            scale = jnp.where(ok, scales[slot], 0.0)[None]
            x = modulated(from_bits(x, dtype), packed, scale)
            # Put down and taken up again, or XLA on CPU would unpack the mask for every use.
            place = (slot % 2, 0, 0)
            rows = jax.lax.dynamic_update_slice(rows, jnp.where(ok, x, 0.0), place)
            x = joined_eighths(jax.lax.dynamic_slice(rows, place, (1, *rows.shape[1:])), length)
            sign = jnp.where(first, 0.0, sign) + jnp.sign(x)
            held = holders[task]
            agreement = jnp.abs(sign) / jnp.maximum(held, 1).astype(jnp.float32)
            gate = jnp.where(agreement >= config.agreement_threshold, 1.0, agreement)
            part, energy = fraction[slot], 1.0
            if config.trim:
                absent = jnp.where(first, -jnp.inf, extremes)
                grown, passed = within_trim(absent, x[0], held)
                extremes = jnp.where(ok, grown, absent)
                x = jnp.where(ok, passed, 0.0)[None]
                part = 1 / counted(config.trim, held)
                energy = held.astype(jnp.float32) * part
            mean = jnp.where(first, 0.0, mean) + part * x
            before = jax.lax.dynamic_slice(own, (task, start), (1, length))
            value = jnp.where(held > 0, as_bits(clip_to(gate * mean, dtype)), before)
            own = jax.lax.dynamic_update_slice(own, value, (task, start))
            if compares:
                signs = jax.lax.dynamic_update_slice(signs, sign, (task, 0))
            if config.transfer == "shrinkage":
                energies = energies.at[task].add(energy * jnp.square(x).sum())
            return own, signs, energies, mean, sign, rows, extremes

        signs = loop_zeros((tasks, length if compares else 0), jnp.float32, *inputs)
        own, signs, energies, *_ = over_groups(
            slots.task,
            add_slot,
            (
                own,
                signs,
                energies,
                zero,
                zero,
                loop_zeros((2, -(-length // 8), 8), jnp.float32, *inputs),
                loop_zeros((2, config.trim, length), jnp.float32, *inputs),
            ),
        )
        if compares:
            products = products + gram([signs], 1, signs=False)
        return own, products, energies

    compares = config.similarity == "cross_client"
    carry = (
        old + loop_zeros(old.shape, old.dtype, *inputs),
        loop_zeros((tasks, tasks), jnp.float32, *inputs),
        loop_zeros((tasks,), jnp.float32, *inputs),
    )
    own, products, energies = over_blocks(size, block, carry)
    return from_bits(own, dtype), products, energies


class _Flat(NamedTuple):
    """What has an axis of parameters, as lists of flat arrays.

    Attributes:
      vector: unified vectors of the uploads, `[clients, n]`.
      masks: packed masks of the uploads, `[slots, bytes]`.
      start: task vectors before the round, `[tasks, n]`.
    """

    vector: list[jax.Array]
    masks: list[jax.Array]
    start: list[jax.Array]


class _Whole(NamedTuple):
    """What has none: the uploads' scales `[slots]`, the slots, and what `ServerState` keeps."""

    scales: jax.Array
    slots: Slots
    agreement: jax.Array
    energy: jax.Array


def _server(
    flat: _Flat, whole: _Whole, config: AggregationConfig, size: int, axes: Axes
) -> tuple[Any, Any, Any]:
    """Eqs. 5 to 9 on flat arrays; `size` counts all parameters, `axes` see `ParameterSharding`.

    Returns:
      With parameters: task vectors, the server's own vector and the downloads'; masks of both; and
      what has no parameters: scales of both, similarity, accepted, agreement, energy.
    """
    vector, masks, start = flat
    scales, slots, agreement, energy = whole
    tasks, count = slots.num_tasks, slots.client.shape[0]

    finite = jnp.stack([jnp.isfinite(leaf).all(axis=1) for leaf in vector]).all(axis=0)
    finite = all_over(finite, axes)
    scale_ok = jnp.isfinite(scales) & (scales >= 0)
    accepted = (slots.weight > 0) & scale_ok & finite[slots.client]

    weight = jnp.where(accepted, slots.weight, 0.0)
    weight = weight / jnp.maximum(weight.max(), jnp.finfo(jnp.float32).tiny)
    if config.clip:
        unit, length = (part[slots.client] for part in vector_lengths(vector, axes))
        lengths = jnp.where(accepted, scales * unit * length, 0.0)
        unseen = jnp.where(accepted, scales * smallest_length(size), 0.0)
        scales = scales * clip_factors(
            lengths, accepted, config.clip, slots.client, slots.num_clients, unseen
        )
    if config.trim:
        weight = accepted.astype(jnp.float32)
    elif config.weighting == "agreement":
        common, nonzero = sign_sums(vector, masks, scales, accepted, slots, axes)
        weight = agreement_weights(common, nonzero, weight, slots.task, tasks)
    weight_sum = jnp.zeros(tasks, jnp.float32).at[slots.task].add(weight)
    holders = jnp.zeros(tasks, jnp.int32).at[slots.task].add(accepted.astype(jnp.int32))
    fraction = weight / jnp.where(weight_sum > 0, weight_sum, 1.0)[slots.task]
    reported = holders > 0
    kept = start
    if config.uploads == "change":
        kept = [jnp.zeros_like(leaf) for leaf in start]

    # Eqs. 5 and 6.
    learns = config.transfer == "shrinkage"
    own, products = [], jnp.zeros((tasks, tasks), jnp.float32)
    energies = jnp.zeros(tasks, jnp.float32)
    for leaf, mask, old in zip(vector, masks, kept, strict=True):
        new, signs, squares = _same_task(
            leaf, mask, old, scales, fraction, accepted, holders, slots, config
        )
        own.append(new)
        products, energies = products + signs, energies + squares

    # Eq. 7.
    if config.similarity == "aggregated":
        products = total_over(gram(own, size, signs=True), axes)
        similarity = jnp.clip((1 + products) / 2, 0.0, 1.0)
        compared = jnp.ones((tasks, tasks), jnp.bool_)
    else:
        present = jnp.zeros((slots.num_clients, tasks), jnp.float32)
        present = present.at[slots.client, slots.task].add(accepted.astype(jnp.float32))
        held = holders.astype(jnp.float32)
        pairs = held[:, None] * held[None, :] - present.T @ present
        same = same_client_gram(vector, masks, size, scales, slots, accepted)
        products = total_over(products / size - same, axes)
        compared = pairs > 0
        mean_product = jnp.where(compared, products / jnp.maximum(pairs, 1.0), 0.0)
        similarity = jnp.clip((1 + mean_product) / 2, 0.0, 1.0)
        similarity = jnp.where(jnp.eye(tasks, dtype=jnp.bool_), 1.0, similarity)

    # Eq. 8.
    mixed = own
    if config.transfer != "none" and (config.top_k > 0 or learns) and tasks > 1:
        lenders = jnp.stack([(leaf != 0).any(axis=1) for leaf in own]).any(axis=0)
        lenders = any_over(lenders, axes)
        # A task that nobody reported keeps what it has; where nothing was compared, nobody lends.
        allowed = compared & lenders[None, :] & reported[:, None]
        if learns:
            # Bounded, so that no upload makes the sum over rounds infinite.
            energies = jnp.minimum(total_over(energies, axes), 1e30)
            length = jnp.sqrt(energies / jnp.maximum(holders, 1).astype(jnp.float32))
            pair = jnp.where(compared, length[:, None] * length[None, :], 0.0)
            agreement, energy = agreement + mean_product * pair, energy + pair
            spread = jnp.zeros(tasks, jnp.float32).at[slots.task].add(jnp.square(fraction))
            worth = 1 / jnp.where(spread > 0, spread, 1.0)
            mixing = shrinkage(agreement, energy, worth, allowed)
        else:
            mixing = jnp.eye(tasks, dtype=jnp.float32) + _lending(similarity, allowed, config)
            if config.transfer == "mean":
                mixing = mixing / mixing.sum(axis=1, keepdims=True)
        mixed = [
            clip_to(
                jnp.matmul(mixing, leaf.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST),
                leaf.dtype,
            )
            for leaf in own
        ]

    if config.uploads == "change":
        mixed = [
            clip_to(old.astype(jnp.float32) + new.astype(jnp.float32), old.dtype)
            for old, new in zip(start, mixed, strict=True)
        ]

    # Eq. 9.
    one_vector, all_masks, all_scales = fold(
        mixed,
        None,
        jnp.zeros(tasks, jnp.int32),
        jnp.ones(tasks, jnp.bool_),
        1,
        config.magnitude,
        axes,
    )
    down_vector, down_masks, down_scales = fold(
        mixed,
        slots.task,
        slots.client,
        jnp.ones(count, jnp.bool_),
        slots.num_clients,
        config.magnitude,
        axes,
    )
    return (
        (mixed, one_vector, down_vector),
        (all_masks, down_masks),
        (all_scales, down_scales, similarity, accepted, agreement, energy),
    )


@partial(jax.jit, static_argnames=("config", "mesh"))
def _aggregate(
    uploads: Unified,
    slots: Slots,
    config: AggregationConfig,
    previous: Unified | ServerState | None,
    mesh: Mesh | None,
) -> Aggregated:
    leaves, treedef = jax.tree.flatten(uploads.vector)
    vector, tasks = [flat_leaf(x) for x in leaves], slots.num_tasks
    if isinstance(previous, ServerState):
        start = [flat_leaf(leaf) for leaf in jax.tree.leaves(previous.task_vectors)]
        agreement, energy = previous.agreement, previous.energy
    else:
        agreement = energy = jnp.zeros((tasks, tasks), jnp.float32)
        if previous is None:
            start = [jnp.zeros((tasks, leaf.shape[1]), leaf.dtype) for leaf in vector]
        else:
            start = [flat_leaf(x) for x in jax.tree.leaves(modulate_jit(previous, None))]
    join = joining(vector, start)
    vector, start = join.vectors(vector), join.vectors(start)
    masks = join.masks(jax.tree.leaves(uploads.masks))
    sharding = ParameterSharding(mesh, [x.shape[1] for x in vector])
    vectors, masks, whole = sharding.run(
        lambda flat, whole: _server(flat, whole, config, join.size, sharding.axes),
        _Flat(sharding.pad_vectors(vector), sharding.pad_masks(masks), sharding.pad_vectors(start)),
        _Whole(uploads.scales, slots, agreement, energy),
        (True, True, False),
    )
    mixed, one_vector, down_vector = map(sharding.unpad_vectors, vectors)
    all_masks, down_masks = map(sharding.unpad_masks, masks)
    all_scales, down_scales, similarity, accepted, agreement, energy = whole

    def shaped(flat, lead):
        pairs = zip(join.leaves(flat), leaves, strict=True)
        return treedef.unflatten([x.reshape(*lead, *leaf.shape[1:]) for x, leaf in pairs])

    def masked(masks):
        return treedef.unflatten(join.leaf_masks(masks))

    return Aggregated(
        similarity=similarity,
        unified=Unified(shaped(one_vector, ()), masked(all_masks), all_scales),
        downloads=Unified(
            shaped(down_vector, (slots.num_clients,)), masked(down_masks), down_scales
        ),
        accepted=accepted,
        state=ServerState(shaped(mixed, (tasks,)), agreement, energy),
    )


def _check_rows(uploads: PyTree, vectors: PyTree) -> None:
    """Checks that two stacked trees have rows of one shape."""
    rows = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), vectors)
    name = "aggregate: uploads.vector [clients, ...] against previous.task_vectors [tasks, ...]"
    check_like(uploads, rows, name, leading=1)


_DEFAULT_CONFIG = AggregationConfig()


def aggregate(
    uploads: Unified,
    slots: Slots,
    config: AggregationConfig = _DEFAULT_CONFIG,
    previous: Unified | ServerState | None = None,
    *,
    mesh: Mesh | None = None,
) -> Aggregated:
    """One round of MaTU's server (eqs. 5 to 9), from the uploads and what it has kept.

    Args:
      uploads: `unify(vectors, slots)`: vector leaves `[clients, ...]`, masks `[slots, bytes]`,
        scales `[slots]`. An upload that holds a NaN or an infinity takes no part (see `accepted`
        in the result, and `nonfinite` for its name).
      slots: which client and task each slot is, and its weight (0 = absent).
      config: the choices in eqs. 5 to 9; `AggregationConfig.paper()` for those of the paper.
      previous: what a task keeps that nobody reported: `.unified` of the round before, or, where
        `config.uploads` is "change", its `.state`, to which the changes are added. None: the first
        round; zeros.
      mesh: devices over which the parameters are sharded, see `unify`; None = all on one.

    Returns:
      `Aggregated`: task vectors `[tasks, ...]`, similarity `[tasks, tasks]`, the unified vector of
      all tasks, the clients' downloads, and which slots were accepted.

    Raises:
      ValueError: if the uploads, the slots and `previous` do not fit each other, naming the leaf;
        for a mesh whose axes are not Auto.
    """
    slots = check_slots(slots, "aggregate")
    rows = slots.client.shape[0]
    uploads = check_unified(uploads, "aggregate: uploads", rows=rows, groups=slots.num_clients)
    changes = config.uploads == "change"
    if previous is not None and isinstance(previous, ServerState) != changes:
        raise ValueError(
            f"aggregate: previous: found {type(previous).__name__}, but config.uploads is "
            f"{config.uploads!r}: pass the last result's " + (".state." if changes else ".unified.")
        )
    if isinstance(previous, ServerState):
        vectors = as_floating(previous.task_vectors, "aggregate: previous.task_vectors")
        check_stacked(vectors, "aggregate: previous.task_vectors", rows=slots.num_tasks)
        _check_rows(uploads.vector, vectors)
        previous = previous._replace(task_vectors=vectors)
        for name in ("agreement", "energy"):
            found, tasks = jnp.shape(getattr(previous, name)), slots.num_tasks
            if found != (tasks, tasks):
                raise ValueError(
                    f"aggregate: previous.{name}: found {list(found)}, expected [{tasks}, {tasks}]."
                )
    elif previous is not None:
        previous = check_unified(previous, "aggregate: previous", rows=slots.num_tasks, groups=None)
        check_like(
            uploads.vector,
            previous.vector,
            "aggregate: uploads.vector [clients, ...] against previous.vector [...]",
            leading=1,
        )
    return _aggregate(uploads, slots, config, previous, check_mesh(mesh, "aggregate"))


def nonfinite(uploads: Unified, slots: Slots) -> list[str]:
    """Names every upload that `aggregate` refuses: client, task and leaf. Runs on the host.

    Args:
      uploads: vector leaves `[clients, ...]`, scales `[slots]`.
      slots: the slots; absent ones (weight 0) are passed over.

    Returns:
      One line per offender, empty if every present upload is finite.
    """
    slots = check_slots(slots, "nonfinite")
    client, task = np.asarray(slots.client), np.asarray(slots.task)
    present = np.asarray(slots.weight) > 0
    scales = np.asarray(uploads.scales)
    lines = [
        f"client {client[s]}, task {task[s]}: scale is {scales[s]}, expected a finite number >= 0"
        for s in np.flatnonzero(present & ~(np.isfinite(scales) & (scales >= 0)))
    ]
    for path, leaf in leaf_items(uploads.vector):
        flat = jnp.asarray(leaf).reshape(slots.num_clients, -1)
        bad = np.asarray((~jnp.isfinite(flat)).sum(axis=1))
        for c in np.flatnonzero(bad):
            held = sorted(task[(client == c) & present].tolist())
            if held:
                lines.append(
                    f"client {c}, task{'s' if len(held) > 1 else ''} "
                    f"{', '.join(map(str, held))}: leaf {path}: {bad[c]} of {flat.shape[1]} "
                    "numbers are not finite"
                )
    return lines
