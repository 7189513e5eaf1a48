"""MaTU on the eight vision tasks of the task-vector literature, with CLIP ViT-B/32 and LoRA.

    python -m matu_jax.prepare --config experiments/vitb32.py     # once; needs a network
    python -m matu_jax.train --config experiments/vitb32.py

and without network, data or checkpoint, to see that it runs and what memory it takes:

    python -m matu_jax.train --config experiments/vitb32.py --config.model.checkpoint=random \
        --config.data=synthetic

Thirty clients hold two of SUN397, Cars, RESISC45, EuroSAT, SVHN, GTSRB, MNIST and DTD each; a
task's training images are divided among its holders by Dirichlet(0.5) over them, class by class.
Zero-shot heads from class names are frozen; adapters of rank 16 train.

Hardware, at bfloat16 and 20 of the 60 slots at a time: predicted are 8.8 GB of memory on an NVIDIA
H100 and 9.8 GB on a TPU v5e or v5p. It has not been run on one yet, so neither time nor accuracy is
known, but it has been compiled for them (experiments/bench/bench_compiled.py --tables training):
a step cannot take less than 24 ms on an H100, 163 ms on a v5e chip and 58 ms on a v5p chip, each
bound by memory traffic (80, 134 and 159 GB). By the slots of a chip, of which none waits for
another, that is 65 ms on a v5e-8 (8 chips of 8 slots) and 43 ms on a v5p-8 (4 chips of 15).
Learning rate, steps and rounds are first guesses, not tuned.

Published for openai/clip-vit-base-patch32 fine-tuned in full on all data of each task (mean test
accuracy over the eight, %): zero-shot 48.0, fine-tuned per task 90.5, weight averaging 65.8, task
arithmetic 69.1, TIES 72.4 (Yang et al., AdaMerging, arXiv 2310.02575). None of these is federated.
"""

from matu_jax.config import Config, DataConfig, EvaluationConfig, LocalConfig, ModelConfig


def get_config():
    return Config(
        algorithm="matu",
        rounds=50,
        data=DataConfig(
            tasks="vision8",
            clients=30,
            tasks_per_client=2,
            examples_per_slot=0,
            dirichlet_alpha=0.5,
        ),
        model=ModelConfig(
            architecture="clip_vit_b32",
            checkpoint="openai/clip-vit-base-patch32",
            lora_rank=16,
            lora_alpha=32.0,
            lora_targets=("query", "key", "value", "out"),
            head="frozen",
            logit_scale=0.0,
            compute_dtype="bfloat16",
        ),
        local=LocalConfig(steps=50, batch_examples=32, learning_rate=1e-3, parallel_slots=20),
        evaluation=EvaluationConfig(every_rounds=10, batch_examples=32, max_examples=2000),
    )
