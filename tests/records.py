"""A record of a round, as metrics.jsonl holds one."""


def a_round(number, **fields):
    """A record with every field that is needed later."""
    accuracy = {"validation_mean": 0.5, "test_mean": 0.5, "test_per_task": {"é": 0.5, "b": None}}
    return {
        "round": number,
        "loss": number / 10,
        "accuracy": accuracy | {"test_per_slot": [0.5, 0.5]},
        "similarity_auc": None,
        "clients": [0, 2],
        "aggregated": True,
        "uplink_bits": 100,
        "downlink_bits": 0,
        "seconds": {"compile": 0, "local_training": 0.5},
        **fields,
    }
