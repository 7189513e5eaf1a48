"""MaTU on the thirty datasets of EMR-Merging, with ViT-B/16, LoRA and trained linear heads.

    python -m matu_jax.prepare --config experiments/vitb16_emr30.py     # says what it needs
    python -m matu_jax.train --config experiments/vitb16_emr30.py

Add --config.model.checkpoint=random --config.data=synthetic to run it anywhere.

The datasets are those that Huang et al. (EMR-Merging, arXiv 2405.17461) merge thirty models of;
those that TFDS lacks are read from image folders, FOLDERS/<name>/<split>/<class>/*.jpg, where
FOLDERS is config.data.folders. A plain vision transformer has no text tower: each task trains a
linear head, averaged among its holders. Sixty clients hold two tasks each.

Hardware, at bfloat16: predicted are 7.0 GB of memory on an NVIDIA H100 and 7.8 GB on a TPU; not run
on one yet. Compiled for them (experiments/bench/bench_compiled.py --tables training), a step of 10
slots cannot take less than 68 ms on an H100 and 410 ms on a v5e chip, bound by memory traffic (229
and 336 GB); with 10 slots a chip at a time, as long on a v5e-8 (8 chips).

The paper's numbers are of full fine-tuning from an ImageNet-21k checkpoint and merging once, not of
rounds with adapters: there is none to compare with directly.
"""

import runpy
from pathlib import Path


def get_config():
    vitb32 = runpy.run_path(str(Path(__file__).with_name("vitb32.py")))["get_config"]()
    return vitb32.with_fields(
        {
            "data.tasks": "emr30",
            "data.clients": 60,
            "data.tasks_per_client": 2,
            "rounds": 100,
            "model.architecture": "vit_b16",
            "model.checkpoint": "google/vit-base-patch16-224",
            "model.head": "trained",
            "model.remat": True,
            "local.parallel_slots": 10,
            "evaluation.every_rounds": 25,
        }
    )
