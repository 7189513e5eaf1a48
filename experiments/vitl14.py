"""MaTU on the eight vision tasks, with CLIP ViT-L/14 and LoRA.

    python -m matu_jax.prepare --config experiments/vitl14.py     # once; needs a network
    python -m matu_jax.train --config experiments/vitl14.py

Add --config.model.checkpoint=random --config.data=synthetic to run it anywhere.

As experiments/vitb32.py, with the larger image tower (304 M parameters), activations computed
again in the backward pass, and eight slots at a time. The prepared images are the same.

Hardware: one accelerator with 17 GiB of free memory at bfloat16 (predicted, and a third more); not
run on one yet. Published for openai/clip-vit-large-patch14 fine-tuned in full (mean test accuracy
over the eight, %): zero-shot 64.5, fine-tuned per task 94.2 (AdaMerging, arXiv 2310.02575).
"""

import runpy
from pathlib import Path


def get_config():
    vitb32 = runpy.run_path(str(Path(__file__).with_name("vitb32.py")))["get_config"]()
    return vitb32.with_fields(
        {
            "model.architecture": "clip_vit_l14",
            "model.checkpoint": "openai/clip-vit-large-patch14",
            "model.remat": True,
            "local.parallel_slots": 8,
        }
    )
