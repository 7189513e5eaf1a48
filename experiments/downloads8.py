"""What clients receive: one unified vector, or the vectors of their tasks.

    python -m matu_jax.compare --config experiments/downloads8.py

Folding on the way down is what MaTU loses most by (ablation_fold). A server that keeps exact task
vectors can send each client those of its tasks instead: k vectors for k tasks, which in int8 are
less traffic than one unified vector in float32 up to four tasks. Arms in which tasks are handed out
like this are called "apart"; clients fold what they send in all arms of MaTU. The settings are
those of compare8 and settings8 in which clients have several tasks, with seeds of their own; all
arms of MaTU have the fields that compare8's search has chosen for it, the others their own.
"""

import dataclasses
from pathlib import Path

from matu_jax.comparison.plan import read_tuned
from matu_jax.runs.commandline import run_file

APART, INT8 = {"matu.downloads": "task_vectors"}, {"matu.precision": "int8"}
OF_MATU = {
    "matu": {},
    "matu, int8": INT8,
    "matu, apart": APART,
    "matu, int8 apart": APART | INT8,
}
RIVALS = ("per_task", "matfl")


def get_config():
    here = Path(__file__).parent
    shipped, others = run_file(here / "compare8.py"), run_file(here / "settings8.py")
    arms = read_tuned(here / "results/compare8/tuned.json")["arms"]
    chosen = {label: arm["chosen"] for label, arm in arms.items()}
    return dataclasses.replace(
        shipped,
        title="What MaTU's clients receive",
        experiment=shipped.experiment.with_fields({"evaluation.every_rounds": 4}),
        settings={
            "pairs": shipped.settings["pairs"],
            **{name: s for name, s in others.settings.items() if name != "solo"},
        },
        arms={
            **{label: {**chosen["matu"], **fields} for label, fields in OF_MATU.items()},
            **{label: {**shipped.arms[label], **chosen[label]} for label in RIVALS},
        },
        ours="matu, int8 apart",
        seeds=(3, 4, 5),
        search={},
        own_search={},
        tuned="",
    )
