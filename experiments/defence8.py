"""What the defences that are on by default cost where nobody lies.

    python -m matu_jax.compare --config experiments/defence8.py

In the quickstart's federation, and where the labels of a task's holders are skewed, so that honest
clients differ a good deal from each other. `attacks4.py` shows what the defences are for.
"""

import dataclasses
from pathlib import Path

from matu_jax.commandline import run_file

DEFENDED = {"defence.clip": 1.5, "defence.weighting": "agreement"}
ARMS = {
    "matu": DEFENDED,
    "matu, undefended": {},
    "per_task": {"algorithm": "per_task", **DEFENDED},
    "fedavg": {"algorithm": "fedavg", **DEFENDED},
}


def get_config():
    shipped = run_file(Path(__file__).with_name("compare8.py"))
    skewed = run_file(Path(__file__).with_name("settings8.py")).settings["skew 0.1"]
    return dataclasses.replace(
        shipped,
        title="What the default defences cost",
        settings={
            "skew 0.1": dataclasses.replace(skewed, arms=("matu", "matu, undefended")),
            "pairs": shipped.settings["pairs"],
        },
        arms=ARMS,
        reference="matu, undefended",
        search={},
        own_search={},
        tuned="",
    )
