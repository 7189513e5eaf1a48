"""What clients receive, on all thirty tasks: downloads8's question in compare30's federation.

    python -m matu_jax.compare --config experiments/downloads30.py

The fields are downloads8's, chosen on eight of these tasks; so are the seeds.
"""

import dataclasses
from pathlib import Path

from matu_jax.runs.commandline import run_file

ARMS = ("matu", "matu, int8 apart", "per_task", "matfl")


def get_config():
    here = Path(__file__).parent
    downloads = run_file(here / "downloads8.py")
    return dataclasses.replace(
        downloads,
        title="What MaTU's clients receive, on thirty tasks",
        settings=run_file(here / "compare30.py").settings,
        arms={label: downloads.arms[label] for label in ARMS},
    )
