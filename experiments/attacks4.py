"""Clients that lie, and what defends against them: MaTU and FedAvg with the same defences.

    python -m matu_jax.compare --config experiments/attacks4.py

Four tasks with five holders each, of whom one lies about both of its tasks in every round (two who
agree on their lie in "collusion"); "nobody lies" is what the defences cost. `matu_jax.attacks` says
what a lie is, `matu_jax.AggregationConfig` what a defence does. The arms without a word behind them
have the defences that are on by default.
"""

import dataclasses
from pathlib import Path

from matu_jax.commandline import run_file
from matu_jax.comparison.plan import Setting

TASKS = "hue/handwritten,hue/grating,tilt/handwritten,tilt/grating"
DEFENCES = {  # the first is the default of every experiment
    "": {"defence.clip": 1.5, "defence.weighting": "agreement"},
    ", clip": {"defence.clip": 1.5},
    ", clip and trim": {"defence.clip": 1.5, "defence.trim": 1},
    ", undefended": {},
}
ALL = ()
OF_MATU = ("matu", "matu, clip", "matu, undefended")
SOME = (*OF_MATU, "fedavg, clip")
MOST = (*OF_MATU, "matu, clip and trim", "fedavg", "fedavg, clip")
ATTACKS = {
    "nobody lies": ("Nobody lies.", {"kind": "none"}, ALL),
    "sign flip": ("One holder in five sends the opposite.", {"kind": "sign_flip"}, ALL),
    "scaling x 100": (
        "One holder in five sends a hundred times what it trained.",
        {"kind": "scaling", "strength": 100.0},
        ALL,
    ),
    "collusion": (
        "Two holders in five agree on the opposite of their mean.",
        {"kind": "sign_flip", "share": 0.4, "colludes": True},
        MOST,
    ),
    "noise x 10": (
        "One holder in five sends noise, ten times as long as what it trained.",
        {"kind": "noise", "strength": 10.0},
        SOME,
    ),
    "constant x 10": (
        "One holder in five sends one number everywhere, ten times as long as what it trained.",
        {"kind": "constant", "strength": 10.0},
        SOME,
    ),
    "label flip": (
        "One holder in five trains on wrong labels.",
        {"kind": "label_flip"},
        SOME,
    ),
    "masks": ("One holder in five inverts its masks.", {"kind": "masks"}, OF_MATU),
    "scales x 100": (
        "One holder in five sends scales a hundred times too large.",
        {"kind": "scales", "strength": 100.0},
        OF_MATU,
    ),
}


def get_config():
    shipped = run_file(Path(__file__).with_name("compare8.py"))
    experiment = shipped.experiment
    experiment.rounds = 6
    experiment.data.tasks = TASKS
    experiment.data.clients = 10
    experiment.local.steps = 10
    experiment.evaluation.every_rounds = 6
    experiment.defence.clip = 0.0
    experiment.defence.weighting = "examples"
    return dataclasses.replace(
        shipped,
        title="Clients that lie, and defences",
        settings={
            name: Setting(
                f"{words} Four tasks, ten clients with two tasks each, five holders a task.",
                {f"attack.{field}": value for field, value in fields.items()},
                seconds=25,
                arms=arms,
            )
            for name, (words, fields, arms) in ATTACKS.items()
        },
        arms={
            algorithm + name: {"algorithm": algorithm, **fields}
            for algorithm in ("matu", "fedavg")
            for name, fields in DEFENCES.items()
        },
        reference="matu, undefended",
        search={},
        own_search={},
        tuned="",
    )
