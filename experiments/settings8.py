"""MaTU and its main rivals in more federations than compare8's two.

    python -m matu_jax.compare --config experiments/settings8.py

Every arm has the fields that compare8's search has chosen for it. Choose with --settings: clients
with one or four tasks, clients whose tasks contradict each other by construction, clients with one
task of each of two families, labels that are skewed between a task's holders, and clients of whom
30 % take part in a round. Results: results/settings8/report.md.
"""

import dataclasses
from pathlib import Path

from matu_jax.comparison.plan import Setting
from matu_jax.runs.commandline import run_file

# Tasks 0 to 3 ask four questions about handwriting, 4 to 7 the same about gratings.
PAIRS = ((0, 1), (2, 3), (0, 2), (1, 3), (0, 3), (1, 2))
CONFLICTING = tuple((a + first, b + first) for first in (0, 4) for a, b in PAIRS)
# Another question about the other kind of images: nothing that a client's two tasks have in common.
DISTANT = tuple((a, 4 + b) for a in range(4) for b in range(4) if a != b)

SETTINGS = {
    "solo": Setting(
        "Eight tasks, twenty-four clients with one task each, three holders a task, 128 images.",
        {"data.clients": 24, "data.tasks_per_client": 1},
        seconds=45,
    ),
    "fours": Setting(
        "Eight tasks, six clients with four tasks each, three holders a task, 128 images a slot.",
        {"data.clients": 6, "data.tasks_per_client": 4},
        seconds=45,
    ),
    "conflict": Setting(
        "As pairs, but both tasks of a client are about the same kind of images, so that they "
        "always contradict each other.",
        {"data.assignment": CONFLICTING},
        seconds=45,
    ),
    "distant": Setting(
        "As pairs, but the two tasks of a client are of the most distant families: another "
        "question about the other kind of images.",
        {"data.assignment": DISTANT},
        seconds=45,
    ),
    "skew 0.5": Setting(
        "As pairs, with the labels of a task's holders drawn from a Dirichlet distribution, 0.5.",
        {"data.dirichlet_alpha": 0.5},
        seconds=45,
    ),
    "skew 0.1": Setting(
        "As pairs, with the labels of a task's holders drawn from a Dirichlet distribution, 0.1.",
        {"data.dirichlet_alpha": 0.1},
        seconds=45,
    ),
    "part-time": Setting(
        "Twenty clients with two tasks each, five holders a task, of whom six (30 %) take part in "
        "each of sixteen rounds, 128 images a slot.",
        {
            "data.clients": 20,
            "clients_per_round": 6,
            "rounds": 16,
            "evaluation.every_rounds": 8,
            "checkpoint.every_rounds": 16,
        },
        seconds=45,
    ),
}
ARMS = ("matu", "per_task", "fedavg", "matfl")


def get_config():
    shipped = run_file(Path(__file__).with_name("compare8.py"))
    return dataclasses.replace(
        shipped,
        title="MaTU and its main rivals in other federations",
        experiment=shipped.experiment.with_fields({"evaluation.every_rounds": 4}),
        settings=SETTINGS,
        arms={label: shipped.arms[label] for label in ARMS},
        search={},
        own_search={},
    )
