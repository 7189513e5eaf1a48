"""Clients to train, as an experiment of this library, and their loop in PyTorch with PEFT.

Both start from the same weights and adapters, see the same examples in the same order and use the
same optimiser, Adam.
"""

import dataclasses
import logging
import warnings
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from matu_jax.config import (
    NO_DEFENCE,
    Config,
    DataConfig,
    EvaluationConfig,
    LocalConfig,
    ModelConfig,
)
from matu_jax.data import Split, Transform
from matu_jax.data.batching import gather, round_indices
from matu_jax.models import Classifier
from matu_jax.models.architectures import ARCHITECTURES, Architecture, TowerShape
from matu_jax.models.tensor_names import CLIP_PROJECTIONS, to_huggingface
from matu_jax.simulation.federation import Federation
from matu_jax.trees import PyTree, leaf_items

# The sizes of the embedded benchmark's backbone, in an architecture that transformers has too.
ARCHITECTURES["small"] = dataclasses.replace(
    ARCHITECTURES["clip_vit_b32"],
    name="small",
    image_size=32,
    patch_size=8,
    vision=TowerShape(96, 4, 4, 384),
    projection=64,
    transform=Transform(32),
)


def experiment(
    architecture: str,
    clients: int,
    steps: int,
    batch: int,
    dtype: Literal["float32", "bfloat16"] = "float32",
    **changes: Any,
) -> Config:
    """Clients with one task each, random weights, generated images; Adam on LoRA adapters."""
    return Config(
        data=DataConfig(
            tasks=",".join(("mnist", "svhn", "eurosat", "gtsrb")[:clients]),
            source="synthetic",
            clients=clients,
            tasks_per_client=1,
            examples_per_slot=32,
        ),
        model=ModelConfig(architecture=architecture, checkpoint="random", compute_dtype=dtype),
        local=LocalConfig(steps=steps, batch_examples=batch, learning_rate=1e-3),
        defence=NO_DEFENCE,
        evaluation=EvaluationConfig(max_examples=8, batch_examples=8, every_rounds=10**6),
        **changes,
    )


def round_data(config: Config, federation: Federation, rows: np.ndarray, round_index: int) -> Split:
    """What some slots train on in a round, images and labels `[rows, steps, batch, ...]`."""
    slots = federation.slots
    indices = round_indices(
        [federation.indices[row] for row in rows],
        slots.client[rows],
        slots.task[rows],
        seed=config.seed,
        round_index=round_index,
        steps=config.local.steps,
        batch_size=config.local.batch_examples,
    )
    return gather(federation.tasks, slots.task[rows], indices)


def training_operations(architecture: Architecture, config: ModelConfig) -> float:
    """Floating-point operations for one example's gradient, of the image tower's products alone.

    Frozen layers take two products (forward, and backward to their inputs), attention's two take
    six, adapters three of each of theirs; the patches are not gone back to.
    """
    shape, patch = architecture.vision, architecture.patch_size
    patches = (architecture.image_size // patch) ** 2
    tokens, width = patches + 1, shape.width
    widths = {"mlp_in": width + shape.mlp_width, "mlp_out": width + shape.mlp_width}
    adapters = sum(config.lora_rank * widths.get(name, 2 * width) for name in config.lora_targets)
    linear = 4 * width**2 + 2 * width * shape.mlp_width
    block = tokens * (2 * linear + 3 * adapters) + 3 * 2 * tokens**2 * width
    products = patches * 3 * patch**2 * width + shape.depth * block
    return 2.0 * (products + 2 * width * (architecture.projection or 0))


class PeftClient:
    """A CLIP image tower with PEFT adapters, trained for one client after the other.

    Attributes:
      parameters: the adapters, by our path and layer.
    """

    def __init__(self, model: Classifier, config: Config):
        import peft
        import torch
        import transformers

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        architecture, choices = ARCHITECTURES[config.model.architecture], config.model
        self.architecture, self.config, self.scale = architecture, config, model.logit_scale
        shape = architecture.vision
        plain = jax.tree.map(lambda x: np.asarray(x, np.float32), model.frozen["backbone"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's and PEFT's own deprecations
            body = transformers.CLIPVisionModelWithProjection(
                transformers.CLIPVisionConfig(
                    hidden_size=shape.width,
                    num_hidden_layers=shape.depth,
                    num_attention_heads=shape.heads,
                    intermediate_size=shape.mlp_width,
                    image_size=architecture.image_size,
                    patch_size=architecture.patch_size,
                    hidden_act=shape.activation,
                    layer_norm_eps=shape.epsilon,
                    projection_dim=architecture.projection or shape.width,
                )
            )
            tensors = to_huggingface(plain, "clip_vision")
            body.load_state_dict({name: torch.from_numpy(x) for name, x in tensors.items()})
            if choices.compute_dtype == "bfloat16":
                body = body.bfloat16()
            modules = [CLIP_PROJECTIONS[name].split(".")[-1] for name in choices.lora_targets]
            logging.getLogger("peft").setLevel(logging.ERROR)
            self.body = peft.get_peft_model(
                body,
                peft.LoraConfig(
                    r=choices.lora_rank,
                    lora_alpha=choices.lora_alpha,  # pyright: ignore[reportArgumentType]
                    target_modules=modules,
                    bias="none",
                ),
            ).to(self.device)
        found = dict(self.body.named_parameters())
        self.parameters = {
            f"{path}/{layer}": parameter
            for path, leaf in leaf_items(model.base)
            for _, projection, part in [path.split("/")]
            for layer in range(leaf.shape[0])
            for name, parameter in found.items()
            if name.endswith(
                f".layers.{layer}.{CLIP_PROJECTIONS[projection]}.lora_{part[-1].upper()}"
                ".default.weight"
            )
        }
        self.heads = torch.from_numpy(np.array(model.frozen["heads"])).to(self.device)
        self.mean = torch.tensor(architecture.image_mean, device=self.device).view(1, 3, 1, 1)
        self.std = torch.tensor(architecture.image_std, device=self.device).view(1, 3, 1, 1)

    def start(self, base: PyTree) -> dict[str, Any]:
        """Our adapters, leaves `[depth, ...]`, as PyTorch's."""
        import torch

        return {
            f"{path}/{layer}": torch.from_numpy(np.array(row.T)).to(self.device)
            for path, leaf in leaf_items(base)
            for layer, row in enumerate(np.asarray(leaf))
        }

    def train(
        self, start: dict[str, Any], images: Any, labels: Any, task: int, classes: int
    ) -> tuple[dict[str, Any], Any]:
        """One client's round: `[steps, batch, height, width, 3]` to adapters and mean loss."""
        import torch
        from torch.nn import functional

        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(start[name])
        optimizer = torch.optim.Adam(
            list(self.parameters.values()), lr=self.config.local.learning_rate
        )
        low = self.config.model.compute_dtype == "bfloat16"
        total, head = torch.zeros((), device=self.device), self.heads[task, :classes].T
        for batch, targets in zip(images, labels, strict=True):
            pixels = (batch.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std
            with torch.autocast(self.device, torch.bfloat16, enabled=low):
                features = self.body(pixel_values=pixels).image_embeds
            features = features.float()
            length = torch.rsqrt(features.square().sum(dim=-1, keepdim=True) + 1e-6)
            loss = functional.cross_entropy(self.scale * (features * length) @ head, targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach()
        trained = {name: x.detach().clone() for name, x in self.parameters.items()}
        return trained, total / len(images)

    def loop(self, start: dict[str, Any], clients: list[tuple[Any, Any, int, int]]) -> list[tuple]:
        """Trains all clients, one after the other, and waits for the device."""
        import torch

        results = [self.train(start, *client) for client in clients]
        if self.device == "cuda":
            torch.cuda.synchronize()
        return results

    def tensors(self, images: np.ndarray, labels: np.ndarray) -> tuple[Any, Any]:
        """Examples on PyTorch's device."""
        import torch

        return (
            torch.from_numpy(images).to(self.device),
            torch.from_numpy(labels).long().to(self.device),
        )


def compare(ours: PyTree, theirs: dict[str, np.ndarray], base: PyTree, tolerance: float) -> float:
    """Checks that PyTorch has trained what we have.

    Args:
      ours: task vectors, leaves `[depth, ...]`.
      theirs: adapters by path and layer, as PyTorch holds them.
      base: our adapters before.
      tolerance: length of the difference, as a part of that of the task vector.

    Returns:
      That part.

    Raises:
      ValueError: where it is larger.
    """
    start, difference, length = dict(leaf_items(base)), 0.0, 0.0
    for path, leaf in leaf_items(ours):
        for layer, row in enumerate(np.asarray(leaf, np.float64)):
            other = theirs[f"{path}/{layer}"].T.astype(np.float64)
            difference += float(np.square(row - (other - np.asarray(start[path][layer]))).sum())
            length += float(np.square(row).sum())
    part = (difference / length) ** 0.5
    if not part <= tolerance:
        raise ValueError(
            f"what PyTorch trained differs from ours by {part:.2g} of its length; {tolerance:g} is "
            "allowed: nothing was timed."
        )
    return part


def zero_vectors(base: PyTree, rows: int) -> PyTree:
    """Downloads of a first round, leaves `[rows, ...]`."""
    return jax.tree.map(lambda leaf: jnp.zeros((rows, *leaf.shape), leaf.dtype), base)
