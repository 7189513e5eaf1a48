"""MaTU and others on image folders: what federating adds to training alone.

    python experiments/make_example_folders.py my-images
    python -m matu_jax.prepare --config experiments/own_folders_compared.py
    python -m matu_jax.compare --config experiments/own_folders_compared.py --tune
    python -m matu_jax.compare --config experiments/own_folders_compared.py

The folders and the model of experiments/own_folders.py, with 48 training images a slot in place of
hundreds: who has hundreds needs nobody. For other folders: --config.data.folders=DIR. Results:
results/own_folders_compared/report.md.
"""

from matu_jax.comparison.plan import Comparison, Setting
from matu_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    LocalConfig,
    ModelConfig,
)


def get_config():
    return Comparison(
        title="Image folders of one's own",
        experiment=Config(
            rounds=6,
            data=DataConfig(
                folders="my-images", clients=8, tasks_per_client=2, examples_per_slot=48
            ),
            model=ModelConfig(head="trained"),
            local=LocalConfig(steps=20, batch_examples=16, learning_rate=3e-3),
            evaluation=EvaluationConfig(every_rounds=3),
            checkpoint=CheckpointConfig(every_rounds=6),
        ),
        settings={
            "folders": Setting(
                "Four folders of real pictures, eight clients with two each, four holders a "
                "folder, 48 images a slot.",
                {},
                seconds=45,
            )
        },
        arms={
            "matu": {},
            "per_task": {"algorithm": "per_task"},
            "individual": {"algorithm": "individual"},
            "fedavg": {"algorithm": "fedavg"},
            "untrained": {"algorithm": "untrained", "rounds": 1, "local.steps": 1},
        },
        seeds=(0, 1, 2),
        search={"local.learning_rate": (3e-3, 1e-2)},
        trials=3,
        tuned="results/own_folders_compared/tuned.json",
    )
