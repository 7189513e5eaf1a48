"""MaTU and its rivals on all thirty tasks of the embedded benchmark.

    python -m matu_jax.compare --config experiments/compare30.py

Forty-five clients hold two tasks each, so that every task has three holders of 128 images. Every
arm has the fields that a search like compare8's has chosen for it, with four trials instead of six:
on eight of these tasks, on validation accuracy and a seed of its own. It can be made in pieces:
--seeds 0, then --seeds 0,1, and so on.
"""

import dataclasses
from pathlib import Path

from matu_jax.comparison.plan import Setting
from matu_jax.runs.commandline import run_file

SETTINGS = {
    "thirty": Setting(
        "Thirty tasks, forty-five clients with two tasks each, three holders a task, 128 images a "
        "slot: six questions, which contradict each other, about five kinds of images.",
        {
            "data.tasks": "embedded30",
            "data.clients": 45,
            "evaluation.every_rounds": 4,
        },
        seconds=150,
    ),
}


def get_config():
    shipped = run_file(Path(__file__).with_name("compare8.py"))
    fedrep = shipped.arms["fedrep"] | {"fedrep.personal_fraction": 0.5}  # the default of then
    return dataclasses.replace(
        shipped,
        title="MaTU and its rivals on thirty tasks",
        settings=SETTINGS,
        arms={**shipped.arms, "fedrep": fedrep},
        search={},
        own_search={},
        tuned="results/compare30/tuned.json",
    )
