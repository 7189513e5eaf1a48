"""An exported model as a folder that other programs load: weights, configuration and card."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from matu_jax.errors import UserError
from matu_jax.models import exporting, huggingface
from matu_jax.models.checkpoint_config import architecture_of
from matu_jax.runs.card import measured_on, model_card
from matu_jax.runs.exported import Exported, measure
from matu_jax.trees import leaf_items

FORMATS = ("peft", "merged", "safetensors")


def write(
    exported: Exported, kind: str, out: Path, say: Callable[[str], None] = lambda line: None
) -> None:
    """Writes a model in one of `FORMATS`, its head and its card, into a new folder.

    Before that it is measured, see `measure`. Every file of tensors is read back and compared bit
    for bit; a merged checkpoint also as any other is read, with the image tower that was measured.

    Args:
      exported: from `exported.exported`.
      kind: of `FORMATS`.
      out: the folder.
      say: is told, a line at a time, what is done and what is left out.

    Raises:
      UserError: if the format does not fit the run, the folder is there already, the model is not
        the one that the run measured, or a file reads back otherwise. Nothing is written then.
    """
    model = exported.config.model
    if kind != "safetensors" and model.architecture == "embedded":
        raise UserError(
            f"--format {kind}: the run is of the embedded architecture, which nothing else "
            "loads. Use --format safetensors."
        )
    if kind == "peft" and model.trainable == "full":
        raise UserError(
            "--format peft: the run trained every parameter, so there is no adapter. Use --format "
            "merged."
        )
    if kind == "peft" and model.checkpoint == "random":
        raise UserError(
            "--format peft: the run's image tower was drawn at random, so nobody has the base that "
            "the adapter belongs to. Use --format merged."
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: is there already. Give a new folder.")
    say(f"Measuring on {measured_on(exported)} examples first.")
    measured = measure(exported, kind)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".export-") as unfinished:
        folder = Path(unfinished) / "model"
        folder.mkdir()
        names = json.dumps(list(exported.task.class_names))
        head = {name: np.asarray(value, np.float32) for name, value in exported.head.items()}
        try:
            loaded_by = _write_model(exported, kind, folder)
            exporting.save_checked(head, folder / "head.safetensors", {"class_names": names})
        except ValueError as error:
            raise UserError(str(error)) from None
        card = model_card(exported, kind, loaded_by, measured)
        (folder / "README.md").write_text(card, encoding="utf-8")
        if out.exists():
            out.rmdir()
        folder.rename(out)
    links = exporting.links_left_out(huggingface.folder_of(model)) if kind == "merged" else []
    if links:
        say(f"Not copied, links out of the base's folder: {', '.join(links)}")


def _write_model(exported: Exported, kind: str, folder: Path) -> str:
    model = exported.config.model
    if kind == "safetensors":
        tensors = dict(leaf_items(exported.vector))
        about = {
            "format": "matu_jax task vector: fine-tuned minus base",
            "task": exported.task.name,
        }
        exporting.save_checked(tensors, folder / "task_vector.safetensors", about)
        return ""
    architecture, source = architecture_of(model), huggingface.folder_of(model)
    if kind == "peft":
        return exporting.write_adapter(folder, exported.params, model, architecture)
    tower = exporting.merged_tower(exported.params, exported.frozen, model)
    return exporting.write_merged(
        folder,
        tower,
        architecture,
        source,
        class_names=exported.task.class_names,
        head=exported.head,
    )
