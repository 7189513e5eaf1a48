"""MaTU in plain loops: the readable reference that the tests hold the library against.

Straight from equations 1 to 9, in float64, one slot, one task and one parameter at a time. A task
vector is a flat row of `d` numbers. Nothing here is imported from the library, nothing is fast.

The functions are the stages of one round and can be fed from each other or from the library's
own intermediate results:

    unify            eqs. 1 to 4, one group
    estimates        eqs. 5 and 6
    aggregated_similarity, cross_client_similarity    eq. 7
    transfer         eq. 8
    aggregate        all of it, and eq. 9
    evidence, shrinkage_problem, shrinkage    transfer by shrinkage
    change_round     a round whose uploads are changes

Below them stand the bridges between pytrees and flat rows.
"""

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import numpy as np
from scipy.optimize import nnls

# Two sums closer to zero than this, relative to what was added, may differ in sign in float32.
DOUBTFUL = 1e-5


class Group(NamedTuple):
    """What one group of slots is folded into."""

    vector: np.ndarray  # [d]
    masks: np.ndarray  # [slots, d], 0 or 1
    scales: np.ndarray  # [slots]


class Round(NamedTuple):
    """What the server knows and sends after one round."""

    estimates: np.ndarray  # [tasks, d], before transfer
    similarity: np.ndarray  # [tasks, tasks]
    task_vectors: np.ndarray  # [tasks, d]
    unified: Group  # over all tasks
    downloads: list[Group]  # one per client, over the slots `listed[client]`
    listed: list[list[int]]


def sign(x: float) -> int:
    return int(x > 0) - int(x < 0)


def unify(
    vectors: np.ndarray,
    present: Sequence[bool] | np.ndarray,
    magnitude: str = "max",
    store: Callable[[np.ndarray], np.ndarray] = np.asarray,
) -> Group:
    """Eqs. 1 to 4. `store` rounds the folded vector as its storage does."""
    slots, d = vectors.shape
    members = [s for s in range(slots) if present[s]]

    folded = np.zeros(d)
    for i in range(d):
        elected = sign(sum(float(vectors[s, i]) for s in members))
        if elected == 0:
            continue
        agreeing = [abs(float(vectors[s, i])) for s in members if sign(vectors[s, i]) == elected]
        size = max(agreeing) if magnitude == "max" else sum(agreeing) / len(agreeing)
        folded[i] = elected * size
    folded = store(folded)

    masks = np.zeros((slots, d), int)
    scales = np.zeros(slots)
    for s in members:
        length, kept = 0.0, 0.0
        for i in range(d):
            length += abs(float(vectors[s, i]))
            if sign(vectors[s, i]) * sign(folded[i]) > 0:
                masks[s, i] = 1
                kept += abs(float(folded[i]))
        scales[s] = length / kept if kept > 0 else 0.0
    return Group(folded, masks, scales)


def modulate(group: Group) -> np.ndarray:
    """λ_s · m_s ⊙ u for every slot of one group: [slots, d]."""
    slots, d = group.masks.shape
    return np.array(
        [
            [group.scales[s] * group.masks[s, i] * float(group.vector[i]) for i in range(d)]
            for s in range(slots)
        ]
    ).reshape(slots, d)


def doubtful(vectors: np.ndarray, present: Sequence[bool] | np.ndarray) -> bool:
    """Whether some election is so close that float32 may see it otherwise than float64."""
    for i in range(vectors.shape[1]):
        terms = [float(vectors[s, i]) for s in range(len(vectors)) if present[s]]
        total, size = abs(sum(terms)), sum(abs(term) for term in terms)
        if 0 < total < DOUBTFUL * size:
            return True
    return False


def holders(
    task: int, task_of: Sequence[int] | np.ndarray, weight: Sequence[float] | np.ndarray
) -> list[int]:
    """S(t): the slots that report this task in this round."""
    return [s for s in range(len(task_of)) if task_of[s] == task and weight[s] > 0]


def estimates(
    received: np.ndarray,
    task_of: Sequence[int] | np.ndarray,
    weight: Sequence[float] | np.ndarray,
    num_tasks: int,
    threshold: float,
    kept: np.ndarray | None = None,
) -> np.ndarray:
    """Eqs. 5 and 6 over the modulated uploads `received`, [slots, d]; gives [tasks, d]."""
    d = received.shape[1]
    result = np.zeros((num_tasks, d))
    for t in range(num_tasks):
        reporting = holders(t, task_of, weight)
        if not reporting:
            if kept is not None:
                result[t] = kept[t]
            continue
        total = sum(float(weight[s]) for s in reporting)
        for i in range(d):
            agreement = abs(sum(sign(received[s, i]) for s in reporting)) / len(reporting)
            gate = 1.0 if agreement >= threshold else agreement
            mean = sum(float(weight[s]) / total * float(received[s, i]) for s in reporting)
            result[t, i] = gate * mean
    return result


def sign_product(a: np.ndarray, b: np.ndarray) -> Fraction:
    """(1/d) Σ sgn(a) ⊙ sgn(b), exactly."""
    return Fraction(sum(sign(x) * sign(y) for x, y in zip(a, b, strict=True)), len(a))


def aggregated_similarity(vectors: np.ndarray) -> np.ndarray:
    """Eq. 7 between all rows."""
    n = len(vectors)
    return np.array(
        [
            [float((1 + sign_product(vectors[a], vectors[b])) / 2) for b in range(n)]
            for a in range(n)
        ]
    )


def cross_client_similarity(
    received: np.ndarray,
    client_of: Sequence[int] | np.ndarray,
    task_of: Sequence[int] | np.ndarray,
    weight: Sequence[float] | np.ndarray,
    num_tasks: int,
) -> np.ndarray:
    """Eq. 7 averaged over pairs of slots of two clients; ½ where there is no such pair.

    The diagonal is left at ½ and is not part of the comparison.
    """
    result = np.full((num_tasks, num_tasks), 0.5)
    for a in range(num_tasks):
        for b in range(num_tasks):
            pairs = [
                (s, r)
                for s in holders(a, task_of, weight)
                for r in holders(b, task_of, weight)
                if client_of[s] != client_of[r]
            ]
            if pairs and a != b:
                mean = sum(sign_product(received[s], received[r]) for s, r in pairs) / len(pairs)
                result[a, b] = float((1 + mean) / 2)
    return result


def lenders(
    task: int, similarity: np.ndarray, can_lend: Sequence[bool], top_k: int, min_similarity: float
) -> list[int]:
    """Z(t): the most similar other tasks, the lower index first among equals."""
    others = [
        t
        for t in range(len(similarity))
        if t != task and can_lend[t] and similarity[task, t] >= min_similarity
    ]
    return sorted(others, key=lambda t: (-similarity[task, t], t))[:top_k]


def transfer(
    rule: str,
    vectors: np.ndarray,
    similarity: np.ndarray,
    can_lend: Sequence[Sequence[bool]],
    top_k: int,
    min_similarity: float,
) -> np.ndarray:
    """Eq. 8: what every task takes from the tasks most like it."""
    result = np.array(vectors, float)
    if rule == "none":
        return result
    for t in range(len(vectors)):
        share = np.zeros(vectors.shape[1])
        borrowed = 0.0
        for other in lenders(t, similarity, can_lend[t], top_k, min_similarity):
            share += similarity[t, other] * vectors[other]
            borrowed += similarity[t, other]
        if rule == "additive":
            result[t] = vectors[t] + share
        elif rule == "mean":
            result[t] = (vectors[t] + share) / (1 + borrowed)
        else:
            raise ValueError(rule)
    return result


def lending(
    vectors: np.ndarray,
    client_of: Sequence[int] | np.ndarray,
    task_of: Sequence[int] | np.ndarray,
    weight: Sequence[float] | np.ndarray,
    similarity_of: str,
) -> list[list[bool]]:
    """Who may lend (second index) to whom (first index).

    A task that holds nothing has nothing to lend, one that nobody reported keeps what it has, and
    where slots of different clients are compared, two tasks need such slots.
    """
    present = [s for s in range(len(weight)) if weight[s] > 0]
    tasks = len(vectors)
    allowed = [[False] * tasks for _ in range(tasks)]
    for t in range(tasks):
        for other in range(tasks):
            reported = any(task_of[s] == t for s in present)
            compared = similarity_of == "aggregated" or any(
                task_of[a] == t and task_of[b] == other and client_of[a] != client_of[b]
                for a in present
                for b in present
            )
            holds = any(value != 0 for value in vectors[other])
            allowed[t][other] = reported and compared and holds
    return allowed


def aggregate(
    received: np.ndarray,
    client_of: Sequence[int] | np.ndarray,
    task_of: Sequence[int] | np.ndarray,
    weight: Sequence[float] | np.ndarray,
    num_clients: int,
    num_tasks: int,
    *,
    magnitude: str = "max",
    agreement_threshold: float = 0.4,
    rule: str = "none",
    similarity_of: str = "aggregated",
    top_k: int = 0,
    min_similarity: float = 0.0,
    kept: np.ndarray | None = None,
) -> Round:
    """One round at the server, from the modulated uploads to what every client receives."""
    own = estimates(received, task_of, weight, num_tasks, agreement_threshold, kept)
    if similarity_of == "aggregated":
        similarity = aggregated_similarity(own)
    else:
        similarity = cross_client_similarity(received, client_of, task_of, weight, num_tasks)
    allowed = lending(own, client_of, task_of, weight, similarity_of)
    vectors = transfer(rule, own, similarity, allowed, top_k, min_similarity)

    listed = [[s for s in range(len(task_of)) if client_of[s] == n] for n in range(num_clients)]
    return Round(
        estimates=own,
        similarity=similarity,
        task_vectors=vectors,
        unified=unify(vectors, [True] * num_tasks, magnitude),
        downloads=[
            unify(vectors[[task_of[s] for s in slots]], [True] * len(slots), magnitude)
            for slots in listed
        ],
        listed=listed,
    )


class Kept(NamedTuple):
    """What a server keeps where uploads are changes."""

    task_vectors: np.ndarray  # [tasks, d]
    agreement: np.ndarray  # [tasks, tasks]
    energy: np.ndarray  # [tasks, tasks]


class ChangeRound(NamedTuple):
    """What such a server knows and sends after one round."""

    changes: np.ndarray  # [tasks, d], gated, before transfer
    mixing: np.ndarray  # [tasks, tasks], what every task takes of every task's change
    similarity: np.ndarray  # [tasks, tasks]
    kept: Kept
    unified: Group
    downloads: list[Group]
    listed: list[list[int]]


def nothing_kept(num_tasks: int, d: int) -> Kept:
    square = np.zeros((num_tasks, num_tasks))
    return Kept(np.zeros((num_tasks, d)), square, square.copy())


def evidence(
    received: np.ndarray,
    client_of: Sequence[int] | np.ndarray,
    task_of: Sequence[int] | np.ndarray,
    weight: Sequence[float] | np.ndarray,
    num_tasks: int,
) -> tuple[np.ndarray, np.ndarray]:
    """One round's agreement and energy, both [tasks, tasks].

    The agreement of two tasks (or of one with itself) is the mean over pairs of slots of different
    clients of (1/d) Σ sgn(x) sgn(x'), times the geometric mean of the two tasks' energies; a task's
    energy is the mean over its holders of Σ x².
    """
    agreement = np.zeros((num_tasks, num_tasks))
    energy = np.zeros((num_tasks, num_tasks))
    size = np.zeros(num_tasks)
    for t in range(num_tasks):
        reporting = holders(t, task_of, weight)
        for s in reporting:
            size[t] += sum(float(x) ** 2 for x in received[s]) / len(reporting)
    for a in range(num_tasks):
        for b in range(num_tasks):
            products = [
                float(sign_product(received[s], received[r]))
                for s in holders(a, task_of, weight)
                for r in holders(b, task_of, weight)
                if client_of[s] != client_of[r]
            ]
            if products:
                energy[a, b] = (size[a] * size[b]) ** 0.5
                agreement[a, b] = sum(products) / len(products) * energy[a, b]
    return agreement, energy


def worth(
    task_of: Sequence[int] | np.ndarray, weight: Sequence[float] | np.ndarray, num_tasks: int
) -> np.ndarray:
    """How many equal holders a task's weighted mean is worth: (Σw)² / Σw²; 1 without holders."""
    result = np.ones(num_tasks)
    for t in range(num_tasks):
        counts = [float(weight[s]) for s in holders(t, task_of, weight)]
        if counts:
            result[t] = sum(counts) ** 2 / sum(count**2 for count in counts)
    return result


def shrinkage_problem(
    agreement: np.ndarray, energy: np.ndarray, equal_holders: Sequence[float] | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The model of transfer by shrinkage: K, [tasks, tasks], and the noise left in each mean."""
    tasks = len(agreement)
    met = [[bool(energy[a, b] > 0) for b in range(tasks)] for a in range(tasks)]
    correlation = np.zeros((tasks, tasks))
    for a in range(tasks):
        for b in range(tasks):
            if met[a][b]:
                correlation[a, b] = float(agreement[a, b]) / float(energy[a, b])
    pairs = [correlation[a, b] for a in range(tasks) for b in range(tasks) if a != b and met[a][b]]
    common = max(float(np.median(pairs)), 0.0) if pairs else 0.0

    own = [correlation[t, t] for t in range(tasks) if met[t][t]]
    related, noise = np.zeros((tasks, tasks)), np.zeros(tasks)
    for t in range(tasks):
        nearest = max([correlation[t, b] for b in range(tasks) if b != t and met[t][b]], default=0)
        if met[t][t]:
            signal = correlation[t, t]
        elif own:
            signal = sum(own) / len(own)
        else:
            signal = nearest
        # No task shares more with another one than it has; and every one has some signal.
        signal = min(max(signal, nearest, 1e-3), 1.0)
        noise[t] = (1 - signal) / max(float(equal_holders[t]), 1.0)
        for b in range(tasks):
            if b != t and met[t][b]:
                related[t, b] = max(correlation[t, b] - common, 0.0)
        related[t, t] = max(signal - common, 1e-3)
    return related, noise


def least(quadratic: np.ndarray, linear: np.ndarray) -> np.ndarray:
    """The w ≥ 0 that minimises wᵀQw - 2wᵀb.

    By non-negative least squares on a Cholesky factor; where Q is not positive definite, by
    projected gradient steps, long enough to stand still.
    """
    try:
        factor = np.linalg.cholesky(quadratic)
    except np.linalg.LinAlgError:
        found = np.array(linear, float)
        step = 1 / np.abs(quadratic).sum(axis=1).max()
        for _ in range(200_000):
            moved = np.maximum(found - step * (quadratic @ found - linear), 0.0)
            if np.abs(moved - found).max() < 1e-14:
                break
            found = moved
        return found
    return nnls(factor.T, np.linalg.solve(factor, linear))[0]


def shrinkage(
    agreement: np.ndarray,
    energy: np.ndarray,
    equal_holders: Sequence[float] | np.ndarray,
    can_lend: Sequence[Sequence[bool]] | np.ndarray,
) -> np.ndarray:
    """What every task takes of every task's change: one small problem per task, rows sum to 1."""
    related, noise = shrinkage_problem(agreement, energy, equal_holders)
    tasks = len(related)
    result = np.zeros((tasks, tasks))
    for t in range(tasks):
        chosen = [b for b in range(tasks) if b == t or can_lend[t][b]]
        quadratic = np.array(
            [[related[a, b] + (noise[a] if a == b else 0.0) for b in chosen] for a in chosen]
        )
        weights = least(quadratic, np.array([related[t, b] for b in chosen]))
        for b, weight in zip(chosen, weights, strict=True):
            result[t, b] = weight / weights.sum()
    return result


def change_round(
    received: np.ndarray,
    client_of: Sequence[int] | np.ndarray,
    task_of: Sequence[int] | np.ndarray,
    weight: Sequence[float] | np.ndarray,
    num_clients: int,
    kept: Kept,
    *,
    magnitude: str = "max",
    agreement_threshold: float = 0.4,
    rule: str = "none",
    similarity_of: str = "cross_client",
    top_k: int = 0,
    min_similarity: float = 0.0,
) -> ChangeRound:
    """One round at a server that adds changes to the task vectors it keeps."""
    tasks, _ = kept.task_vectors.shape
    changes = estimates(received, task_of, weight, tasks, agreement_threshold)
    if similarity_of == "aggregated":
        similarity = aggregated_similarity(changes)
    else:
        similarity = cross_client_similarity(received, client_of, task_of, weight, tasks)
    allowed = lending(changes, client_of, task_of, weight, similarity_of)
    agreement, energy = kept.agreement, kept.energy
    if rule == "shrinkage":
        more = evidence(received, client_of, task_of, weight, tasks)
        agreement, energy = agreement + more[0], energy + more[1]
        mixing = shrinkage(agreement, energy, worth(task_of, weight, tasks), allowed)
    else:
        # Eq. 8 is linear in the vectors: what it makes of unit vectors are its weights.
        mixing = transfer(rule, np.eye(tasks), similarity, allowed, top_k, min_similarity)
    vectors = np.array(kept.task_vectors, float)
    for t in range(tasks):
        for other in range(tasks):
            vectors[t] = vectors[t] + mixing[t, other] * changes[other]

    listed = [[s for s in range(len(task_of)) if client_of[s] == n] for n in range(num_clients)]
    return ChangeRound(
        changes=changes,
        mixing=mixing,
        similarity=similarity,
        kept=Kept(vectors, agreement, energy),
        unified=unify(vectors, [True] * tasks, magnitude),
        downloads=[
            unify(vectors[[task_of[s] for s in slots]], [True] * len(slots), magnitude)
            if slots
            else Group(
                np.zeros(vectors.shape[1]), np.zeros((0, vectors.shape[1]), int), np.zeros(0)
            )
            for slots in listed
        ],
        listed=listed,
    )


# The case that most tests share, so that they also share compilations: five clients with 3, 2, 2, 2
# and 2 slots, in no order; one slot of client 3 and all of client 4 are absent; task 3 is held by
# an absent slot alone, task 4 by nobody.

CLIENTS, TASKS, SLOTS, PARAMETERS = 5, 5, 11, 16
CLIENT = [2, 0, 0, 1, 3, 0, 1, 3, 2, 4, 4]
TASK = [0, 1, 0, 2, 1, 2, 0, 0, 2, 3, 1]
WEIGHT = [3.0, 1.0, 2.0, 4.0, 0.5, 2.0, 1.0, 0.0, 1.0, 0.0, 0.0]


def values(seed: int, slots: int = SLOTS) -> np.ndarray:
    """Multiples of 1/8, so that float32 sums are exact; more than one in ten is exactly zero."""
    generator = np.random.default_rng(seed)
    drawn = generator.integers(-24, 25, (slots, PARAMETERS)) / 8
    return np.where(generator.random(drawn.shape) < 0.12, 0.0, drawn)


def tree(flat: np.ndarray, dtypes: Sequence[Any] = (np.float32, np.float32)) -> Any:
    """Rows [slots, 16] as a matrix, a scalar and a branch with nothing in it."""
    matrix = flat[:, :15].reshape(-1, 3, 5).astype(np.float32).astype(dtypes[0])
    return {
        "block": {"kernel": matrix},
        "empty": {},
        "pair": (flat[:, 15].astype(np.float32).astype(dtypes[1]),),
    }


# Bridges between pytrees and flat rows.


def rows(tree: Any, axes: int = 1) -> np.ndarray:
    """Leaves [..., *shape] with `axes` leading axes, as one float64 array [..., d]."""
    flat = []
    for leaf in jax.tree.leaves(tree):
        array = np.asarray(leaf).astype(np.float64)
        flat.append(array.reshape(*array.shape[:axes], -1))
    return np.concatenate(flat, axis=-1)


def unpacked(masks: Any, like: Any, axes: int = 1) -> np.ndarray:
    """Packed masks [slots, bytes] as 0 and 1, [slots, d]; `like` has `axes` axes before a leaf."""
    flat = []
    for mask, leaf in zip(jax.tree.leaves(masks), jax.tree.leaves(like), strict=True):
        size = int(np.prod(np.shape(leaf)[axes:], dtype=int))
        flat.append(bits_of(np.asarray(mask), size))
    return np.concatenate(flat, axis=-1).astype(int)


def bits_of(mask: np.ndarray, size: int) -> np.ndarray:
    """A leaf's packed mask [..., bytes] as 0 and 1, [..., size], parameter by parameter.

    Of whole tiles of 1024 parameters, parameter i of a tile is bit i // 128 of byte i % 128; of the
    r parameters behind them, bit i // w of byte i % w, w = ceil(r / 8).
    """
    i, tiles = np.arange(size), size // 1024 * 1024
    width = max(-(-(size - tiles) // 8), 1)
    byte = np.where(i < tiles, i // 1024 * 128 + i % 128, tiles // 8 + (i - tiles) % width)
    bit = np.where(i < tiles, i % 1024 // 128, (i - tiles) // width)
    return mask[..., byte].astype(int) >> bit & 1


def storage(like: Any, axes: int = 1) -> Callable[[np.ndarray], np.ndarray]:
    """Rounds a flat row [d] to the dtypes of the leaves it came from."""
    parts = [
        (int(np.prod(np.shape(leaf)[axes:], dtype=int)), np.asarray(leaf).dtype)
        for leaf in jax.tree.leaves(like)
    ]

    def store(row: np.ndarray) -> np.ndarray:
        rounded, start = [], 0
        for size, dtype in parts:
            piece = row[start : start + size].astype(np.float32).astype(dtype)
            rounded.append(piece.astype(np.float64))
            start += size
        return np.concatenate(rounded)

    return store


def groups(unified: Any, client_of: Sequence[int] | np.ndarray, num_clients: int) -> list[Group]:
    """A unified over clients, as one `Group` of flat rows per client, slots in listed order."""
    vectors = rows(unified.vector)
    masks = unpacked(unified.masks, unified.vector)
    scales = np.asarray(unified.scales, np.float64)
    result = []
    for n in range(num_clients):
        listed = [s for s in range(len(client_of)) if client_of[s] == n]
        result.append(Group(vectors[n], masks[listed], scales[listed]))
    return result


def received(unified: Any, client_of: Sequence[int] | np.ndarray) -> np.ndarray:
    """What the server reconstructs from the uploads, slot by slot: [slots, d]."""
    vectors = rows(unified.vector)
    masks = unpacked(unified.masks, unified.vector)
    scales = np.asarray(unified.scales, np.float64)
    result = np.zeros(masks.shape)
    for s, n in enumerate(client_of):
        for i in range(masks.shape[1]):
            if masks[s, i]:
                result[s, i] = scales[s] * vectors[n, i]
    return result


# Comparison, stage by stage: each stage of the library is held against the oracle's next stage
# from the library's own numbers, so that rounding in one stage cannot flip a sign in the next.


def assert_group(
    found: Group, expected: Group, relative: float = 1e-5, vector_relative: float = 1e-6
) -> None:
    np.testing.assert_allclose(found.vector, expected.vector, rtol=vector_relative, atol=0)
    np.testing.assert_array_equal(found.masks, expected.masks)
    np.testing.assert_allclose(found.scales, expected.scales, rtol=relative, atol=0)


def assert_unified(
    unified: Any,
    vectors: np.ndarray,
    client_of: Sequence[int] | np.ndarray,
    present: Sequence[bool] | np.ndarray,
    num_clients: int,
    magnitude: str,
) -> None:
    """A unified over clients is eqs. 1 to 4 of the flat `vectors`, [slots, d]."""
    found = groups(unified, client_of, num_clients)
    store = storage(unified.vector)
    for n in range(num_clients):
        listed = [s for s in range(len(client_of)) if client_of[s] == n]
        here = [present[s] for s in listed]
        assert_group(found[n], unify(vectors[listed], here, magnitude, store))


def eq9_in_doubt(
    result: Any, client_of: Sequence[int] | np.ndarray, task_of: Sequence[int] | np.ndarray
) -> bool:
    """Whether float32 may see an election of eq. 9 otherwise than float64."""
    vectors = rows(result.task_vectors)
    if doubtful(vectors, [True] * len(vectors)):
        return True
    for n in set(client_of):
        tasks = [task_of[s] for s in range(len(task_of)) if client_of[s] == n]
        if doubtful(vectors[tasks], [True] * len(tasks)):
            return True
    return False


def assert_round(
    result: Any,
    untransferred: Any,
    uploads: Any,
    slots: Any,
    config: Any,
    previous: Any = None,
    relative: float = 2e-6,
) -> None:
    """One round of the library is eqs. 5 to 9.

    `untransferred` is the same round without eq. 8; `relative` is the storage's rounding.
    """
    client_of, task_of = np.asarray(slots.client).tolist(), np.asarray(slots.task).tolist()
    listed = np.asarray(slots.weight, np.float64)
    weight = np.where(np.asarray(result.accepted), listed, 0.0).tolist()
    tasks, clients = slots.num_tasks, slots.num_clients

    reconstructed = received(uploads, client_of)
    kept = None
    if previous is not None:
        whole = Group(
            rows(previous.vector, 0),
            unpacked(previous.masks, previous.vector, 0),
            np.asarray(previous.scales, np.float64),
        )
        kept = modulate(whole)
    expected = estimates(reconstructed, task_of, weight, tasks, config.agreement_threshold, kept)
    own = rows(untransferred.task_vectors)
    largest = np.abs(reconstructed).max(initial=0.0)
    np.testing.assert_allclose(own, expected, rtol=relative, atol=relative * largest)

    similarity = np.asarray(result.similarity, np.float64)
    np.testing.assert_array_equal(similarity, np.asarray(untransferred.similarity))
    assert ((similarity >= 0) & (similarity <= 1)).all()
    if config.similarity == "aggregated":
        np.testing.assert_allclose(similarity, aggregated_similarity(own), rtol=0, atol=1e-6)
    else:
        across = cross_client_similarity(reconstructed, client_of, task_of, weight, tasks)
        others = ~np.eye(tasks, dtype=bool)
        np.testing.assert_allclose(similarity[others], across[others], rtol=0, atol=1e-6)

    vectors = rows(result.task_vectors)
    allowed = lending(own, client_of, task_of, weight, config.similarity)
    mixed = transfer(config.transfer, own, similarity, allowed, config.top_k, config.min_similarity)
    largest = np.abs(own).sum(axis=0).max(initial=0.0)
    np.testing.assert_allclose(vectors, mixed, rtol=relative, atol=relative * largest)

    store = storage(result.unified.vector, 0)
    assert_group(
        Group(
            rows(result.unified.vector, 0),
            unpacked(result.unified.masks, result.unified.vector, 0),
            np.asarray(result.unified.scales, np.float64),
        ),
        unify(vectors, [True] * tasks, config.magnitude, store),
    )
    everywhere = [True] * len(task_of)
    assert_unified(
        result.downloads, vectors[task_of], client_of, everywhere, clients, config.magnitude
    )
