"""Which tasks lend: what the similarity of eq. 7 compares, under a fixed rule.

    python -m matu_jax.compare --config experiments/ablation_similarity.py

Eq. 8 with kappa = 3 as a mean. "aggregated" compares the tasks' vectors as the server has averaged
them, as the paper has it; the other arms compare slots of different clients. "matu" is the default,
shrinkage. In "kin", where a task has one holder, the two are the same.
"""

import dataclasses
from pathlib import Path

from matu_jax.runs.commandline import run_file

MEAN_OF_3 = {"matu.transfer": "mean", "matu.top_k": 3}
ARMS = {
    "matu": {},
    "mean of 3": MEAN_OF_3,
    "mean of 3, aggregated": MEAN_OF_3 | {"matu.similarity": "aggregated"},
}


def get_config():
    shipped = run_file(Path(__file__).with_name("compare8.py"))
    fours = run_file(Path(__file__).with_name("ablation_rules.py")).settings["fours"]
    return dataclasses.replace(
        shipped,
        title="Ablations of which tasks lend",
        experiment=shipped.experiment.with_fields({"evaluation.every_rounds": 4}),
        settings={
            "pairs": shipped.settings["pairs"],
            "fours": dataclasses.replace(fours, arms=()),
        },
        arms=ARMS,
        reference="matu",
        search={},
        own_search={},
        tuned="",
    )
