"""How fast a whole federated round is: against Flower's simulation, with the same model and data.

    python -m venv bench && bench/bin/pip install -e '.[bench,parity]'
    bench/bin/python experiments/bench/bench_round.py                                a few minutes

Flower is not a dependency of this package, and its extra goes into an environment of its own, since
it holds protobuf and rich at older versions. Its simulation runs clients in Ray's processes, as
many at once as there are cores, one thread each.

A round is FedAvg's on both sides: every client receives the adapters, trains them for some steps
(ours: `matu_jax.simulation.rounds.run`, as an experiment runs; Flower's: the PyTorch + PEFT client
that bench_clients.py measures, built once per process), and the server takes the mean, weighted by
examples. Neither evaluates. Both see the same batches in the same order, and the adapters after a
round are compared before anything is timed. "matu" is our round with this library's own algorithm,
which FedAvg's stands beside. "idle" is a round of Flower's whose clients give back what they
receive: what is spent between clients. Rounds of all four take turns.

"flower MB" is the memory of Flower's processes beside this one (shared pages divided among them),
"ours MB" the growth in a process that does everything from the data on, compilation included.
"""

import importlib.util
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import jax
import numpy as np
from peft_loop import PeftClient, compare, experiment, round_data
from timing import children_bytes, finish, interleaved, options, peak_growth

from matu_jax import algorithms, models
from matu_jax.config import Config
from matu_jax.data import image_tasks
from matu_jax.runs.processes import use_cores
from matu_jax.simulation import rounds
from matu_jax.simulation.federation import Federation, federate
from matu_jax.simulation.placement import slot_mesh
from matu_jax.trees import PyTree

Case = tuple[str, int, int, int]
TOLERANCE = 0.02


def _config(algorithm: str, case: Case) -> Config:
    return experiment(*case, algorithm=algorithm, rounds=10**6)


def _ours(algorithm: str, case: Case) -> Iterator[rounds.RoundResult]:
    """Rounds as an experiment runs them."""
    config = _config(algorithm, case)
    federation = federate(config)
    model = models.build_classifier(config.model, federation.tasks, seed=config.seed)
    return rounds.run(config, algorithms.build(config), model, federation, mesh=slot_mesh())


def _one_round(algorithm: str, case: Case) -> Callable[[], Any]:
    use_cores()
    return lambda: next(_ours(algorithm, case)).state


# ------------------------------------------------------------------ Flower

_BUILT: dict[Case, tuple] = {}


def _built(case: Case) -> tuple[Config, Federation, PyTree, PeftClient]:
    """What a client's process needs, made once."""
    if case not in _BUILT:
        config = _config("fedavg", case)
        federation = federate(config)
        model = models.build_classifier(config.model, federation.tasks, seed=config.seed)
        _BUILT[case] = config, federation, model.base, PeftClient(model, config)
    return _BUILT[case]


def train_client(case: Case, client: int, round_index: int, adapters: dict) -> tuple[dict, int]:
    """One client's round: adapters by name to adapters by name, and the number of examples."""
    import torch

    torch.set_num_threads(1)
    config, federation, _, trainer = _built(case)
    images, labels = round_data(config, federation, np.array([client]), round_index)
    task = int(federation.slots.task[client])
    trained, _ = trainer.train(
        {name: torch.from_numpy(x).to(trainer.device) for name, x in adapters.items()},
        *trainer.tensors(images[0], labels[0]),
        task,
        image_tasks(federation.tasks)[task].num_classes,
    )
    examples = int(federation.slots.weight[client])
    return {name: x.cpu().numpy() for name, x in trained.items()}, examples


def _client_app(case: Case) -> Any:
    from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict  # pyright: ignore
    from flwr.clientapp import ClientApp  # pyright: ignore[reportMissingImports]

    app = ClientApp()
    bench = str(Path(__file__).resolve().parent)

    @app.train()
    def train(message, context):
        if bench not in sys.path:  # a new process of Ray's
            sys.path.append(bench)
        from bench_round import train_client

        arrays = message.content["arrays"]
        adapters = {name: array.numpy() for name, array in arrays.items()}
        examples, index = 1, int(message.content["config"]["round-index"])
        if index >= 0:
            client = int(context.node_config["partition-id"])
            adapters, examples = train_client(case, client, index, adapters)
        content = RecordDict(
            {
                "arrays": ArrayRecord({name: Array(x) for name, x in adapters.items()}),
                "metrics": MetricRecord({"num-examples": examples}),
            }
        )
        return Message(content=content, reply_to=message)

    return app


class _FlowerRounds:
    """Rounds of Flower's FedAvg, one at a call, from inside its server."""

    def __init__(self, grid: Any, clients: int, adapters: dict[str, np.ndarray]):
        from flwr.app import Array, ArrayRecord  # pyright: ignore[reportMissingImports]
        from flwr.serverapp.strategy import FedAvg  # pyright: ignore[reportMissingImports]

        self.strategy = FedAvg(
            fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients
        )
        self.grid, self.index = grid, 0
        self.arrays = ArrayRecord({name: Array(x) for name, x in adapters.items()})

    def __call__(self, *, idle: bool = False) -> dict[str, np.ndarray]:
        from flwr.app import ConfigRecord  # pyright: ignore[reportMissingImports]

        config = ConfigRecord({"round-index": -1 if idle else self.index})
        messages = self.strategy.configure_train(self.index + 1, self.arrays, config, self.grid)
        replies = list(self.grid.send_and_receive(messages))
        wrong = [reply.error.reason for reply in replies if reply.has_error()]
        if wrong:
            raise RuntimeError(f"Flower: {len(wrong)} of {len(replies)} clients failed: {wrong[0]}")
        arrays, _ = self.strategy.aggregate_train(self.index + 1, replies)
        assert arrays is not None
        if not idle:
            self.index, self.arrays = self.index + 1, arrays
        return {name: array.numpy() for name, array in arrays.items()}


def _measured(case: Case, repeats: int) -> dict[str, Any]:
    from flwr.serverapp import ServerApp  # pyright: ignore[reportMissingImports]
    from flwr.simulation import run_simulation  # pyright: ignore[reportMissingImports]

    _, clients, _, _ = case
    _, _, base, trainer = _built(case)
    start = {name: x.cpu().numpy() for name, x in trainer.start(base).items()}
    found: dict[str, Any] = {}
    server = ServerApp()

    @server.main()
    def main(grid, context):
        logging.getLogger("flwr").setLevel(logging.ERROR)
        flower = _FlowerRounds(grid, clients, start)
        clock = time.perf_counter()
        theirs = flower()
        found["first"] = time.perf_counter() - clock
        state = next(_ours("fedavg", case)).state
        vector = jax.tree.map(lambda x: np.asarray(x).reshape(x.shape[-3:]), state)
        found["difference"] = compare(vector, theirs, base, TOLERANCE)
        fedavg, matu = _ours("fedavg", case), _ours("matu", case)
        found["times"] = interleaved(
            {
                "fedavg": lambda: next(fedavg).state,
                "matu": lambda: next(matu).state,
                "flower": flower,
                "idle": lambda: flower(idle=True),
            },
            repeats,
        )
        found["memory"] = children_bytes()

    cores = len(os.sched_getaffinity(0))
    run_simulation(
        server,
        _client_app(case),
        num_supernodes=clients,
        backend_config={
            "client_resources": {"num_cpus": 1},
            "init_args": {"num_cpus": cores, "include_dashboard": False},
        },
    )
    return found


def main() -> None:
    parser = options(__doc__ or "", "bench_round")
    parser.set_defaults(repeats=5)
    parser.add_argument("--architecture", default="small", help="small, or clip_vit_b32, ...")
    parser.add_argument("--clients", default="10,30")
    parser.add_argument("--steps", type=int, default=4, help="of each client")
    parser.add_argument("--batch", type=int, default=16, help="examples per step")
    given = parser.parse_args()
    for module in ("flwr", "ray"):
        if importlib.util.find_spec(module) is None:
            raise SystemExit(
                f"{module} is not installed. In an environment of its own:\n"
                "    pip install 'matu_jax[bench,parity]'"
            )
    use_cores()
    table = []
    for clients in map(int, given.clients.split(",")):
        case = given.architecture, clients, given.steps, given.batch
        found = _measured(case, given.repeats)
        times = found["times"]
        ours = peak_growth(_one_round, "fedavg", case)
        table.append(
            {
                "model": given.architecture,
                "clients": clients,
                "steps": given.steps,
                "batch": given.batch,
                "flower s": times["flower"].median,
                "idle s": times["idle"].median,
                "fedavg s": times["fedavg"].median,
                "matu s": times["matu"].median,
                "x flower": times["flower"].median / times["fedavg"].median,
                "flower first s": found["first"],
                "first s": times["fedavg"].first,
                "idle ms a client": 1e3 * times["idle"].median / clients,
                "difference": found["difference"],
                "flower MB": None if found["memory"] is None else found["memory"] / 1e6,
                "ours MB": None if ours is None else ours / 1e6,
            }
        )
        finish("rounds", table, given.out)


if __name__ == "__main__":
    main()
