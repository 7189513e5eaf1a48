"""Which tasks lend: the similarity of eq. 7, and epsilon of eq. 8, under a fixed rule.

    python -m matu_jax.compare --config experiments/ablation_similarity.py

Eq. 8 with kappa = 3 as a mean. "aggregated" compares the tasks' vectors as the server has averaged
them, as the paper has it; all other arms compare slots of different clients. Unrelated tasks have a
similarity of 0.5, which is the default of epsilon. "matu" is the default, shrinkage, which has
neither choice.
"""

import dataclasses
from pathlib import Path

from matu_jax.commandline import run_file

MEAN_OF_3 = {"matu.transfer": "mean", "matu.top_k": 3}
ARMS = {
    "matu": {},
    "mean of 3": MEAN_OF_3,
    "mean of 3, aggregated": MEAN_OF_3 | {"matu.similarity": "aggregated"},
    "mean of 3, epsilon = 0.55": MEAN_OF_3 | {"matu.min_similarity": 0.55},
}


def get_config():
    shipped = run_file(Path(__file__).with_name("compare8.py"))
    shipped.experiment.evaluation.every_rounds = 4
    return dataclasses.replace(
        shipped,
        title="Ablations of which tasks lend",
        arms=ARMS,
        reference="matu",
        search={},
        own_search={},
        tuned="",
    )
