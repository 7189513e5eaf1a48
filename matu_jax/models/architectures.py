"""The real architectures, as numbers: what a checkpoint must have.

Importing this file loads neither Flax nor a checkpoint library, so that data preparation can read
it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from matu_jax.data import Transform
from matu_jax.errors import did_you_mean
from matu_jax.models.choices import ModelConfig
from matu_jax.models.contract import Model

FAMILIES = {"clip": "openai/clip-vit-base-patch32", "vit": "google/vit-base-patch16-224"}
"""The families whose checkpoints are read whatever their sizes, and an example of each on the hub:
`config.model.architecture` may be a family instead of one of `ARCHITECTURES`."""

MODELS: dict[str, Callable[..., Model]] = {}
"""Builders of models of one's own, by the name that `config.model.architecture` has: `(config:
ModelConfig, tasks: Sequence[Task], *, seed: int) -> Model`; an experiment file adds them."""

TRANSFORMS: dict[str, Transform] = {}
"""How image files become the images that a model of `MODELS` takes, where they are not 32 pixels
high and wide."""

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class TowerShape:
    """The shape of a stack of pre-norm transformer blocks; sizes in features.

    Attributes:
      width: of the residual stream.
      depth: number of blocks.
      heads: attention heads of `width / heads` features each.
      mlp_width: of the hidden layer of each MLP.
      activation: of the MLPs, a key of `matu_jax.models.transformer.ACTIVATIONS`.
      epsilon: added to the variance in every layer norm.
    """

    width: int
    depth: int
    heads: int
    mlp_width: int
    activation: str = "quick_gelu"
    epsilon: float = 1e-5


@dataclass(frozen=True)
class Architecture:
    """A vision tower, its text tower if it has one, and the images it takes.

    Attributes:
      name: the key in `ARCHITECTURES`; the family where all was read from a checkpoint.
      family: "clip" (Radford et al. 2021, arXiv 2103.00020) or "vit" (Dosovitskiy et al. 2021,
        arXiv 2010.11929).
      hub_name: a checkpoint on the Hugging Face hub.
      image_size: height and width in pixels.
      patch_size: height and width of a patch in pixels. Where patches do not fill the image, what
        is left over at the bottom and on the right is not looked at.
      vision: shape of the image tower.
      text: shape of the text tower; None where there is none.
      projection: features of the space that images and texts share; None = features are the vision
        tower's own.
      image_mean: of the pixels, from 0 to 1, per channel.
      image_std: of the pixels, per channel.
      transform: how an image file becomes such an image.
      vocabulary: number of text tokens.
      context: tokens of a text, padding included.
      end_token: the token whose feature stands for the text; 2 (in checkpoints older than the
        field's correction) = the highest token of a text.
    """

    name: str
    family: str
    hub_name: str
    image_size: int
    patch_size: int
    vision: TowerShape
    text: TowerShape | None
    projection: int | None
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    transform: Transform
    vocabulary: int = 0
    context: int = 0
    end_token: int = 2

    @property
    def features(self) -> int:
        """Number of features that an image yields."""
        return self.projection or self.vision.width


def _clip(name: str, hub_name: str, patch_size: int, vision: TowerShape, text: TowerShape):
    return Architecture(
        name=name,
        family="clip",
        hub_name=hub_name,
        image_size=224,
        patch_size=patch_size,
        vision=vision,
        text=text,
        projection=text.width,
        image_mean=CLIP_MEAN,
        image_std=CLIP_STD,
        transform=Transform(224, "shortest_side", "bicubic"),
        vocabulary=49408,
        context=77,
    )


def check_architecture(name: str) -> None:
    """Checks what stands in `config.model.architecture`.

    Raises:
      ValueError: if it is neither "embedded", nor in `ARCHITECTURES` or `MODELS`, nor one of
        `FAMILIES`; or if `MODELS` takes the name of another.
    """
    built_in = ["embedded", *ARCHITECTURES, *FAMILIES]
    if name in MODELS and name in built_in:
        raise ValueError(
            f"MODELS[{name!r}]: is the name of an architecture of the package; choose another."
        )
    known = [*built_in, *MODELS]
    if name not in known:
        raise ValueError(
            f"config.model.architecture: found {name!r}, no such architecture."
            + did_you_mean(name, known)
        )


_BASE, _TEXT = TowerShape(768, 12, 12, 3072), TowerShape(512, 12, 8, 2048)

ARCHITECTURES: dict[str, Architecture] = {
    architecture.name: architecture
    for architecture in (
        _clip("clip_vit_b32", "openai/clip-vit-base-patch32", 32, _BASE, _TEXT),
        _clip("clip_vit_b16", "openai/clip-vit-base-patch16", 16, _BASE, _TEXT),
        _clip(
            "clip_vit_l14",
            "openai/clip-vit-large-patch14",
            14,
            TowerShape(1024, 24, 16, 4096),
            TowerShape(768, 12, 12, 3072),
        ),
        Architecture(
            name="vit_b16",
            family="vit",
            hub_name="google/vit-base-patch16-224",
            image_size=224,
            patch_size=16,
            vision=TowerShape(768, 12, 12, 3072, "gelu", 1e-12),
            text=None,
            projection=None,
            image_mean=(0.5, 0.5, 0.5),
            image_std=(0.5, 0.5, 0.5),
            transform=Transform(224, "squash", "bilinear"),
        ),
    )
}


def check_heads(config: ModelConfig, tasks: Sequence[str]) -> None:
    """Checks that real tasks with a frozen head have a text tower to make it of.

    Said by the config alone, before images are prepared; where it takes the checkpoint to know,
    `models.build` checks.

    Args:
      config: architecture and heads.
      tasks: names of tasks that are not of the embedded benchmark.

    Raises:
      ValueError: names the tasks without one, and what to set.
    """
    known = config.architecture == "embedded" or config.architecture in ARCHITECTURES
    if not known or getattr(ARCHITECTURES.get(config.architecture), "text", None):
        return
    own = _task_heads(config)
    frozen = [name for name in tasks if own.get(name, config.head) == "frozen"]
    if frozen:
        raise without_text_tower(config, frozen)


def without_text_tower(config: ModelConfig, frozen: Sequence[str]) -> ValueError:
    """What to say of frozen heads for whose class names there is no text tower.

    Args:
      config: architecture, checkpoint and heads.
      frozen: names of the tasks with such a head, one at least.
    """
    own = _task_heads(config)
    some = ", ".join(frozen[:3]) + ", ..." * (len(frozen) > 3)
    remedies = []
    if any(name not in own for name in frozen):
        remedies.append("set config.model.head = 'trained'")
    if named := [name for name in frozen if name in own]:
        pairs = " and ".join(repr((name, own[name])) for name in named[:3])
        remedies.append(
            f"put 'trained' in place of 'frozen' in config.model.task_heads, where {pairs} stands"
        )
    remedy = " and ".join(remedies)
    return ValueError(
        f"config.model.head: found 'frozen' for {some}, a head made of class names by a text "
        f"tower, which architecture {config.architecture!r} with checkpoint "
        f"{config.checkpoint!r} does not have. {remedy[0].upper()}{remedy[1:]}, or take a whole "
        "CLIP model, such as config.model.architecture = 'clip_vit_b32' with config.model."
        "checkpoint = 'openai/clip-vit-base-patch32'."
    )


def _task_heads(config: ModelConfig) -> dict[str, str]:
    return dict(pair for pair in config.task_heads if isinstance(pair, tuple) and len(pair) == 2)
