"""MaTU on eight image tasks, two per client."""

from matu_jax.config import default


def get_config():
    config = default()
    config.algorithm = "matu"
    return config
