"""A table to try `experiments/own_table.py` with: patients of four hospitals, three measurements.

    python experiments/make_example_table.py my-table.csv

Nothing is downloaded: the 442 patients are of scikit-learn's diabetes data, dealt out to hospitals
at random. A row is a patient and a task; `group` keeps the rows of a patient in one split.
"""

import csv
import sys
from pathlib import Path

import numpy as np
from sklearn.datasets import load_diabetes

# All of scikit-learn's columns, in its order: what is known of a patient, and what is asked.
FEATURES = ("age", "sex", "bmi", "bp", "s1", "s2", "s3", "s4")
TARGETS = {"triglycerides": "s5", "blood sugar": "s6"}  # and the progression after a year
HOSPITALS = ("east", "north", "south", "west")


def rows():
    """The header, and a row per patient and task."""
    table, progression = map(np.asarray, load_diabetes(return_X_y=True, scaled=False))
    columns = dict(zip((*FEATURES, *TARGETS.values()), table.T.tolist(), strict=True))
    labels = {task: columns[name] for task, name in TARGETS.items()}
    labels["progression"] = progression.tolist()
    hospitals = np.random.default_rng(0).choice(HOSPITALS, len(table))
    yield (*FEATURES, "label", "task", "site", "group")
    for task, values in labels.items():
        for patient, (value, hospital) in enumerate(zip(values, hospitals, strict=True)):
            features = (columns[name][patient] for name in FEATURES)
            yield (*features, value, task, hospital, patient)


def main(argv):
    if len(argv) != 2 or Path(argv[1]).exists():
        print("usage: make_example_table.py FILE, which is not there yet", file=sys.stderr)
        return 2
    with open(argv[1], "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
