"""The schema of an experiment: frozen dataclasses, with units in the names.

An experiment file's `get_config()` returns a `Config`, which says only what differs from the
defaults: `Config(rounds=10, data=DataConfig(clients=12), local=LocalConfig(steps=20))`.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

from matu_jax import fields
from matu_jax.aggregation.choices import NO_DEFENCE, DefenceConfig
from matu_jax.algorithms import AlgorithmConfig
from matu_jax.algorithms.fed_lora_b import FedLoraBConfig
from matu_jax.algorithms.fedper import FedPerConfig
from matu_jax.algorithms.fedprox import FedProxConfig
from matu_jax.algorithms.fedrep import FedRepConfig
from matu_jax.algorithms.matfl import MatFLConfig
from matu_jax.algorithms.matu import MatuConfig
from matu_jax.algorithms.ties import TiesConfig
from matu_jax.fields import field

__all__ = [
    "NO_DEFENCE",
    "RENAMED",
    "AttackConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "DefenceConfig",
    "EvaluationConfig",
    "FailureConfig",
    "FedLoraBConfig",
    "FedPerConfig",
    "FedProxConfig",
    "FedRepConfig",
    "LocalConfig",
    "MatFLConfig",
    "MatuConfig",
    "ModelConfig",
    "PrivacyConfig",
    "TiesConfig",
    "renamed",
    "renaming",
    "upgraded",
]

# Fields of earlier versions, and what they are now.
RENAMED = {
    "fedprox_mu": ("fedprox.mu",),
    "personal_blocks": ("fedper.personal_blocks", "fedrep.personal_blocks"),
    "fedrep_personal_fraction": ("fedrep.personal_fraction",),
    "matfl_grouping": ("matfl.grouping",),
    "matfl_threshold": ("matfl.threshold",),
    "ties_keep": ("ties.keep",),
    "lora_b_trains_a": ("fed_lora_b.trains_a",),
}


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
    source: Literal["prepared", "synthetic"] = "prepared"
    folders: str = ""
    validation_fraction: float = field(0.1, above=0, at_most=0.5)
    clients: int = field(12, at_least=1)
    tasks_per_client: int = field(2, at_least=1)
    assignment: tuple[tuple[int, ...], ...] = ()
    examples_per_slot: int = field(0, at_least=0)
    dirichlet_alpha: float = field(0.0, at_least=0)
    seed: int = field(0, at_least=0, at_most=2**31 - 1)

    def conflicts(self, where: str) -> Iterator[str]:
        """Yields what is wrong with the assignment, whose form has more to it than a type."""
        for client, held in enumerate(self.assignment):
            if not isinstance(held, tuple) or not all(type(task) is int for task in held):
                yield (
                    f"{where}.assignment: client {client}: found {held!r}, expected a tuple of "
                    "task positions, such as ((0, 1), (2,))."
                )


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
    trainable: Literal["lora", "full"] = "lora"
    lora_rank: int = field(8, at_least=1)
    lora_alpha: float = field(16.0, above=0)
    lora_targets: tuple[str, ...] = ("query", "key", "value", "out")
    lora_dropout: float = field(0.0, at_least=0, at_most=0.9)
    head: Literal["frozen", "trained"] = "frozen"
    task_heads: tuple[tuple[str, str], ...] = ()
    logit_scale: float = field(20.0, at_least=0)
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
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

    steps: int = field(20, at_least=1)
    batch_examples: int = field(16, at_least=1)
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    learning_rate: float = field(3e-3, above=0)
    momentum: float = field(0.9, at_least=0, at_most=1)
    weight_decay: float = field(0.0, at_least=0)
    parallel_slots: int = field(0, at_least=0)


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

    dropout: float = field(0.0, at_least=0, at_most=1)
    trace: str = ""
    slowness: float = field(0.0, at_least=0)
    deadline: float = field(0.0, at_least=0)
    quorum: int = field(1, at_least=1)
    max_nonfinite_share: float = field(0.5, at_least=0, at_most=1)

    def conflicts(self, where: str) -> Iterator[str]:
        """Yields what is wrong where one field is without effect for want of another."""
        if self.deadline and not self.slowness:
            yield (
                f"{where}.deadline: found {self.deadline}, but nobody is slow: set "
                f"{where}.slowness too."
            )
        if self.slowness and not self.deadline:
            yield (
                f"{where}.slowness: found {self.slowness}, but nothing waits: set "
                f"{where}.deadline too."
            )


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

    kind: Literal[
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
    ] = "none"
    share: float = field(0.2, at_least=0, at_most=1)
    strength: float = field(1.0, above=0)
    colludes: bool = False

    def conflicts(self, where: str) -> Iterator[str]:
        """Yields the fields that the kind of attack has no use for."""
        if self.colludes and self.kind in ("none", "label_flip", "masks", "scales", "hidden"):
            yield (
                f"{where}.colludes: found True, but of kind {self.kind!r} liars say the same "
                "anyway, or nothing; leave it False."
            )
        if self.strength != 1.0 and self.kind in ("none", "label_flip", "masks", "garbage"):
            yield (
                f"{where}.strength: found {self.strength:g}, but kind {self.kind!r} has no "
                "strength; leave it 1."
            )


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

    clip_norm: float = field(0.0, at_least=0)
    noise_multiplier: float = field(0.0, at_least=0)
    delta: float = field(1e-5, above=0, at_most=0.5)
    seed: int = field(-1, at_least=-1, at_most=2**31 - 1)

    def conflicts(self, where: str) -> Iterator[str]:
        """Yields what is wrong where half of a mechanism is given, or one beyond its numbers."""
        if bool(self.clip_norm) != bool(self.noise_multiplier):
            yield (
                f"{where}: found clip_norm = {self.clip_norm} and noise_multiplier = "
                f"{self.noise_multiplier}; privacy needs both, or neither."
            )
        if self.clip_norm and not 1e-30 <= self.clip_norm <= 1e30:
            yield f"{where}.clip_norm: found {self.clip_norm:g}, expected 1e-30 to 1e30."


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """When accuracy is measured.

    Attributes:
      every_rounds: rounds between evaluations; the last round is always evaluated.
      batch_examples: examples per forward pass.
      max_examples: of each task's validation and test split, drawn from the seed; 0 = all.
    """

    every_rounds: int = field(1, at_least=1)
    batch_examples: int = field(128, at_least=1)
    max_examples: int = field(0, at_least=0)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When a run is saved.

    Attributes:
      every_rounds: rounds between checkpoints; the last round is always saved, and so is one that
        is better on validation than all before, of which the run's results and exports speak.
      keep: how many checkpoints stay on disk, the newest; besides them, that of the best round.
    """

    every_rounds: int = field(1, at_least=1)
    keep: int = field(2, at_least=1)


@dataclasses.dataclass(frozen=True)
class Config(AlgorithmConfig):
    """One experiment; what it may choose of algorithms is in `AlgorithmConfig`.

    Attributes:
      algorithm: a name in `matu_jax.algorithms.ALGORITHMS`.
      seed: everything random in training is drawn from it.
      rounds: communication rounds.
      clients_per_round: clients that take part in a round, drawn anew each time; 0 = all.
      data: see DataConfig.
      model: see ModelConfig.
      local: see LocalConfig.
      failures: see FailureConfig.
      attack: see AttackConfig.
      privacy: see PrivacyConfig.
      evaluation: see EvaluationConfig.
      checkpoint: see CheckpointConfig.
    """

    algorithm: str = "matu"
    seed: int = field(0, at_least=0, at_most=2**31 - 1)
    rounds: int = field(10, at_least=1)
    clients_per_round: int = field(0, at_least=0)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    local: LocalConfig = dataclasses.field(default_factory=LocalConfig)
    failures: FailureConfig = dataclasses.field(default_factory=FailureConfig)
    attack: AttackConfig = dataclasses.field(default_factory=AttackConfig)
    privacy: PrivacyConfig = dataclasses.field(default_factory=PrivacyConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)

    def conflicts(self, where: str) -> Iterator[str]:
        """Yields what is wrong where fields of different blocks exclude each other."""
        if self.clients_per_round > self.data.clients:
            yield (
                f"{where}.clients_per_round: found {self.clients_per_round}, expected at most "
                f"{where}.data.clients = {self.data.clients} (0 = all)."
            )

    def check(self) -> "Config":
        """Checks every field; returns the config with floats and tuples where they belong.

        Raises:
          ValueError: one message that lists every wrong type and value out of range.
        """
        return fields.checked(self, "config")

    @classmethod
    def from_json(cls, found: Any) -> "Config":
        """The checked config that JSON has kept, as `dataclasses.asdict` made it.

        What an earlier version kept is taken by the names of now, see `upgraded`.

        Raises:
          ValueError: one message that lists every unknown field (with "did you mean"), missing
            field, wrong type and value out of range.
        """
        return fields.from_json(cls, upgraded(found), "config")

    def with_fields(self, values: Mapping[str, Any]) -> "Config":
        """The config with other values in some fields; `check` says whether they are in range.

        Args:
          values: by path, such as {"rounds": 3, "local.steps": 10}.

        Raises:
          ValueError: for unknown fields (with "did you mean") and values of the wrong type.
        """
        _refuse_renamed(values)
        return fields.with_fields(self, values, "config")

    def override(self, path: str, text: str) -> "Config":
        """The config with another value in one field, as it is written on the command line.

        Args:
          path: of the field, such as "local.steps"; "data" is short for "data.source".
          text: its value: a number, a string, or a tuple such as (1, 2) or ("query", "value").

        Raises:
          ValueError: for an unknown field (with "did you mean"), or a value of the wrong type.
        """
        _refuse_renamed([path])
        path = "data.source" if path == "data" else path
        return fields.with_text(self, path, text, "config")


def renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by path whose paths of earlier versions are replaced by those of now."""
    return {now: value for path, value in values.items() for now in RENAMED.get(path, (path,))}


def upgraded(found: Any) -> Any:
    """What JSON has kept of a config, with the fields of earlier versions where they are now."""
    if not isinstance(found, dict) or not found.keys() & RENAMED.keys():
        return found
    upgraded = {name: value for name, value in found.items() if name not in RENAMED}
    for path, value in renamed({name: found[name] for name in found if name in RENAMED}).items():
        block, name = path.split(".")
        upgraded[block] = {**upgraded.get(block, {}), name: value}
    return upgraded


def renaming(path: str) -> str:
    """What to say of a field of an earlier version, such as "config.a: is config.b.c now."."""
    return f"config.{path}: is {' and '.join(f'config.{now}' for now in RENAMED[path])} now."


def _refuse_renamed(paths: Iterable[str]) -> None:
    problems = [renaming(path) for path in paths if path in RENAMED]
    if problems:
        raise ValueError("\n".join(problems))
