"""A comparison with invented numbers, as comparison.json holds one."""

import itertools

import numpy as np

ARMS = (
    "per_task",
    "matu",
    "matu, maximum",
    "matu, transfer",
    "fedavg",
    "fedprox",
    "individual",
    "fedper",
    "matfl",
    "ntk-fedavg",
    "emr at the server",
    "ties",
)


ATTRIBUTES = ("hue", "position", "tilt", "flow", "ground", "shape")


DOMAINS = ("handwritten", "grating", "clutter", "noise", "plaid")


def one_arm(label, tasks, spaces, rounds, clients, rng):
    level = {"per_task": 0.9, "fedavg": 0.4, "fedprox": 0.42, "individual": 0.72}
    mean = level.get(label, 0.84 + 0.02 * float(rng.normal()))
    easy = np.linspace(-0.12, 0.09, len(tasks))
    each = np.clip(mean + easy + rng.normal(0, 0.03, len(tasks)), 0.05, 0.99)
    mean, steps = float(each.mean()), [r for r in range(1, rounds + 1) if r % 2 == 0]
    bits = {"individual": 0.0, "per_task": 1_573_000.0, "fedavg": 786_000.0}.get(label, 836_000.0)
    related = np.equal.outer(spaces, spaces)
    matrix = 0.5 + 0.06 * related + rng.normal(0, 0.015, related.shape)
    similarity = {
        "auc_mean": 0.91,
        "auc_first_round": 0.87,
        "auc_last_round": None,
        "matrix": ((matrix + matrix.T) / 2).tolist(),
    }
    return {
        "label": label,
        "algorithm": label.split(",")[0],
        "overrides": {"local.learning_rate": 0.003} if label != "per_task" else {},
        "commands": [
            f"python -m matu_jax.train --config experiments/compare.py "
            f"--config.algorithm={label.split(',')[0]} --config.seed={seed}"
            for seed in range(5)
        ],
        "accuracy": {
            "mean": mean,
            "std": 0.004 + 0.01 * float(rng.uniform()),
            "per_seed": [mean - 0.01, mean, mean, mean, mean + 0.01],
            "validation_mean": mean + 0.005,
            "per_task": {
                task: {"mean": float(value), "std": 0.01}
                for task, value in zip(tasks, each, strict=True)
            },
        },
        "curve": {
            "rounds": steps,
            "mean": [mean * (1 - 0.8 * np.exp(-r / 2)) for r in steps],
            "std": [0.02] * len(steps),
        },
        "communication": {
            "uplink_bits_per_client_round": bits,
            "downlink_bits_per_client_round": bits / 2,
            "uplink_bits_total": bits * clients * rounds,
            "downlink_bits_total": bits * clients * rounds / 2,
        },
        "server_state_bytes": 1_572_864.0,
        "server_state_per_client": label in ("fedper", "individual"),
        "seconds": {
            "local_training": 123.4,
            "client_unify": 1.26,
            "server_aggregation": 0.0123,
            "total": 140.0,
        },
        "rounds_to_95": {"mean": 4.0, "reached": 2 if label == "ties" else 3, "of": 3},
        "similarity": similarity if label.startswith("matu") else None,
        "against_ours": None
        if label == "matu"
        else {
            "difference": mean - 0.84,
            "p_value": 0.0002 if abs(mean - 0.84) > 0.03 else 0.2145,
            "pairs": 5 * len(tasks),
            "seeds": 5,
        },
    }


def one_setting(name, tasks, spaces, arms, rounds=8, clients=12):
    rng = np.random.default_rng(len(name))
    return {
        "name": name,
        "description": f"{len(tasks)} tasks among {clients} clients, two tasks each.",
        "overrides": {"data.clients": clients, "data.tasks_per_client": 2},
        "tasks": tasks,
        "label_spaces": spaces,
        "clients": clients,
        "rounds": rounds,
        "missing": [],
        "arms": [one_arm(label, tasks, spaces, rounds, clients, rng) for label in arms],
    }


def make_comparison(arms=ARMS[:4], tasks=8):
    """A comparison of so many tasks in two settings, with invented numbers."""
    pairs = list(itertools.product(DOMAINS, ATTRIBUTES))
    if tasks <= 8:
        pairs = list(itertools.product(DOMAINS[:2], ATTRIBUTES[:4]))[:tasks]
    names = [f"{attribute}/{domain}" for domain, attribute in pairs]
    spaces = [attribute for _, attribute in pairs]
    return {
        "name": "compare8",
        "title": "MaTU and its rivals on eight tasks",
        "date": "2026-11-23",
        "commit": "0123abc",
        "machine": {
            "processor": "Some Processor 2 GHz",
            "cores": 2,
            "devices": "2 x cpu",
            "python": "3.11",
        },
        "versions": {"jax": "0.10.2", "flax": "0.12.1"},
        "command": "python -m matu_jax.compare --config experiments/compare8.py",
        "seeds": [0, 1, 2, 3, 4],
        "reference": "per_task",
        "ours": "matu",
        "experiment": {"rounds": 8, "data": {"clients": 12, "tasks": "eight"}, "empty": {}},
        "tuning": {
            "setting": "pairs",
            "seed": 7,
            "trials_per_algorithm": 2,
            "arms": {
                label: {
                    "chosen": {"local.learning_rate": 0.003},
                    "validation": 0.875,
                    "trials": [
                        {"fields": {"local.learning_rate": 0.003}, "validation": 0.875},
                        {"fields": {"local.learning_rate": 0.1}, "validation": None},
                    ],
                }
                for label in arms
            },
        },
        "settings": [
            one_setting("pairs", names, spaces, arms),
            one_setting("triples", names, spaces, arms, rounds=10, clients=8),
        ],
    }
