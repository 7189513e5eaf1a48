"""What each choice of MaTU's server is worth, in a setting of conflict and two of kinship.

    python -m matu_jax.compare --config experiments/ablation8.py

The default rule (uploads of changes, transfer by shrinkage) was chosen on the settings "pairs" and
"kin" with seed 0; seeds 1 and 2, and the setting "other kin", are fresh for it. All arms but those
that name rho have rho = 0.4; it is 0 by default since the arm "rho = 0" won: see ablation_rules.py.
"""

import dataclasses
from pathlib import Path

from matu_jax.comparison.plan import Setting
from matu_jax.runs.commandline import run_file

DOMAINS = ("handwritten", "grating", "clutter", "noise", "plaid")


def tasks(attributes, domains):
    return ",".join(f"{a}/{d}" for a in attributes for d in domains)


# Where a task has one holder, the gate of eq. 5 and the fold of the uploads do nothing.
OF_KIN = (
    "matu",
    "no transfer",
    "transfer: mean of 1",
    "transfer: mean of 3",
    "transfer: mean of 4",
    "per_task",
)

SETTINGS = {  # besides those of compare8
    "other kin": Setting(
        "As kin, with three other questions about three kinds of images.",
        {
            "data.tasks": tasks(("position", "flow", "ground"), DOMAINS[1:4]),
            "data.clients": 9,
            "data.tasks_per_client": 1,
            "data.examples_per_slot": 32,
        },
        seconds=20,
        arms=OF_KIN,
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
    shipped = run_file(Path(__file__).with_name("compare8.py"))
    return dataclasses.replace(
        shipped,
        title="Ablations of MaTU's server",
        experiment=shipped.experiment.with_fields(
            {"matu.agreement_threshold": 0.4, "evaluation.every_rounds": 4}
        ),
        settings={
            "pairs": shipped.settings["pairs"],
            "kin": dataclasses.replace(shipped.settings["kin"], arms=OF_KIN),
            **SETTINGS,
        },
        arms=ARMS,
        search={},
        own_search={},
        tuned="",
    )
