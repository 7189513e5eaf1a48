"""A simulated federation of one's own tasks and model, without files."""

from collections.abc import Iterable, Iterator

from jax.sharding import Mesh

from matu_jax import fields
from matu_jax.data import Task
from matu_jax.data.choices import DataConfig
from matu_jax.models import Model
from matu_jax.models.checks import check_model
from matu_jax.models.choices import ModelConfig
from matu_jax.simulation.choices import SimulationConfig
from matu_jax.simulation.federation import algorithm_for, dealt_out
from matu_jax.simulation.rounds import RoundResult, run


def simulate(
    tasks: Iterable[Task], model: Model, config: SimulationConfig, *, mesh: Mesh | None = None
) -> Iterator[RoundResult]:
    """Simulates a federation, round by round.

    Args:
      tasks: with their data; all of one form.
      model: whose loss and outputs take batches of that form.
      config: algorithm, rounds, local training, and how the tasks are dealt out to clients: `data`
        without `tasks`, `source`, `folders`, `sites`, `manifest` and `validation_fraction`, and all
        without `model`, which must be left as they are by default.
      mesh: the devices, along one axis, "slots"; all, if None.

    Yields:
      One `RoundResult` per round: its `record` holds each metric by name, its `vectors` are every
      slot's task vectors.

    Raises:
      ValueError: at once, for a field that is out of range or not looked at, tasks that cannot be
        dealt out, a model that breaks its contract, or an algorithm that cannot be built; in the
        first round, for a metric's value or an algorithm that breaks its contract.
      StoppedError: in the round in which the training of too many slots fails.

    Example:
      >>> import jax.numpy as jnp, matu_jax, numpy as np
      >>> from matu_jax.config import DataConfig, LocalConfig, SimulationConfig
      >>> from matu_jax.models import Model, metrics
      >>> rng = np.random.default_rng(0)
      >>> def split(slope):
      ...     x = rng.normal(size=64).astype(np.float32)
      ...     return {"x": x, "y": slope * x}
      >>> def outputs(params, frozen, batch, task, key=None):
      ...     return params["slope"] * batch["x"]
      >>> def loss(params, frozen, batch, task, key=None):
      ...     return jnp.square(outputs(params, frozen, batch, task) - batch["y"]).mean()
      >>> r2 = metrics.r2(lambda outputs, batch: (outputs, batch["y"]))
      >>> model = Model({"slope": jnp.zeros(1)}, {}, loss, outputs, {"r2": r2})
      >>> tasks = [matu_jax.Task(str(s), split(s), split(s), split(s)) for s in (-1.0, 2.0, 3.0)]
      >>> config = SimulationConfig(
      ...     algorithm="per_task",
      ...     rounds=5,
      ...     data=DataConfig(clients=3),
      ...     local=LocalConfig(steps=50, learning_rate=0.03),
      ... )
      >>> last = list(matu_jax.simulate(tasks, model, config))[-1]
      >>> round(last.record["r2"]["test_mean"], 1)
      1.0
    """
    if not isinstance(config, SimulationConfig):
        raise ValueError(
            f"config: found {type(config).__name__}, expected a SimulationConfig(...)."
        )
    if not isinstance(tasks, Iterable):
        raise ValueError(f"tasks: found {type(tasks).__name__}, expected some matu_jax.Task.")
    if mesh is not None and mesh.axis_names != ("slots",):
        raise ValueError(f"mesh: found the axes {mesh.axis_names}, expected one, 'slots'.")
    config, tasks = fields.checked(config, "config"), tuple(tasks)
    ignored = {"config.model": (config.model, ModelConfig())}
    for name in fields.kinds(type(config)).keys() - fields.kinds(SimulationConfig).keys():
        ignored[f"config.{name}"] = getattr(config, name), getattr(type(config)(), name)
    for name in ("tasks", "source", "folders", "sites", "manifest", "validation_fraction"):
        default = getattr(DataConfig(), name)
        ignored[f"config.data.{name}"] = getattr(config.data, name), default
    for name, (found, default) in ignored.items():
        if found != default:
            raise ValueError(
                f"{name}: found {found!r}, but simulate takes tasks and model themselves, and "
                f"writes no files; leave it as it is by default, {default!r}."
            )
    federation = dealt_out(config, tasks)
    check_model(model, tasks)
    return run(config, algorithm_for(config, model), model, federation, mesh=mesh)
