"""The schema of an experiment: frozen dataclasses, with units in the names.

An experiment file starts from `default()`, a locked `ConfigDict` that refuses unknown fields, and
edits it. `freeze()` checks every field and returns the hashable `Config` that the package works
with; whatever is wrong is said in one message.
"""

import ast
import dataclasses
from collections.abc import Mapping
from typing import Any, cast

from ml_collections import ConfigDict

from matu_jax.errors import did_you_mean


def _field(default: Any, **checks: Any) -> Any:
    """A dataclass field with checks: at_least, above, at_most, choices."""
    return dataclasses.field(default=default, metadata=checks)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which tasks there are, who holds them, and how much of them.

    Attributes:
      tasks: a set ("embedded8" or "embedded30", the benchmark that comes with the package;
        "vision8", "tfds30" or "emr30", real datasets), or names separated by commas: all of tasks
        of the embedded benchmark, or all of datasets of `matu_jax.data.datasets` and of folders in
        `folders`; "folders" is all of the latter. "" = "folders" where `folders` is given, else
        "embedded8".
      source: where the images of real datasets come from: "prepared" (what `python -m
        matu_jax.prepare` has put into the cache) or "synthetic" (generated stand-ins with the same
        names, classes and sizes, to try an experiment without its data).
      folders: directory with one image folder per task, each `<task>/train/<class>/<image>` and
        `<task>/test/<class>/<image>`: of images of one's own, which need nothing else, and of
        datasets that are not in TFDS or shall not come from there; "" = `$MATU_JAX_FOLDERS`, or
        `folders` in the cache directory.
      validation_fraction: part of the training split that is held out for validation; of no
        account for image folders that bring a validation split, as `val`.
      clients: number of clients.
      tasks_per_client: how many different tasks each client holds.
      assignment: task positions per client, as a tuple of tuples; empty = drawn from the seed.
      examples_per_slot: training examples of each (client, task) pair; 0 = split all there are.
      dirichlet_alpha: label skew between the holders of a task; 0 = none (IID).
      seed: what the assignment and the partition are drawn from.
    """

    tasks: str = ""
    source: str = _field("prepared", choices=("prepared", "synthetic"))
    folders: str = ""
    validation_fraction: float = _field(0.1, above=0, at_most=0.5)
    clients: int = _field(12, at_least=1)
    tasks_per_client: int = _field(2, at_least=1)
    assignment: tuple = ()
    examples_per_slot: int = _field(0, at_least=0)
    dirichlet_alpha: float = _field(0.0, at_least=0)
    seed: int = _field(0, at_least=0, at_most=2**31 - 1)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What is fine-tuned.

    Attributes:
      architecture: "embedded" (the small transformer of the embedded benchmark); "clip" or "vit"
        (a CLIP or plain vision transformer of any size, which is read from the checkpoint's
        config.json); or one of `matu_jax.models.architectures.ARCHITECTURES`, such as
        "clip_vit_b32", which the checkpoint must then agree with.
      checkpoint: "embedded" (the backbone that comes with the package), "random", or, for
        architecture "embedded", the path of a safetensors file that
        experiments/pretrain_backbone.py wrote; for the others a Hugging Face hub name, such as
        "openai/clip-vit-base-patch32" (with "@revision" for another than the main one), or a local
        folder with the same files.
      trainable: "lora" (adapters over a frozen backbone) or "full" (every parameter of the image
        tower).
      lora_rank: rank of the adapters.
      lora_alpha: adapters are scaled by lora_alpha / lora_rank.
      lora_targets: projections that carry one: query, key, value, out, mlp_in, mlp_out.
      lora_dropout: probability with which an adapter's inputs are zeroed in training.
      head: "frozen" (label vectors compared by cosine: the backbone's own in the embedded
        benchmark, class names and prompts through CLIP's text tower otherwise) or "trained" (a
        linear head per task, averaged among its holders), which images of one's own need where
        there is no text tower.
      task_heads: exceptions to `head`, as pairs such as (("svhn", "trained"),).
      logit_scale: what the cosines of a frozen head are multiplied by; 0 = the checkpoint's own.
      compute_dtype: of activations and matrix products; "float32" or "bfloat16". What trains
        stays float32.
      remat: whether a layer's activations are computed again in the backward pass instead of kept:
        about a third more time, a fraction of the memory.
    """

    architecture: str = "embedded"
    checkpoint: str = "embedded"
    trainable: str = _field("lora", choices=("lora", "full"))
    lora_rank: int = _field(8, at_least=1)
    lora_alpha: float = _field(16.0, above=0)
    lora_targets: tuple = ("query", "key", "value", "out")
    lora_dropout: float = _field(0.0, at_least=0, at_most=0.9)
    head: str = _field("frozen", choices=("frozen", "trained"))
    task_heads: tuple = ()
    logit_scale: float = _field(20.0, at_least=0)
    compute_dtype: str = _field("float32", choices=("float32", "bfloat16"))
    remat: bool = False

    @property
    def trains_heads(self) -> bool:
        """Whether parameters are `{"shared": ..., "head": ...}`: some task may train its head."""
        return self.head == "trained" or any("trained" in pair for pair in self.task_heads)


@dataclasses.dataclass(frozen=True)
class LocalConfig:
    """A client's training in one round.

    Attributes:
      steps: optimiser steps per slot and round.
      batch_examples: examples per step.
      optimizer: "adam", "adamw" or "sgd"; its state starts afresh every round.
      learning_rate: step size.
      momentum: of sgd.
      weight_decay: of adamw; task vectors decay, that is, parameters towards the base.
      parallel_slots: slots trained at once on a device; 0 = by platform: 1 on CPU, where one slot
        after the other is faster; on accelerators as many as memory is predicted to allow.
    """

    steps: int = _field(20, at_least=1)
    batch_examples: int = _field(16, at_least=1)
    optimizer: str = _field("adam", choices=("adam", "adamw", "sgd"))
    learning_rate: float = _field(3e-3, above=0)
    momentum: float = _field(0.9, at_least=0, at_most=1)
    weight_decay: float = _field(0.0, at_least=0)
    parallel_slots: int = _field(0, at_least=0)


@dataclasses.dataclass(frozen=True)
class MatuConfig:
    """MaTU's choices: those of `matu_jax.AggregationConfig`, downloads and precision.

    (Its defences are in DefenceConfig.)

    The defaults follow experiments/results/ablation8; those of `AggregationConfig` are the paper's
    equations as this project reads them: magnitude "max", agreement_threshold 0.4, uploads
    "vector", transfer "none".

    Attributes:
      magnitude: eq. 2, on clients and server: "max" or "mean".
      agreement_threshold: rho of eq. 5; 0 turns the gate off.
      top_k: kappa of eq. 8.
      min_similarity: epsilon of eq. 8.
      transfer: eq. 8's rule: "none", "mean", "additive" or "shrinkage".
      similarity: what eq. 7 compares.
      uploads: what clients fold and send: "vector" (their task vectors) or "change" (what the round
        has added to them).
      downloads: what a client receives: "unified", one vector with a mask and a scale per task, or
        "task_vectors", those of its tasks as they are, each a unified of its own: nothing is lost
        by folding, and k tasks take k vectors. In int8 those are less traffic than one unified
        vector in float32 up to four tasks. Needs uploads = "change".
      precision: how vectors cross the network, up and down: "float32", "bfloat16", or "int8" with a
        float32 scale for 256 parameters (`matu_jax.messages.quantisation`).
    """

    magnitude: str = _field("mean", choices=("max", "mean"))
    agreement_threshold: float = _field(0.0, at_least=0, at_most=1)
    top_k: int = _field(3, at_least=0)
    min_similarity: float = _field(0.5, at_least=0, at_most=1)
    transfer: str = _field("shrinkage", choices=("none", "mean", "additive", "shrinkage"))
    similarity: str = _field("cross_client", choices=("cross_client", "aggregated"))
    uploads: str = _field("change", choices=("vector", "change"))
    downloads: str = _field("unified", choices=("unified", "task_vectors"))
    precision: str = _field("float32", choices=("float32", "bfloat16", "int8"))


@dataclasses.dataclass(frozen=True)
class DefenceConfig:
    """How the server bounds what single clients can do; see `matu_jax.AggregationConfig`.

    The means over clients of the other algorithms follow the same three rules, of changes and with
    clients instead of slots where a client sends one vector; algorithms without such a mean have no
    defences and refuse other values than these.

    The defaults follow experiments/results/attacks4 and defence8.

    Attributes:
      clip: no upload counts for more than this many times the median length; 0 = off.
      trim: how many of the largest and smallest numbers of a mean are left out; 0 = off.
      weighting: "examples", or "agreement": less of them for those whose direction agrees little
        with the others', where there are five or more to compare; "examples" where trim is on.
    """

    clip: float = _field(1.5, at_least=0)
    trim: int = _field(0, at_least=0)
    weighting: str = _field("agreement", choices=("examples", "agreement"))


NO_DEFENCE = DefenceConfig(clip=0.0, weighting="examples")


@dataclasses.dataclass(frozen=True)
class FailureConfig:
    """Clients that vanish, and when there are too few of them.

    Attributes:
      dropout: probability that a client that takes part in a round sends nothing.
      trace: a CSV file with the columns round (from 1), client and reason: who sends nothing when;
        "" = none.
      slowness: standard deviation of the logarithm of a client's time for a round, relative to the
        typical time; drawn anew for every round.
      deadline: who needs longer than this many typical times is too late; 0 = no deadline.
      quorum: holders of a task whose uploads a round needs to change the task; with fewer it keeps
        its vector.
      max_nonfinite_share: the run stops, with a message, where training fails (the loss or a
        parameter is not a finite number) in a larger share of a round's slots.
    """

    dropout: float = _field(0.0, at_least=0, at_most=1)
    trace: str = ""
    slowness: float = _field(0.0, at_least=0)
    deadline: float = _field(0.0, at_least=0)
    quorum: int = _field(1, at_least=1)
    max_nonfinite_share: float = _field(0.5, at_least=0, at_most=1)


@dataclasses.dataclass(frozen=True)
class AttackConfig:
    """Clients that lie, to find out what they can do.

    `matu_jax.scenarios.attacks` says what each kind does.

    Attributes:
      kind: "none", "sign_flip", "scaling", "noise", "constant", "label_flip", "masks", "scales",
        "hidden" or "garbage".
      share: of every task's holders at most this part lies, and as many as that allows.
      strength: how many times longer than an honest one a lie is.
      colludes: whether the liars of a task agree on one lie, made from the mean of what they
        trained.
    """

    kind: str = _field(
        "none",
        choices=(
            "none",
            "sign_flip",
            "scaling",
            "noise",
            "constant",
            "label_flip",
            "masks",
            "scales",
            "hidden",
            "garbage",
        ),
    )
    share: float = _field(0.2, at_least=0, at_most=1)
    strength: float = _field(1.0, above=0)
    colludes: bool = False


@dataclasses.dataclass(frozen=True)
class PrivacyConfig:
    """Differential privacy of clients towards the server, see `matu_jax.scenarios.privacy`.

    Attributes:
      clip_norm: what a client has changed in a round, over all its tasks, is scaled down to this
        Euclidean length; 0 = no privacy.
      noise_multiplier: standard deviation of the Gaussian noise on every number, in clip_norms.
      delta: of (epsilon, delta).
      seed: -1 = noise from the operating system's entropy, which nobody can draw again; from 0 on,
        noise is drawn from this seed, so that a run can be repeated, and nothing is private.
    """

    clip_norm: float = _field(0.0, at_least=0)
    noise_multiplier: float = _field(0.0, at_least=0)
    delta: float = _field(1e-5, above=0, at_most=0.5)
    seed: int = _field(-1, at_least=-1, at_most=2**31 - 1)


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """When accuracy is measured.

    Attributes:
      every_rounds: rounds between evaluations; the last round is always evaluated.
      batch_examples: examples per forward pass.
      max_examples: of each task's validation and test split, drawn from the seed; 0 = all.
    """

    every_rounds: int = _field(1, at_least=1)
    batch_examples: int = _field(128, at_least=1)
    max_examples: int = _field(0, at_least=0)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When a run is saved.

    Attributes:
      every_rounds: rounds between checkpoints; the last round is always saved, and so is one that
        is better on validation than all before, of which the run's results and exports speak.
      keep: how many checkpoints stay on disk, the newest; besides them, that of the best round.
    """

    every_rounds: int = _field(1, at_least=1)
    keep: int = _field(2, at_least=1)


@dataclasses.dataclass(frozen=True)
class Config:
    """One experiment.

    Attributes:
      algorithm: a name in `matu_jax.algorithms.ALGORITHMS`.
      seed: everything random in training is drawn from it.
      rounds: communication rounds.
      clients_per_round: clients that take part in a round, drawn anew each time; 0 = all.
      fedprox_mu: weight of FedProx's proximal term; the other algorithms have none.
      personal_blocks: how many of the last transformer blocks' parameters FedPer and FedRep keep at
        their slot.
      fedrep_personal_fraction: part of a round's steps in which FedRep trains what is personal;
        in the others, at least one, it trains what is shared. Its authors' scripts
        give the head 10 of 15 epochs on most of their datasets.
      matfl_grouping: MaT-FL's weights: "soft" (by similarity) or "hard" (by groups).
      matfl_threshold: added to the cosine of two deviations; a sum above 0 makes them share.
      ties_keep: part of a vector's entries, the largest, that TIES keeps.
      lora_b_trains_a: whether Fed-LoRA-B trains A too, as a personal part, or freezes it.
      data: see DataConfig.
      model: see ModelConfig.
      local: see LocalConfig.
      matu: see MatuConfig.
      defence: see DefenceConfig.
      failures: see FailureConfig.
      attack: see AttackConfig.
      privacy: see PrivacyConfig.
      evaluation: see EvaluationConfig.
      checkpoint: see CheckpointConfig.
    """

    algorithm: str = "matu"
    seed: int = _field(0, at_least=0, at_most=2**31 - 1)
    rounds: int = _field(10, at_least=1)
    clients_per_round: int = _field(0, at_least=0)
    fedprox_mu: float = _field(0.01, at_least=0)
    personal_blocks: int = _field(1, at_least=1)
    fedrep_personal_fraction: float = _field(2 / 3, above=0, at_most=1)
    matfl_grouping: str = _field("soft", choices=("soft", "hard"))
    matfl_threshold: float = _field(0.0, at_least=-1, at_most=1)
    ties_keep: float = _field(0.2, above=0, at_most=1)
    lora_b_trains_a: bool = False
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    local: LocalConfig = dataclasses.field(default_factory=LocalConfig)
    matu: MatuConfig = dataclasses.field(default_factory=MatuConfig)
    defence: DefenceConfig = dataclasses.field(default_factory=DefenceConfig)
    failures: FailureConfig = dataclasses.field(default_factory=FailureConfig)
    attack: AttackConfig = dataclasses.field(default_factory=AttackConfig)
    privacy: PrivacyConfig = dataclasses.field(default_factory=PrivacyConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)


def default() -> ConfigDict:
    """The default experiment as a locked ConfigDict: fields can be changed, not added."""
    return ConfigDict(dataclasses.asdict(Config())).lock()


def override(config: ConfigDict, path: str, text: str) -> None:
    """Sets one field from the command line, in place.

    Args:
      config: what `default()` made, perhaps edited.
      path: the field, such as "local.steps"; "data" is short for "data.source".
      text: its value: a number, a string, or a tuple such as (1, 2) or ("query", "value").

    Raises:
      ValueError: for an unknown field (with "did you mean"), or a value of the wrong type.
    """
    where, parent, name = _find(config, path)
    try:
        value = text if isinstance(parent[name], str) else ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    _set(where, parent, name, value, text)


def set_field(config: ConfigDict, path: str, value: Any) -> None:
    """Sets one field by its path, such as "local.steps", in place.

    Raises:
      ValueError: for an unknown field (with "did you mean"), or a value of the wrong type.
    """
    _set(*_find(config, path), value, value)


def _find(config: ConfigDict, path: str) -> tuple[str, Any, str]:
    """Where a field is: its full name, the block that holds it, and its name in there."""
    names = path.split(".")
    where, parent, block = "config", cast(Any, None), cast(Any, config)
    for name in names:
        if not isinstance(block, ConfigDict):
            raise ValueError(f"{where}: is a value, not a block of fields; found {path!r}.")
        if name not in block:
            raise ValueError(f"{where}.{name}: no such field.{did_you_mean(name, list(block))}")
        where, parent, block = f"{where}.{name}", block, block[name]
    if isinstance(block, ConfigDict) and "source" in block:
        return f"{where}.source", block, "source"
    if isinstance(block, ConfigDict):
        raise ValueError(
            f"{where}: is a block of fields; set one of {', '.join(list(cast(Any, block)))}."
        )
    return where, parent, names[-1]


def _set(where: str, parent: Any, name: str, value: Any, found: Any) -> None:
    kind: Any = type(parent[name])
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind is tuple and isinstance(value, list):
        value = tuple(value)
    if type(value) is not kind:
        raise ValueError(f"{where}: found {found!r}, expected {kind.__name__}.")
    parent[name] = value


def freeze(config: ConfigDict | Mapping[str, Any]) -> Config:
    """Checks a ConfigDict, or what JSON has kept of one, against the schema and makes it immutable.

    Raises:
      ValueError: one message that lists every unknown field (with "did you mean"), missing field,
        wrong type and value out of range.
    """
    problems: list[str] = []
    frozen = _freeze(Config, config, "config", problems)
    if not problems:
        problems += _cross_checks(frozen)
    if problems:
        raise ValueError("\n".join(problems))
    return frozen


def _freeze(schema: type, values: Any, path: str, problems: list[str]) -> Any:
    if not isinstance(values, (Mapping, ConfigDict)):
        problems.append(f"{path}: found {values!r}, expected a block of fields.")
        return None
    fields = {field.name: field for field in dataclasses.fields(schema)}
    for name in values:
        if name not in fields:
            problems.append(f"{path}.{name}: no such field.{did_you_mean(name, fields)}")
    checked = {}
    for name, field in fields.items():
        where = f"{path}.{name}"
        if name not in values:
            problems.append(f"{where}: missing. Edit fields; do not replace the whole block.")
        elif dataclasses.is_dataclass(field.type):
            checked[name] = _freeze(field.type, values[name], where, problems)  # type: ignore
        else:
            checked[name] = _check(field, values[name], where, problems)
    return None if problems else schema(**checked)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value


def _check(field: dataclasses.Field, value: Any, where: str, problems: list[str]) -> Any:
    kind: Any = field.type
    value = _tuples(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        problems.append(
            f"{where}: found {value!r} ({type(value).__name__}), expected {kind.__name__}."
        )
        return value
    checks = field.metadata
    if "choices" in checks and value not in checks["choices"]:
        hint = did_you_mean(str(value), checks["choices"])
        problems.append(f"{where}: found {value!r}, an unknown choice.{hint}")
    for bound, holds, words in (
        ("at_least", lambda x, b: x >= b, "at least"),
        ("above", lambda x, b: x > b, "more than"),
        ("at_most", lambda x, b: x <= b, "at most"),
    ):
        if bound in checks and not (holds(value, checks[bound]) and value < float("inf")):
            problems.append(f"{where}: found {value}, expected {words} {checks[bound]}.")
    return value


def _cross_checks(config: Config) -> list[str]:
    problems = []
    if config.defence.trim and config.defence.weighting != "examples":
        problems.append(
            f"config.defence.trim: found {config.defence.trim}, which counts all holders the same, "
            "beside weighting = 'agreement'; for a trimmed mean set config.defence.weighting = "
            "'examples'."
        )
    if config.failures.deadline and not config.failures.slowness:
        problems.append(
            f"config.failures.deadline: found {config.failures.deadline}, but nobody is slow: set "
            "config.failures.slowness too."
        )
    attack = config.attack
    if attack.colludes and attack.kind in ("none", "label_flip", "masks", "scales", "hidden"):
        problems.append(
            f"config.attack.colludes: found True, but of kind {attack.kind!r} liars say the same "
            "anyway, or nothing; leave it False."
        )
    if attack.strength != 1.0 and attack.kind in ("none", "label_flip", "masks", "garbage"):
        problems.append(
            f"config.attack.strength: found {attack.strength:g}, but kind {attack.kind!r} has no "
            "strength; leave it 1."
        )
    if config.failures.slowness and not config.failures.deadline:
        problems.append(
            f"config.failures.slowness: found {config.failures.slowness}, but nothing waits: set "
            "config.failures.deadline too."
        )
    if bool(config.privacy.clip_norm) != bool(config.privacy.noise_multiplier):
        problems.append(
            f"config.privacy: found clip_norm = {config.privacy.clip_norm} and noise_multiplier = "
            f"{config.privacy.noise_multiplier}; privacy needs both, or neither."
        )
    if config.privacy.clip_norm and not 1e-30 <= config.privacy.clip_norm <= 1e30:
        problems.append(
            f"config.privacy.clip_norm: found {config.privacy.clip_norm:g}, expected 1e-30 to 1e30."
        )
    if config.clients_per_round > config.data.clients:
        problems.append(
            f"config.clients_per_round: found {config.clients_per_round}, expected at most "
            f"config.data.clients = {config.data.clients} (0 = all)."
        )
    for client, held in enumerate(config.data.assignment):
        if not isinstance(held, tuple) or not all(type(task) is int for task in held):
            problems.append(
                f"config.data.assignment: client {client}: found {held!r}, expected a tuple of "
                "task positions, such as ((0, 1), (2,))."
            )
    return problems
