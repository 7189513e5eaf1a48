"""What each choice of MaTU's server is worth, on two settings of conflict and two of kinship.

    python -m matu_jax.compare --config experiments/ablation8.py

The default rule (uploads of changes, transfer by shrinkage) was chosen on the settings "pairs" and
"kin" with seed 0; seeds 1 and 2, and the settings "other pairs" and "other kin", are fresh for it.
"""

from matu_jax.comparison.plan import Comparison, Setting
from matu_jax.config import default

DOMAINS = ("handwritten", "grating", "clutter", "noise", "plaid")


def tasks(attributes, domains):
    return ",".join(f"{a}/{d}" for a in attributes for d in domains)


SETTINGS = {
    "pairs": Setting(
        "Twelve clients hold two tasks each, three holders a task, 128 images a slot: most tasks "
        "contradict each other.",
        {},
        seconds=40,
    ),
    "kin": Setting(
        "Ten clients hold one task each, two questions about five kinds of images, 32 images each: "
        "few data, and four related tasks for every task.",
        {
            "data.tasks": tasks(("hue", "tilt"), DOMAINS),
            "data.clients": 10,
            "data.tasks_per_client": 1,
            "data.examples_per_slot": 32,
        },
        seconds=20,
    ),
    "other pairs": Setting(
        "As pairs, with other questions about other kinds of images.",
        {"data.tasks": tasks(("hue", "position", "tilt", "ground"), ("clutter", "plaid"))},
        seconds=40,
    ),
    "other kin": Setting(
        "As kin, with three other questions about three kinds of images.",
        {
            "data.tasks": tasks(("position", "flow", "ground"), DOMAINS[1:4]),
            "data.clients": 9,
            "data.tasks_per_client": 1,
            "data.examples_per_slot": 32,
        },
        seconds=20,
    ),
}

ARMS = {
    "matu": {},
    "no transfer": {"matu.transfer": "none"},
    "transfer: mean of 1": {"matu.transfer": "mean", "matu.top_k": 1},
    "transfer: mean of 3": {"matu.transfer": "mean", "matu.top_k": 3},
    "transfer: mean of 4": {"matu.transfer": "mean", "matu.top_k": 4},
    "rho = 0": {"matu.agreement_threshold": 0.0},
    "rho = 1": {"matu.agreement_threshold": 1.0},
    "maximum magnitude": {"matu.magnitude": "max"},
    "vectors, no transfer": {"matu.uploads": "vector", "matu.transfer": "none"},
    "vectors, mean of 3": {"matu.uploads": "vector", "matu.transfer": "mean", "matu.top_k": 3},
    "vectors, maximum, no transfer": {
        "matu.uploads": "vector",
        "matu.transfer": "none",
        "matu.magnitude": "max",
    },
    "per_task": {"algorithm": "per_task"},
}


def get_config():
    experiment = default()
    experiment.rounds = 8
    experiment.data.clients = 12
    experiment.data.tasks_per_client = 2
    experiment.data.examples_per_slot = 128
    experiment.local.steps = 20
    experiment.local.batch_examples = 16
    experiment.local.learning_rate = 3e-3
    experiment.matu.magnitude = "mean"
    experiment.matu.uploads = "change"
    experiment.matu.transfer = "shrinkage"
    experiment.evaluation.every_rounds = 4
    experiment.checkpoint.every_rounds = 8
    return Comparison(
        title="Ablations of MaTU's server",
        experiment=experiment,
        settings=SETTINGS,
        arms=ARMS,
        seeds=(0, 1, 2),
    )
