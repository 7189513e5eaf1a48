"""The README that is written beside an exported model."""

import dataclasses
from pathlib import Path
from typing import Any

from matu_jax.data.choices import IMAGE_SOURCES, DataConfig
from matu_jax.data.selection import is_generated
from matu_jax.models import exporting
from matu_jax.models.checkpoint_config import architecture_of
from matu_jax.models.images import transform_of
from matu_jax.runs.exported import Counts, Exported
from matu_jax.runs.provenance import versions
from matu_jax.runs.saved import SavedSlot
from matu_jax.simulation.federation import fingerprints


def measured_on(exported: Exported) -> str:
    """How many examples are measured, such as "20 validation and 20 test"."""
    most, counts = exported.config.evaluation.max_examples, []
    for split in {**exported.recorded, "test": None}:
        splits, own = exported.slot.measured_on(split)
        there = len(splits[own].labels)
        counts.append(f"{min(there, most or there)} {split}")
    return " and ".join(counts)


def model_card(exported: Exported, kind: str, loaded_by: str, measured: Counts) -> str:
    """The text of an export's README.md.

    Args:
      exported: the model.
      kind: "peft", "merged" or "safetensors".
      loaded_by: the transformers class that loads it.
      measured: on the test split, in float32.
    """
    config, task = exported.config, exported.task
    model = config.model
    library = {"peft": "peft", "merged": "transformers", "safetensors": "matu_jax"}[kind]
    header: dict[str, Any] = {"library_name": library}
    checkpoint, _ = exporting.base_model(model.checkpoint)
    if model.checkpoint not in ("random", "embedded") and not Path(checkpoint).exists():
        header["base_model"] = checkpoint
    images = f"made {transform_of(model).size} pixels high and wide"
    if model.architecture != "embedded":
        images = exporting.images_text(architecture_of(model))
    recorded = "; the run did not measure this round"
    if exported.accuracy is not None:
        recorded = f"; recorded in training: {100 * exported.accuracy:.1f} %"
    splits, own = exported.slot.measured_on("test")
    examples = len(splits[own].labels)
    rows = {
        "task": f"{task.name}, {task.num_classes} classes",
        "base model": f"{model.checkpoint} ({model.architecture})",
        "trained": "LoRA of rank "
        f"{model.lora_rank}, alpha {model.lora_alpha:g}, on {', '.join(model.lora_targets)}"
        if model.trainable == "lora"
        else "every parameter of the image tower",
        "algorithm": config.algorithm,
        "rounds": f"{exported.round} of {config.rounds}: {exported.why}",
        **rows_of_clients(exported.slot),
        "test accuracy": f"{100 * (measured.right / measured.examples):.1f} % of "
        f"{measured.examples} of {examples} test examples (of these files, in "
        f"float32{recorded})",
        "images": images,
        **rows_of_data(exported.slot),
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
    }
    return exporting.model_card(
        f"{task.name}, fine-tuned with matu_jax",
        header,
        rows,
        code={
            "Load it": _loading(exported, kind, loaded_by),
            "Classify with head.safetensors (class names in its metadata)": _classify(
                exported, kind
            ),
        },
        settings=dataclasses.asdict(config),
    )


def rows_of_clients(slot: SavedSlot) -> dict[str, str]:
    """What a card says of the clients, and of what each site has reached."""
    data, sites = slot.config.data, slot.federation.sites
    if not sites:
        words = f"{data.clients}, tasks of each: {data.tasks_per_client}; this is the model of "
        return {"clients": f"{words}client {slot.client}, {slot.why_client}"}
    rows = {
        "sites": f"{len(sites)} ({', '.join(sites)}), each a client with its own data; this is the "
        f"model of {sites[slot.client]} (client {slot.client}), {slot.why_client}"
    }
    if slot.at_sites:
        reached = (f"{site} {slot.measure.text(found)}" for site, found in slot.at_sites.items())
        rows[f"test {slot.measure.name} at each site"] = (
            f"{', '.join(reached)}: of its own models on its own examples, the mean over its "
            "tasks, as recorded in training"
        )
    return rows


def rows_of_data(slot: SavedSlot) -> dict[str, str]:
    """What a card says of the data: where it is from, what tells it from other, and its notes."""
    task = slot.federation.tasks[slot.task]
    kept = fingerprints(slot.federation)[task.name]
    if not isinstance(kept, str):
        kept = ", ".join(f"{split} {digest}" for split, digest in kept.items())
    rows = {"data": f"{_place(slot.config.data)}; fingerprint {kept}"}
    return rows | ({"about the data": "; ".join(task.notes)} if task.notes else {})


def _place(data: DataConfig) -> str:
    """Where examples are from."""
    if data.source not in IMAGE_SOURCES:
        return f"{data.source}, a source of the experiment's own"
    if data.manifest:
        return f"manifest {data.manifest}"
    if data.sites:
        return f"folder of sites {data.sites}"
    if is_generated(data.tasks, data.folders):
        return f"generated by matu_jax: {data.tasks or 'embedded8'}"
    return f"{data.source} {data.tasks or 'folders'}"


def _loading(exported: Exported, kind: str, loaded_by: str) -> str:
    """Python code that loads the model."""
    model = exported.config.model
    checkpoint, revision = exporting.base_model(model.checkpoint)
    if kind == "merged":
        return f'import transformers\n\nmodel = transformers.{loaded_by}.from_pretrained("FOLDER")'
    if kind == "peft":
        at = f", revision={revision!r}" if revision else ""
        return (
            "import peft\nimport transformers  # 5.23 or newer\n\n"
            f"base = transformers.{loaded_by}.from_pretrained({checkpoint!r}{at})\n"
            'model = peft.PeftModel.from_pretrained(base, "FOLDER")'
        )
    where = f"the base, {model.checkpoint!r}"
    if model.checkpoint == "random":
        where = f"the base, which matu_jax.models.build draws from seed {exported.config.seed}"
    return (
        "import safetensors.numpy\n\n"
        f"# To be added to parameters of the same names of {where}.\n"
        'vector = safetensors.numpy.load_file("FOLDER/task_vector.safetensors")'
    )


def _classify(exported: Exported, kind: str) -> str:
    """Python code that uses the head."""
    head, kept = exported.head, "torch"
    norm = "features.norm(dim=-1, keepdim=True)"
    if kind == "safetensors":
        kept, norm = "numpy", "(features**2).sum(axis=-1, keepdims=True) ** 0.5"
        features = "# features [examples, features]: of the image tower with base + vector"
    else:
        code = exporting.features_code(architecture_of(exported.config.model), kind)
        features = f"features = {code}"
    logits = f'head["logit_scale"] * features / {norm} @ head["weight"].T'
    if "bias" in head:
        logits = 'features @ head["weight"].T + head["bias"]'
    return (
        f"import safetensors.{kept}\n\n"
        f'head = safetensors.{kept}.load_file("FOLDER/head.safetensors")\n'
        f"{features}\n"
        f"logits = {logits}"
    )
