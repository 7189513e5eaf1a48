"""MaTU on all thirty tasks of the embedded benchmark.

    python -m matu_jax.train --config experiments/embedded30.py

Forty-five clients hold two tasks each, so that every task has three holders of 128 training images.

Reached with --config.seed=S --config.data.seed=S --config.defence.clip=0
--config.defence.weighting=examples, S = 0, 1 and 2 (the arm "matu" of compare30): 85.4, 85.5 and
85.9 % mean test accuracy at 836 kbit up and down per client and round, AUC of the similarity 0.999,
in 3 to 4 minutes on two busy CPU cores; 72.9 % (S = 0) with matu.uploads=vector and
matu.transfer=none. With all 2,048 examples a task alone reaches 85 to 100 % on 26 of the 30 (mean
93.1 %): the same command with the fields algorithm=individual, data.clients=30,
data.tasks_per_client=1, data.examples_per_slot=0, local.steps=64, local.batch_examples=32, rounds=6
and evaluation.every_rounds=6.
"""

from matu_jax.config import Config, DataConfig, EvaluationConfig, LocalConfig


def get_config():
    return Config(
        algorithm="matu",
        rounds=8,
        data=DataConfig(tasks="embedded30", clients=45, tasks_per_client=2, examples_per_slot=128),
        local=LocalConfig(steps=20, batch_examples=16, learning_rate=3e-3),
        evaluation=EvaluationConfig(every_rounds=4),
    )
