"""How image files become the images that a model takes."""

from matu_jax.data import Transform
from matu_jax.models.architectures import (
    ARCHITECTURES,
    MODELS,
    TRANSFORMS,
    check_architecture,
)
from matu_jax.models.checkpoint_config import architecture_of
from matu_jax.models.choices import ModelConfig


def transform_of(config: ModelConfig) -> Transform:
    """How image files become the images that a model takes.

    Args:
      config: architecture, and checkpoint, which is read where the architecture is "embedded" or
        a family, and else need not be there.

    Returns:
      For the embedded backbone, the shortest side resized to its image size (32 pixels for the one
      that comes with the package), bicubically, and cropped at the centre; so for models of
      `MODELS` without an entry in `TRANSFORMS`.

    Raises:
      ValueError: for an unknown architecture, or a checkpoint that cannot be found or read.
    """
    if config.architecture == "embedded":
        from matu_jax.models import embedded  # here, since it loads Flax

        return Transform(embedded.image_size(config.checkpoint))
    check_architecture(config.architecture)
    if config.architecture in MODELS:
        return TRANSFORMS.get(config.architecture, Transform(32))
    if config.architecture in ARCHITECTURES:
        return ARCHITECTURES[config.architecture].transform
    return architecture_of(config).transform
