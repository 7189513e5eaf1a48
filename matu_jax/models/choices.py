"""What of models may be chosen: what is fine-tuned, and how much of it trains."""

import dataclasses
from typing import Literal

from matu_jax.fields import field


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
      remat: whether all of a block but its input is computed again in the backward pass: about a
        third more time, a fraction of the memory.
        Without it, what the projections yield is kept, and what is elementwise computed again.
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
