"""Clients that lie, and what defends against them: MaTU and FedAvg with the same defences.

    python -m matu_jax.compare --config experiments/attacks4.py

Four tasks with five holders each, of whom one lies about both of its tasks in every round (two who
agree on their lie in "collusion"), and with ten holders each, of whom three agree on their lie.
"nobody lies" and its variants are what the defences cost, "skewed" with labels that differ between
a task's holders, so that honest clients look like liars. `matu_jax.scenarios.attacks` says what a
lie is, `matu_jax.AggregationConfig` what a defence does. The arms without a word behind them have
the defences that are on by default; "maximum" is eq. 2 as the paper has it; "trim", alone, is run
where numbers are so large that nothing else of them may be left in a sum.
"""

import dataclasses
from pathlib import Path

from matu_jax.comparison.plan import Setting
from matu_jax.runs.commandline import run_file

TASKS = "hue/handwritten,hue/grating,tilt/handwritten,tilt/grating"
DEFENCES = {  # the first is the default of every experiment
    "": {"defence.clip": 1.5, "defence.weighting": "agreement"},
    ", clip": {"defence.clip": 1.5},
    ", clip and trim": {"defence.clip": 1.5, "defence.trim": 1},
    ", undefended": {},
}
TRIM = {", trim": {"defence.trim": 1}}  # alone, against the numbers that it is there for
ALL = (*(f"{name}{words}" for name in ("matu", "fedavg") for words in DEFENCES), "matu, maximum")
OF_MATU = tuple(f"matu{name}" for name in DEFENCES)
DEFENDED = (*OF_MATU, *(f"fedavg{name}" for name in DEFENCES))
SOME = ("matu", "matu, undefended", "fedavg")
FIVE = "Four tasks, ten clients with two tasks each, five holders a task."
TEN = "Four tasks, twenty clients with two tasks each, ten holders a task."
ATTACKS = {
    "nobody lies": (f"Nobody lies. {FIVE}", {"kind": "none"}, ALL),
    "sign flip": (f"One holder in five sends the opposite. {FIVE}", {"kind": "sign_flip"}, ALL),
    "scaling x 100": (
        f"One holder in five sends a hundred times what it trained. {FIVE}",
        {"kind": "scaling", "strength": 100.0},
        ALL,
    ),
    "noise x 10": (
        f"One holder in five sends noise, ten times as long as what it trained. {FIVE}",
        {"kind": "noise", "strength": 10.0},
        ALL,
    ),
    "constant x 10": (
        "One holder in five sends one number everywhere, ten times as long as what it trained. "
        + FIVE,
        {"kind": "constant", "strength": 10.0},
        DEFENDED,
    ),
    "label flip": (
        f"One holder in five trains on wrong labels. {FIVE}",
        {"kind": "label_flip"},
        DEFENDED,
    ),
    "masks": (f"One holder in five inverts its masks. {FIVE}", {"kind": "masks"}, OF_MATU),
    "scales x 100": (
        f"One holder in five sends scales a hundred times too large. {FIVE}",
        {"kind": "scales", "strength": 100.0},
        OF_MATU,
    ),
    "hidden scales x 100": (
        "One holder in five sends a vector 1e-25 times as long and scales 1e27 times as large. "
        + FIVE,
        {"kind": "hidden", "strength": 100.0},
        (*OF_MATU, "matu, trim"),
    ),
    "constant x 1e10": (
        "One holder in five sends one number everywhere, 1e10 times as long as what it trained; "
        "undefended, training fails from the second round on, and so it does for FedAvg with trim "
        f"alone, since two of its ten clients lie. {FIVE}",
        {"kind": "constant", "strength": 1e10},
        ("matu", "matu, trim", "fedavg"),
    ),
    "collusion": (
        f"Two holders in five agree on the opposite of their mean. {FIVE}",
        {"kind": "sign_flip", "share": 0.4, "colludes": True},
        DEFENDED,
    ),
    "nobody lies, ten holders": (f"Nobody lies. {TEN}", {"kind": "none"}, SOME),
    "collusion of 3 in 10": (
        f"Three holders in ten agree on the opposite of their mean. {TEN}",
        {"kind": "sign_flip", "share": 0.3, "colludes": True},
        SOME,
    ),
    "nobody lies, skewed 0.5": (
        "Nobody lies, labels of a task's holders from a Dirichlet distribution, 0.5. " + FIVE,
        {"kind": "none"},
        OF_MATU,
    ),
    "nobody lies, skewed 0.1": (
        "Nobody lies, labels of a task's holders from a Dirichlet distribution, 0.1. " + FIVE,
        {"kind": "none"},
        OF_MATU,
    ),
}


def _fields(words, fields):
    found = {f"attack.{field}": value for field, value in fields.items()}
    if TEN in words:
        found["data.clients"] = 20
    if "Dirichlet" in words:
        found["data.dirichlet_alpha"] = 0.5 if "0.5" in words else 0.1
    return found


def get_config():
    shipped = run_file(Path(__file__).with_name("compare8.py"))
    experiment = shipped.experiment.with_fields(
        {
            "rounds": 6,
            "data.tasks": TASKS,
            "data.clients": 10,
            "local.steps": 10,
            "evaluation.every_rounds": 6,
            "defence.clip": 0.0,
            "defence.weighting": "examples",
        }
    )
    return dataclasses.replace(
        shipped,
        title="Clients that lie, and defences",
        experiment=experiment,
        settings={
            name: Setting(words, _fields(words, fields), seconds=25, arms=arms)
            for name, (words, fields, arms) in ATTACKS.items()
        },
        arms={
            algorithm + name: {"algorithm": algorithm, **fields}
            for algorithm in ("matu", "fedavg")
            for name, fields in (DEFENCES | TRIM).items()
            if algorithm == "matu" or name not in TRIM
        }
        | {"matu, maximum": {"matu.magnitude": "max"}},
        reference="matu, undefended",
        search={},
        own_search={},
        tuned="",
    )
