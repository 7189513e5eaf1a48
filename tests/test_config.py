from typing import Any

import pytest

from matu_jax import config as schema
from matu_jax.aggregation import AggregationConfig


def test_default_freezes_to_the_schema_and_is_hashable():
    assert schema.freeze(schema.default()) == schema.Config()
    assert isinstance(hash(schema.freeze(schema.default())), int)


def test_locked_config_refuses_new_fields():
    config = schema.default()
    with pytest.raises(AttributeError, match="rounds"):
        config.roudns = 3


def message(config):
    with pytest.raises(ValueError, match="config") as error:
        schema.freeze(config)
    return str(error.value)


def test_replaced_block_names_unknown_and_missing_fields():
    config = schema.default()
    with config.unlocked():
        config.local = {"stepps": 3}
    text = message(config)
    assert 'config.local.stepps: no such field. Did you mean "steps"?' in text
    assert "config.local.learning_rate: missing" in text


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("rounds", 0, "config.rounds: found 0, expected at least 1"),
        ("rounds", True, "config.rounds: found True"),
        ("local.learning_rate", -0.1, "config.local.learning_rate: found -0.1, expected more than"),
        ("local.learning_rate", float("nan"), "config.local.learning_rate: found nan"),
        ("local.learning_rate", float("inf"), "config.local.learning_rate: found inf"),
        ("matu.agreement_threshold", 1.5, "expected at most 1"),
        ("model.head", "frozn", 'Did you mean "frozen"?'),
        ("clients_per_round", 99, "at most config.data.clients = 12"),
        ("failures.slowness", 0.5, "nothing waits: set config.failures.deadline too"),
        ("failures.deadline", 2.0, "nobody is slow: set config.failures.slowness too"),
        ("attack.colludes", True, "config.attack.colludes: found True, but of kind 'none'"),
        ("attack.strength", 3.0, "found 3, but kind 'none' has no strength"),
    ],
)
def test_wrong_values_are_named(path, value, words):
    config = schema.default()
    block, _, field = path.rpartition(".")
    target: Any = config[block] if block else config
    with target.ignore_type():
        target[field] = value
    assert words in message(config)


def test_all_mistakes_come_in_one_message():
    config = schema.default()
    config.rounds, config.local.steps = -1, -2
    assert len(message(config).splitlines()) == 2


def test_whole_numbers_are_taken_for_floats_and_lists_for_tuples():
    config = schema.default()
    config.local.learning_rate = 1
    with config.data.ignore_type():
        config.data.assignment = [[0, 1], [2]]
    frozen = schema.freeze(config)
    assert isinstance(frozen.local.learning_rate, float)
    assert frozen.data.assignment == ((0, 1), (2,))


def test_matu_block_is_the_aggregation_config():
    fields = schema.MatuConfig.__dataclass_fields__
    library = AggregationConfig.__dataclass_fields__
    fields = {**fields, **schema.DefenceConfig.__dataclass_fields__}
    assert set(fields) == {*library, "downloads", "precision"}
    differing = {n: f.default for n, f in library.items() if f.default != fields[n].default}
    assert differing == {
        "magnitude": "max",
        "agreement_threshold": 0.4,
        "transfer": "none",
        "uploads": "vector",
        "clip": 0.0,
        "weighting": "examples",
    }


def test_overrides_set_fields_by_their_type():
    config = schema.default()
    for path, text in (
        ("rounds", "3"),
        ("local.learning_rate", "1"),
        ("data.tasks", "embedded30"),
        ("model.lora_targets", "('query', 'value')"),
    ):
        schema.override(config, path, text)
    frozen = schema.freeze(config)
    assert (frozen.rounds, frozen.local.learning_rate) == (3, 1.0)
    assert (frozen.data.tasks, frozen.model.lora_targets) == ("embedded30", ("query", "value"))


@pytest.mark.parametrize(
    ("path", "text", "words"),
    [
        ("roudns", "3", 'config.roudns: no such field. Did you mean "rounds"?'),
        ("local.stpes", "3", 'config.local.stpes: no such field. Did you mean "steps"?'),
        ("rounds", "many", "config.rounds: found 'many', expected int"),
        ("rounds", "True", "expected int"),
        ("local", "3", "config.local: is a block"),
        ("rounds.x", "3", "config.rounds: is a value"),
    ],
)
def test_wrong_overrides_are_named(path, text, words):
    with pytest.raises(ValueError, match="config") as error:
        schema.override(schema.default(), path, text)
    assert words in str(error.value)
