"""Models as pure functions: what trains, what is frozen, and how features and logits come out.

A model is built once with Flax NNX and split; the rest of the package sees plain trees of arrays
and pure functions. The parts:

- `contract`: what a federation asks of a model, and `checks` of it; `classification`, of images, is
  one; `metrics`, `modules` (of Flax NNX) and `language` (its export as PEFT) are for one's own;
- `architectures`: the real architectures in numbers; `images`: the images they take;
- `transformer`, `vit`, `towers`: the modules; `backbone` splits them;
- `embedded`, `pretrained`: the benchmark's own backbone, and real checkpoints with `huggingface`
  (their files), `checkpoint_config`, `tensor_names` and `heads` (zero-shot classification).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from matu_jax import trees
from matu_jax.data import ImageTask, Task, image_tasks
from matu_jax.errors import did_you_mean
from matu_jax.models.architectures import MODELS, TRANSFORMS, check_architecture
from matu_jax.models.checks import check_model, told
from matu_jax.models.choices import ModelConfig
from matu_jax.models.classification import Classifier, classifier
from matu_jax.models.contract import Metric, Model, linearised

__all__ = [
    "MODELS",
    "TRANSFORMS",
    "Classifier",
    "Metric",
    "Model",
    "base_fingerprint",
    "build",
    "build_classifier",
    "classifier",
    "linearised",
]


def base_fingerprint(config: ModelConfig, model: Model) -> str | None:
    """SHA-256 of what is fine-tuned, over names, dtypes, shapes and bytes.

    Args:
      config: architecture and checkpoint.
      model: what they build; of one of `MODELS`, its base and frozen arrays are looked at, of
        others the checkpoint.

    Returns:
      Hexadecimal digits; None where the parameters of a built-in architecture are drawn at random.

    Raises:
      ValueError: if the checkpoint cannot be found or read.
    """
    from matu_jax.models import embedded, huggingface
    from matu_jax.models.tensors import TensorFiles, fingerprint

    if config.architecture in MODELS:
        return trees.fingerprint({"base": model.base, "frozen": model.frozen})
    if config.checkpoint == "random":
        return None
    if config.architecture != "embedded":
        return huggingface.fingerprint(
            huggingface.checkpoint_folder(config.checkpoint, config.architecture)
        )
    with TensorFiles(embedded.file_of(config.checkpoint)) as checkpoint:
        return fingerprint(checkpoint)


def build(config: ModelConfig, tasks: Sequence[Task], *, seed: int = 0) -> Model:
    """Builds the model of an experiment: one of `MODELS`, or a `build_classifier`.

    Args:
      config: which one.
      tasks: with their data.
      seed: what is drawn at random is drawn from it.

    Raises:
      ValueError: as `build_classifier`, or if a builder of `MODELS` fails or
        returns something else.
      ContractError: if the model that it returns breaks the contract.
    """
    if config.architecture not in MODELS:
        return build_classifier(config, tasks, seed=seed)
    where = f"config.model.architecture {config.architecture!r}: its function in MODELS"
    try:
        model = MODELS[config.architecture](config, tasks, seed=seed)
    except ValueError:
        raise
    except Exception as error:  # of a function of the user's
        raise ValueError(
            f"{told(where, error)}; expected a function (config, tasks, *, seed) that returns a "
            "model, where config is config.model."
        ) from error
    if not isinstance(model, Model):
        raise ValueError(
            f"{where} returned {type(model).__name__}, expected a matu_jax.models.Model."
        )
    if config.trains_heads and not model.trains_heads:
        raise ValueError(
            f"{where} returned a model without trained heads, but config.model.head and task_heads "
            "ask for some. Leave them as they are by default, or build Model(..., "
            "trains_heads=True)."
        )
    check_model(model, tasks)
    return model


def build_classifier(config: ModelConfig, tasks: Sequence[Task], *, seed: int = 0) -> Classifier:
    """Builds a model of images with one of the built-in architectures.

    Args:
      config: architecture, checkpoint, adapters and heads.
      tasks: their classes, and for zero-shot heads the names and prompts of these.
      seed: what adapters are drawn from, and of a "random" checkpoint everything.

    Returns:
      The model; adapters start as the identity, trained heads as zeros.

    Raises:
      ValueError: for a field of the config that does not fit the others or the tasks, or a
        checkpoint that cannot be found, read or matched with the architecture.
    """
    # Here and not above, so that `matu_jax.models.architectures` can be had without Flax.
    from matu_jax.models import embedded, pretrained

    if not tasks:
        raise ValueError("tasks: found none, expected at least one.")
    tasks = image_tasks(tasks)
    check_architecture(config.architecture)
    trained = _trained_heads(config, tasks)
    frozen_tasks = [task for task, is_trained in zip(tasks, trained, strict=True) if not is_trained]
    if config.architecture == "embedded":
        if frozen_tasks and not config.logit_scale:
            raise ValueError(
                "config.model.logit_scale: found 0 (the checkpoint's own), but the embedded "
                "backbone has none. Give one, such as 20."
            )
        backbone, rows = embedded.load(config, frozen_tasks, seed=seed)
        logit_scale = config.logit_scale
    else:
        backbone, rows, own_scale = pretrained.load(config, frozen_tasks, seed=seed)
        logit_scale = config.logit_scale or own_scale

    for task in tasks:
        if task.train.images.shape[1:] != backbone.image_shape:
            raise ValueError(
                f"task {task.name!r}: images are {list(task.train.images.shape[1:])}, but "
                f"config.model.architecture {config.architecture} takes "
                f"{list(backbone.image_shape)}. Choose tasks and architecture that fit."
            )
    classes = max(task.num_classes for task in tasks)
    heads = np.zeros((len(tasks), classes, backbone.features), np.float32)
    for i, row in zip(np.flatnonzero(~np.array(trained)), rows, strict=True):
        heads[i, : len(row)] = row
    base, frozen = backbone.trainable, {"backbone": backbone.frozen, "heads": jnp.asarray(heads)}
    if config.trains_heads:
        frozen["trained"] = jnp.asarray(trained)
        kernel, bias = jnp.zeros((backbone.features, classes)), jnp.zeros(classes)
        base = {"shared": base, "head": {"kernel": kernel, "bias": bias}}

    def features(params, frozen, images, key=None):
        shared = params["shared"] if config.trains_heads else params
        return backbone.apply(shared, frozen["backbone"], images, key)

    def logits(params, frozen, images, task, key=None):
        out = features(params, frozen, images, key)
        if not config.trains_heads:
            return cosine(out, frozen["heads"][task])
        linear = out @ params["head"]["kernel"] + params["head"]["bias"][None]
        if all(trained):
            return linear
        return jnp.where(frozen["trained"][task], linear, cosine(out, frozen["heads"][task]))

    def cosine(out, vectors):
        out = out * jax.lax.rsqrt(jnp.sum(jnp.square(out), axis=-1, keepdims=True) + 1e-6)
        return logit_scale * out @ vectors.T

    return classifier(
        base,
        frozen,
        tasks,
        logits=logits,
        features=features,
        stochastic=config.lora_dropout > 0,
        logit_scale=logit_scale,
    )


def _trained_heads(config: ModelConfig, tasks: Sequence[ImageTask]) -> list[bool]:
    """Whether each task's head is trained."""
    kinds, seen = {task.name: config.head for task in tasks}, set()
    for entry in config.task_heads:
        where = f"config.model.task_heads: found {entry!r}"
        if not isinstance(entry, tuple) or len(entry) != 2:
            raise ValueError(f"{where}, expected pairs such as (('svhn', 'trained'),).")
        name, kind = entry
        if name not in kinds:
            raise ValueError(f"{where}, no such task.{did_you_mean(str(name), kinds)}")
        if kind not in ("frozen", "trained"):
            raise ValueError(f"{where}, expected 'frozen' or 'trained'.")
        if name in seen:
            raise ValueError(f"{where}, but this task is there twice. Keep one of the pairs.")
        seen.add(name)
        kinds[name] = kind
    return [kinds[task.name] == "trained" for task in tasks]
