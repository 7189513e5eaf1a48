"""How fast clients train: against a PyTorch + PEFT loop over clients, and against fedjax.

    python experiments/bench/bench_clients.py                                        a few minutes
    python experiments/bench/bench_clients.py --architecture clip_vit_b32 --clients 4 --steps 1 \
        --repeats 2                                                                   a few minutes
    python experiments/bench/bench_clients.py --architecture clip_vit_b32 --dtypes bfloat16 \
        --batch 16,64                                                                 on a GPU

Model "small" has the sizes of the embedded benchmark's backbone; the other architectures are those
of `matu_jax.models.architectures`, with random weights. Every client has one task; the examples are
on the device before the clock starts, on both sides. What was trained and the losses are compared
before anything is timed ("difference": the largest of a client, as a part of its vector's length).

"auto" is what config.local.parallel_slots = 0 chooses; the columns "1 s" and so on are other
numbers of slots at once on a device, and "of best" is the time of the fastest of them all over
auto's. PyTorch's loop runs with one thread and with all, and the faster one counts. "TFLOP/s"
counts the products of `training_operations` alone; "of dense" is its part of what all devices reach
in products of square matrices of the same dtype. Memory is measured on CPU alone.

The model that fedjax runs too is a perceptron with plain SGD, since fedjax has no transformer; with
its "jit" back end, since that of several devices, "pmap", does not run on JAX 0.10
("AttributeError: jax.device_put_replicated is deprecated"). fedjax is not a dependency of this
package: pip install 'matu_jax[bench]'. Without it, its row is left out.
"""

import argparse
import dataclasses
import importlib.util
import os
import tempfile
import time
from collections.abc import Callable
from typing import Any, Literal

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch is on the device too

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.sharding import NamedSharding, PartitionSpec
from peft_loop import (
    PeftClient,
    compare,
    experiment,
    round_data,
    training_operations,
    zero_vectors,
)
from timing import (
    Timing,
    finish,
    interleaved,
    keep_programs,
    multiplier,
    options,
    peak_growth,
)

from matu_jax import algorithms, models
from matu_jax.algorithms.contract import LocalRule
from matu_jax.config import Config, LocalConfig
from matu_jax.data import ImageTask, Split
from matu_jax.models import Classifier, Model, classifier
from matu_jax.models.architectures import ARCHITECTURES
from matu_jax.runs.processes import use_cores
from matu_jax.simulation.federation import federate
from matu_jax.simulation.local import Trained, local_training
from matu_jax.simulation.memory import fitted, memory_there, predicted_bytes
from matu_jax.simulation.placement import AXIS, on_cpu, padded_rows, slot_mesh, slots_at_once

# Of a vector's length, after a few steps of Adam, which turns rounding into whole steps where
# gradients are near zero; two unrelated vectors are 1.4 apart.
TOLERANCE = {"float32": 0.02, "bfloat16": 0.5}
LOSS = {"float32": 1e-3, "bfloat16": 5e-2}


def _trainer(
    model: Model, local: LocalConfig, data: Split, position: np.ndarray
) -> Callable[[], Trained]:
    """Our training of all slots from the base model on, their examples on the device already."""
    mesh = slot_mesh()
    over_slots = NamedSharding(mesh, PartitionSpec(AXIS))
    training = local_training(model, local, LocalRule(), mesh)
    begin, finished = jax.jit(training.begin), jax.jit(training.finish, donate_argnums=0)
    advance = jax.jit(training.advance, donate_argnums=1)
    parameters = jax.device_put((model.base, model.frozen), NamedSharding(mesh, PartitionSpec()))
    # Nothing is copied where it is on the devices already.
    downloads, examples = jax.device_put(
        (zero_vectors(model.base, len(position)), data), over_slots
    )

    def call() -> Trained:
        carry = advance(parameters, begin(downloads), downloads, position, examples)
        return finished(carry)

    return call


def _prepared(
    architecture: str, clients: int, steps: int, batch: int, dtype: Literal["float32", "bfloat16"]
) -> tuple:
    """The experiment, its model, and what both sides train on."""
    use_cores()
    config = experiment(architecture, clients, steps, batch, dtype, algorithm="fedavg")
    federation = federate(config)
    model = models.build_classifier(config.model, federation.tasks, seed=config.seed)
    rows = padded_rows(np.arange(clients), slot_mesh().size)
    task = federation.slots.task[rows]
    position = np.stack([np.zeros_like(rows), rows, task], axis=1).astype(np.int32)
    return config, federation, model, (round_data(config, federation, rows, 0), position)


def _ours(programs: str, parallel: int, *case: Any) -> Callable[[], Trained]:
    """Called once, so that its memory is measured without the compiler's."""
    keep_programs(programs)
    config, _, model, given = _prepared(*case)
    call = _trainer(model, dataclasses.replace(config.local, parallel_slots=parallel), *given)
    jax.block_until_ready(call())
    return call


def _theirs(threads: int, *case: Any) -> Callable[[], list[tuple]]:
    config, _, model, given = _prepared(*case)
    call = _peft(model, config, threads, *given)
    call()
    return call


def _peft(
    model: Classifier,
    config: Config,
    threads: int,
    data: Split,
    position: np.ndarray,
) -> Callable[[], list[tuple]]:
    client = PeftClient(model, config)
    start = client.start(model.base)
    clients = [
        (*client.tensors(images, labels), int(task), int(model.frozen["num_classes"][task]))
        for images, labels, (_, _, task) in zip(*data, position, strict=True)
    ][: config.data.clients]

    def call() -> list[tuple]:
        torch.set_num_threads(threads)
        return client.loop(start, clients)

    return call


def _number(word: str, everything: int) -> int:
    return everything if word == "all" else min(int(word), everything)


def _choices(config: Config, federation: Any, model: Model, wanted: list[str]) -> tuple[int, list]:
    """What is chosen by itself, and all numbers of slots at once that memory is predicted for."""
    mesh, algorithm = slot_mesh(), algorithms.build(config)
    everything = -(-config.data.clients // mesh.size)
    chosen = fitted(config, model, algorithm, federation, mesh).local.parallel_slots
    auto = slots_at_once(mesh, everything, chosen)
    numbers = {_number(word, everything) for word in wanted}
    there, fitting = memory_there(mesh.devices.flat[0]), [auto]
    for number in sorted(numbers - {auto}):
        local = dataclasses.replace(config.local, parallel_slots=number)
        tried = dataclasses.replace(config, local=local)
        parts = predicted_bytes(tried, model, algorithm, federation, mesh)
        if there and sum(parts.values()) > 0.9 * there * mesh.size:
            print(f"{number} slots at once: left out, they do not fit into memory")
        else:
            fitting.append(number)
    return auto, sorted(fitting)


def _row(
    case: tuple,
    repeats: int,
    wanted: list[str],
    matrix: int,
    threads: list[int],
    programs: str,
) -> dict[str, Any]:
    architecture, clients, steps, batch, dtype = case
    config, federation, model, given = _prepared(*case)
    auto, numbers = _choices(config, federation, model, wanted)
    resident = jax.device_put(given[0], NamedSharding(slot_mesh(), PartitionSpec(AXIS)))
    ours = {
        number: _trainer(
            model,
            dataclasses.replace(config.local, parallel_slots=number),
            resident,
            *given[1:],
        )
        for number in numbers
    }
    rivals = {f"rival {count}": _peft(model, config, count, *given) for count in threads}

    clock = time.perf_counter()
    trained = jax.block_until_ready(ours[auto]())
    first, theirs = time.perf_counter() - clock, rivals[f"rival {threads[0]}"]()
    losses = np.array([float(loss) for _, loss in theirs])
    np.testing.assert_allclose(np.asarray(trained.loss)[:clients], losses, rtol=LOSS[dtype])
    apart = max(
        compare(
            jax.tree.map(lambda x, row=row: x[row], trained.vectors),
            {name: x.float().cpu().numpy() for name, x in adapters.items()},
            model.base,
            TOLERANCE[dtype],
        )
        for row, (adapters, _) in enumerate(theirs)
    )

    multiply, operations = multiplier(matrix, dtype)
    times = interleaved(
        rivals | {"multiply": multiply} | {str(n): call for n, call in ours.items()}, repeats
    )
    fastest = min(threads, key=lambda count: times[f"rival {count}"].median)
    rate = (
        training_operations(ARCHITECTURES[architecture], config.model)
        * (clients * steps * batch)
        / times[str(auto)].median
    )
    grown = {}
    if on_cpu(slot_mesh()):  # elsewhere it is not the host's memory that counts
        grown["rival"] = peak_growth(_theirs, fastest, *case)
        grown["auto"] = peak_growth(_ours, programs, auto, *case)
        grown["all"] = peak_growth(_ours, programs, clients, *case)
    return _columns(
        {"model": architecture, "rival": "peft", "clients": clients, "steps": steps}
        | {"batch": batch, "dtype": dtype},
        times,
        times[f"rival {fastest}"].median,
        {word: _number(word, -(-clients // slot_mesh().size)) for word in wanted},
        auto,
        {"first call s": first, "difference": apart, "TFLOP/s": rate / 1e12}
        | {"of dense": rate / (operations / times["multiply"].median)},
        grown,
    )


def _columns(
    what: dict,
    times: dict[str, Timing],
    rival: float,
    numbers: dict[str, int],
    auto: int,
    more: dict,
    grown: dict,
) -> dict[str, Any]:
    """A row: `numbers` says how many slots at once each column's word stands for."""
    ours = {int(name): timing for name, timing in times.items() if name.isdigit()}
    chosen = ours[auto].median
    by_hand = {word: ours[n].median for word, n in numbers.items() if n in ours}
    return what | {
        "rival s": rival,
        "auto s": chosen,
        "x rival": rival / chosen,
        "auto is": auto,
        **{f"{word} s": by_hand.get(word) for word in numbers},
        "of best": min(timing.median for timing in ours.values()) / chosen,
        **{name: more.get(name) for name in ("first call s", "difference", "TFLOP/s", "of dense")},
        **{
            f"{name} MB": None if grown.get(name) is None else grown[name] / 1e6
            for name in ("rival", "auto", "all")
        },
    }


# ------------------------------------------------------------------ fedjax, a perceptron


def perceptron(inputs: int, hidden: int, classes: int) -> Classifier:
    """Two dense layers, as a model of this library; all of it trains."""
    rng = np.random.default_rng(0)

    def drawn(rows: int, columns: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=(rows, columns)) / rows**0.5, jnp.float32)

    base = {"hidden": drawn(inputs, hidden), "out": drawn(hidden, classes)}

    def features(params, frozen, images, key=None):
        flat = images.reshape(images.shape[0], -1).astype(jnp.float32) / 255
        return jax.nn.relu(flat @ params["hidden"])

    def logits(params, frozen, images, task, key=None):
        return features(params, frozen, images) @ params["out"]

    split = Split(np.zeros((1, 1, 1, 1), np.uint8), np.zeros(1, np.int32))
    names = tuple(map(str, range(classes)))
    task = ImageTask("drawn", split, split, split, class_names=names)
    return classifier(base, {}, [task], logits=logits, features=features)


def _fedjax(
    model: Classifier, local: LocalConfig, images: np.ndarray, labels: np.ndarray
) -> Callable:
    """The loop over clients that fedjax has; it yields each client's change and sum of losses."""
    import fedjax  # pyright: ignore[reportMissingImports]

    def loss(params, batch):
        logits = model.logits(params, {}, batch["x"], jnp.int32(0))
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["y"][:, None], axis=1)
        return -chosen.mean()

    def step(state, batch):
        value, gradient = jax.value_and_grad(loss)(state["params"], batch)
        params = jax.tree.map(lambda p, g: p - local.learning_rate * g, state["params"], gradient)
        return {"params": params, "loss": state["loss"] + value}

    def final(shared, state):
        return jax.tree.map(jnp.subtract, state["params"], shared), state["loss"]

    with fedjax.for_each_client_backend("jit"):
        over_clients = fedjax.for_each_client(
            lambda shared, _: {"params": shared, "loss": jnp.float32(0)}, step, final
        )
    clients = []
    for number, (inputs, targets) in enumerate(zip(images, labels, strict=True)):
        pairs = zip(jnp.asarray(inputs), jnp.asarray(targets), strict=True)
        clients.append((number, [{"x": x, "y": y} for x, y in pairs], None))
    return lambda: list(over_clients(model.base, clients))


def _fedjax_row(
    clients: int, steps: int, batch: int, repeats: int, wanted: list[str]
) -> dict[str, Any]:
    mesh, rng = slot_mesh(), np.random.default_rng(1)
    rows = padded_rows(np.arange(clients), mesh.size)
    model = perceptron(32 * 32 * 3, 128, 10)
    images = rng.integers(0, 256, (clients, steps, batch, 32, 32, 3), np.uint8)
    labels = rng.integers(0, 10, (clients, steps, batch)).astype(np.int32)
    local = LocalConfig(
        steps=steps, batch_examples=batch, optimizer="sgd", momentum=0.0, learning_rate=1e-2
    )
    position = np.stack([0 * rows, rows, 0 * rows], axis=1).astype(np.int32)
    given = Split(images[rows], labels[rows]), position
    everything = len(rows) // mesh.size
    auto = slots_at_once(mesh, everything)
    numbers = {word: _number(word, everything) for word in wanted}
    ours = {
        number: _trainer(model, dataclasses.replace(local, parallel_slots=number), *given)
        for number in sorted({*numbers.values(), auto})
    }
    rival = _fedjax(model, local, images, labels)
    clock, apart = time.perf_counter(), 0.0
    trained = jax.block_until_ready(ours[auto]())
    first = time.perf_counter() - clock
    for row, (number, (change, loss)) in enumerate(rival()):
        assert row == number
        np.testing.assert_allclose(trained.loss[row], loss / steps, rtol=1e-3)
        for name, leaf in change.items():
            found, expected = np.asarray(trained.vectors[name][row]), np.asarray(leaf)
            part = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
            if not part <= 1e-3:
                raise ValueError(f"what fedjax trained differs from ours by {part:.2g}.")
            apart = max(apart, part)
    times = interleaved({"rival": rival} | {str(n): call for n, call in ours.items()}, repeats)
    return _columns(
        {"model": "perceptron", "rival": "fedjax", "clients": clients, "steps": steps}
        | {"batch": batch, "dtype": "float32"},
        times,
        times["rival"].median,
        numbers,
        auto,
        {"first call s": first, "difference": apart},
        {},
    )


def main() -> None:
    parser = options(__doc__ or "", "bench_clients")
    parser.set_defaults(repeats=5)
    parser.add_argument("--architecture", default="small", help="small, or clip_vit_b32, ...")
    parser.add_argument("--clients", type=int, default=30)
    parser.add_argument("--steps", type=int, default=4, help="of each client")
    parser.add_argument("--batch", default="16", help="examples per step")
    parser.add_argument("--dtypes", default="float32")
    parser.add_argument("--rivals", default="peft,fedjax")
    parser.add_argument("--parallel", default="1,2,4,all", help="slots at once on a device")
    parser.add_argument("--matrix", type=int, default=0, help="rows of the dense product; 0 = auto")
    parser.add_argument(
        "--threads", default="1,all", help="of PyTorch on CPU; the fastest number counts"
    )
    given = parser.parse_args()
    use_cores()
    with tempfile.TemporaryDirectory() as programs:  # new, so that first calls here compile
        keep_programs(programs)
        _run(given, programs)


def _run(given: argparse.Namespace, programs: str) -> None:
    wanted, cores = given.parallel.split(","), len(os.sched_getaffinity(0))
    threads = sorted({_number(word, cores) for word in given.threads.split(",")})
    if torch.cuda.is_available():
        threads = threads[-1:]
    matrix = given.matrix or (1024 if jax.default_backend() == "cpu" else 8192)
    table, batches = [], [int(batch) for batch in given.batch.split(",")]
    for dtype in given.dtypes.split(",") if "peft" in given.rivals else ():
        for batch in batches:
            case = given.architecture, given.clients, given.steps, batch, dtype
            table.append(_row(case, given.repeats, wanted, matrix, threads, programs))
            finish("clients", table, given.out)
    if "fedjax" not in given.rivals:
        return
    if importlib.util.find_spec("fedjax") is None:
        print("fedjax: left out, it is not installed (pip install 'matu_jax[bench]')")
        return
    for batch in batches:
        sizes = given.clients, given.steps, batch
        table.append(_fedjax_row(*sizes, given.repeats, wanted))
    finish("clients", table, given.out)


if __name__ == "__main__":
    main()
