"""MaTU and its rivals on image folders: digits and photographs as several scanners show them.

    python experiments/make_example_folders.py my-scans --scanners
    python -m matu_jax.prepare --config experiments/own_images.py
    python -m matu_jax.compare --config experiments/own_images.py --tune   # learning rates
    python -m matu_jax.compare --config experiments/own_images.py

Eight folders of pictures that come with scikit-learn and matplotlib: which digit, whether it is
even, and from which of three photographs a crop is, each as it is, as a negative, or on its side.
None of them is of Fashion-MNIST: with Debian's package dataset-fashion-mnist or without it, the
folders and the results are the same.
What trains are adapters of the small backbone that comes with the package, and a head per task.
With `--config.data.folders=my-images` given to prepare and compare, the same comparison is made on
folders of one's own. Results: results/own_images/report.md; own_folders.md has, for four other
tasks, what regressions on pixels and a random backbone reach.
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
        title="Image folders of several scanners",
        experiment=Config(
            rounds=6,
            data=DataConfig(
                tasks="folders",
                folders="my-scans",
                clients=12,
                tasks_per_client=2,
                examples_per_slot=48,
            ),
            model=ModelConfig(head="trained"),
            local=LocalConfig(steps=15, batch_examples=16, learning_rate=3e-3),
            evaluation=EvaluationConfig(every_rounds=2),
            checkpoint=CheckpointConfig(every_rounds=6),
        ),
        settings={
            "scanners": Setting(
                "Three questions on up to three scanners, eight tasks, twelve clients with two "
                "each, three holders a task, 48 images a slot.",
                {},
                seconds=30,
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
        search={"local.learning_rate": (3e-3, 1e-2, 1e-3, 3e-4)},
        trials=5,
        tuned="results/own_images/tuned.json",
    )
