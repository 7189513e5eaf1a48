"""MaTU on thirty TFDS datasets that need no manual download, with CLIP ViT-B/32 and LoRA.

    python -m matu_jax.prepare --config experiments/vitb32_tfds30.py     # once; needs a network
    python -m matu_jax.train --config experiments/vitb32_tfds30.py

Add --config.model.checkpoint=random --config.data=synthetic to run it anywhere.

Sixty clients hold two of the thirty datasets each; otherwise as experiments/vitb32.py. The
datasets are those of matu_jax/data/datasets.py, set "tfds30": where TFDS has no official test
split, the table says how it is made.

Hardware: predicted are 9.7 GB of memory on an NVIDIA H100 and 10.7 GB on a TPU v5e or v5p; not run
on one yet. A step's lower bounds are those of experiments/vitb32.py, but a v5e-8 has 15 of the 120
slots a chip (122 ms) and a v5p-8 20 at a time (58 ms). No published number is for this set of
datasets.
"""

import runpy
from pathlib import Path


def get_config():
    vitb32 = runpy.run_path(str(Path(__file__).with_name("vitb32.py")))["get_config"]()
    return vitb32.with_fields(
        {
            "data.tasks": "tfds30",
            "data.clients": 60,
            "data.tasks_per_client": 2,
            "rounds": 100,
            "evaluation.every_rounds": 25,
        }
    )
