"""MaTU and its rivals on eight tasks of the embedded benchmark.

    python -m matu_jax.compare --config experiments/compare8.py

Two settings: "pairs", where clients hold two tasks each and most tasks contradict each other, and
"kin", where every client holds one task with few images and has four relatives among the others.
Three seeds each. Results, and how long it took: results/compare8/report.md.
"""

from matu_jax.comparison.plan import Comparison, Setting
from matu_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    DefenceConfig,
    EvaluationConfig,
    LocalConfig,
)

DOMAINS = ("handwritten", "grating", "clutter", "noise", "plaid")

SETTINGS = {
    "pairs": Setting(
        "Eight tasks, twelve clients with two tasks each, three holders a task, 128 images a slot: "
        "most tasks contradict each other.",
        {},
        seconds=48,
    ),
    "kin": Setting(
        "Ten tasks, ten clients with one task each: two questions about five kinds of images, 32 "
        "images a slot. Few data, and four related tasks for every task.",
        {
            "data.tasks": ",".join(f"{a}/{d}" for a in ("hue", "tilt") for d in DOMAINS),
            "data.clients": 10,
            "data.tasks_per_client": 1,
            "data.examples_per_slot": 32,
        },
        seconds=20,
    ),
}

ARMS = {
    "matu": {},
    "matu (paper's server)": {
        "matu.uploads": "vector",
        "matu.magnitude": "max",
        "matu.agreement_threshold": 0.4,
        "matu.transfer": "mean",
    },
    "per_task": {"algorithm": "per_task"},
    "individual": {"algorithm": "individual"},
    "fedavg": {"algorithm": "fedavg"},
    "fedprox": {"algorithm": "fedprox"},
    "fedper": {"algorithm": "fedper"},
    "fedrep": {"algorithm": "fedrep"},
    "matfl": {"algorithm": "matfl"},
    "ntk_fedavg": {"algorithm": "ntk_fedavg"},
    "ties": {"algorithm": "ties"},
    "emr_one_shot": {"algorithm": "emr_one_shot"},
    "fed_lora_b": {"algorithm": "fed_lora_b"},
}

OWN_SEARCH = {
    "matu": {"matu.agreement_threshold": (0.0, 0.4)},
    "matu (paper's server)": {"matu.transfer": ("mean", "none")},
    "fedprox": {"fedprox.mu": (0.01, 0.1)},
    "fedper": {"fedper.personal_blocks": (1, 2)},
    "fedrep": {"fedrep.personal_blocks": (1, 2)},
    "matfl": {"matfl.threshold": (0.0, -0.2)},
    "ties": {"ties.keep": (0.2, 0.5)},
}


def get_config():
    experiment = Config(
        rounds=8,
        data=DataConfig(tasks="embedded8", clients=12, tasks_per_client=2, examples_per_slot=128),
        local=LocalConfig(steps=20, batch_examples=16, learning_rate=3e-3),
        evaluation=EvaluationConfig(every_rounds=2),
        checkpoint=CheckpointConfig(every_rounds=8),
        # Nobody lies here; recorded before there were defences.
        defence=DefenceConfig(clip=0.0, weighting="examples"),
    )
    return Comparison(
        title="MaTU and its rivals on the embedded benchmark",
        experiment=experiment,
        settings=SETTINGS,
        arms=ARMS,
        seeds=(0, 1, 2),
        search={"local.learning_rate": (3e-3, 1e-3, 1e-2)},
        own_search=OWN_SEARCH,
        trials=6,
        tuned="results/compare8/tuned.json",
    )
