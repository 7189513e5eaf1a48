"""What the defences that are on by default cost where nobody lies.

    python -m matu_jax.compare --config experiments/defence8.py

In the quickstart's federation, and where the labels of a task's holders are skewed, so that honest
clients differ a good deal from each other. `attacks4.py` shows what the defences are for.
"""

import dataclasses
from pathlib import Path

from matu_jax.runs.commandline import run_file

ARMS = {
    "matu": {"defence.clip": 1.5, "defence.weighting": "agreement"},
    "matu, undefended": {},
}


def get_config():
    shipped = run_file(Path(__file__).with_name("compare8.py"))
    settings = run_file(Path(__file__).with_name("settings8.py")).settings
    return dataclasses.replace(
        shipped,
        title="What the default defences cost",
        settings={"skew 0.1": settings["skew 0.1"], "pairs": shipped.settings["pairs"]},
        arms=ARMS,
        reference="matu, undefended",
        search={},
        own_search={},
        tuned="",
    )
