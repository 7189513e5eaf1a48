"""MaTU on the eight vision tasks, with CLIP ViT-L/14 and LoRA.

    python -m matu_jax.prepare --config experiments/vitl14.py     # once; needs a network
    python -m matu_jax.train --config experiments/vitl14.py

Add --config.model.checkpoint=random --config.data=synthetic to run it anywhere.

As experiments/vitb32.py, with the larger image tower (304 M parameters), activations computed
again in the backward pass, and eight slots at a time. The prepared images are the same.

Hardware, at bfloat16: predicted are 10.6 GB of memory on an NVIDIA H100 and 12.1 GB on a TPU, where
the compiler takes 15.1; not run on one yet. Compiled for them (experiments/bench/bench_compiled.py
--tables training), a step of 8 slots cannot take less than 190 ms on an H100, 1,431 ms on a v5e
chip and 432 ms on a v5p chip, bound by memory traffic (635, 1,172 and 1,194 GB); with 8 slots a
chip at a time, as long on a v5e-8 (8 chips) and on a v5p-8 (4 chips).

Published for openai/clip-vit-large-patch14 fine-tuned in full (mean test accuracy over the eight,
%): zero-shot 64.5, fine-tuned per task 94.2 (AdaMerging, arXiv 2310.02575).
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
