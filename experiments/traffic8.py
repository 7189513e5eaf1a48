"""Fewer bits for MaTU's unified vectors: accuracy against traffic.

    python -m matu_jax.compare --config experiments/traffic8.py

Vectors cross the network as float32, bfloat16 or int8 with a scale for 256 parameters, up and
down; masks and scales as ever. The settings are compare8's and settings8's "fours", with seeds of
their own.
"""

import dataclasses
from pathlib import Path

from matu_jax.runs.commandline import run_file

ARMS = {
    "matu": {},
    "matu, bfloat16": {"matu.precision": "bfloat16"},
    "matu, int8": {"matu.precision": "int8"},
    "per_task": {"algorithm": "per_task"},
}


def get_config():
    shipped = run_file(Path(__file__).with_name("compare8.py"))
    others = run_file(Path(__file__).with_name("settings8.py")).settings
    return dataclasses.replace(
        shipped,
        title="MaTU with fewer bits a parameter",
        settings={**shipped.settings, "fours": others["fours"]},
        arms=ARMS,
        seeds=(3, 4, 5),
        search={},
        own_search={},
        tuned="",
    )
