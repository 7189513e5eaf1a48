"""The server's rules around today's defaults, and on conflicts that no rule was chosen on.

    python -m matu_jax.compare --config experiments/ablation_rules.py

ablation8 had the gate of eq. 5 at rho = 0.4 and led to the default of 0; here all arms that name no
rho have 0. "other pairs" asks other questions about other kinds of images than "pairs", on which
the rule for transfer was designed; in "fours" every client holds tasks that contradict each other.
"""

import dataclasses
from pathlib import Path

from matu_jax.comparison.plan import Setting
from matu_jax.runs.commandline import run_file

MEAN_OF_3 = {"matu.transfer": "mean", "matu.top_k": 3}
ARMS = {
    "matu": {},
    "no transfer": {"matu.transfer": "none"},
    "mean of 1": {"matu.transfer": "mean", "matu.top_k": 1},
    "mean of 3": MEAN_OF_3,
    "mean of 3, epsilon = 0.51": MEAN_OF_3 | {"matu.min_similarity": 0.51},
    "additive": MEAN_OF_3 | {"matu.transfer": "additive"},
    "rho = 0.2": {"matu.agreement_threshold": 0.2},
    "rho = 0.4": {"matu.agreement_threshold": 0.4},
    "rho = 0.6": {"matu.agreement_threshold": 0.6},
    "rho = 1": {"matu.agreement_threshold": 1.0},
    "maximum magnitude": {"matu.magnitude": "max"},
    "per_task": {"algorithm": "per_task"},
}


def get_config():
    shipped = run_file(Path(__file__).with_name("compare8.py"))
    pairs, kin = shipped.settings["pairs"], shipped.settings["kin"]
    other = Setting(
        "As pairs, with other questions about other kinds of images.",
        {
            "data.tasks": ",".join(
                f"{question}/{images}"
                for question in ("hue", "position", "tilt", "ground")
                for images in ("clutter", "plaid")
            )
        },
        seconds=40,
        arms=("matu", "no transfer", "mean of 1", "mean of 3", "rho = 0.4", "rho = 1", "per_task"),
    )
    fours = Setting(
        "Eight tasks, six clients with four tasks each, three holders a task, 128 images a slot: "
        "every client holds tasks that contradict each other.",
        {"data.clients": 6, "data.tasks_per_client": 4},
        seconds=40,
        arms=(
            "matu",
            "no transfer",
            "mean of 3",
            "mean of 3, epsilon = 0.51",
            "additive",
            "rho = 0.2",
            "rho = 0.6",
            "rho = 1",
            "maximum magnitude",
        ),
    )
    return dataclasses.replace(
        shipped,
        title="Ablations of the server's rules",
        experiment=shipped.experiment.with_fields({"evaluation.every_rounds": 4}),
        settings={
            "other pairs": other,
            "pairs": dataclasses.replace(pairs, arms=("matu", "rho = 0.2", "rho = 0.6")),
            "kin": dataclasses.replace(
                kin, arms=("matu", "mean of 3", "mean of 3, epsilon = 0.51", "additive")
            ),
            "fours": fours,
        },
        arms=ARMS,
        search={},
        own_search={},
        tuned="",
    )
