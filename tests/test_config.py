import dataclasses
import json
import re

import pytest

from matu_jax.config import Config, DataConfig, LocalConfig
from matu_jax.runs.workdir import differences


def message(config):
    with pytest.raises(ValueError, match="config") as error:
        config.check()
    return str(error.value)


def test_the_default_is_right_and_hashable():
    assert Config().check() == Config()
    assert isinstance(hash(Config()), int)


def test_a_config_does_not_change():
    config = Config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rounds = 3  # pyright: ignore[reportAttributeAccessIssue]
    assert config.with_fields({"rounds": 3, "local.steps": 5}).local.steps == 5
    assert config.override("rounds", "3").rounds == 3
    assert config == Config()


def test_what_json_keeps_of_a_config_is_that_config():
    config = Config(data=DataConfig(assignment=((0, 1), (2,))), local=LocalConfig(learning_rate=1))
    kept = json.loads(json.dumps(dataclasses.asdict(config)))
    assert Config.from_json(kept) == config.check()


def test_json_of_another_version_is_refused_with_unknown_and_missing_fields():
    kept = dataclasses.asdict(Config())
    kept["local"] = {"stepps": 3}
    with pytest.raises(ValueError, match="config") as error:
        Config.from_json(kept)
    text = str(error.value)
    assert 'config.local.stepps: no such field. Did you mean "steps"?' in text
    assert "config.local.learning_rate: missing." in text
    for found in ([], {"rounds": 3}):
        with pytest.raises(ValueError, match=r"expected a block of fields|config\.seed: missing"):
            Config.from_json(found)


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
    block, _, field = path.rpartition(".")
    if block:
        field, value = block, dataclasses.replace(getattr(Config(), block), **{field: value})
    assert words in message(dataclasses.replace(Config(), **{field: value}))


def test_all_mistakes_come_in_one_message():
    assert len(message(Config(rounds=-1, local=LocalConfig(steps=-2))).splitlines()) == 2
    with pytest.raises(ValueError, match="config") as error:
        Config().with_fields({"roudns": 1, "local.steps": "many", "seed": 1.5})
    assert len(str(error.value).splitlines()) == 3


def test_whole_numbers_are_taken_for_floats_and_lists_for_tuples():
    config = Config(local=LocalConfig(learning_rate=1), data=DataConfig(assignment=[[0, 1], [2]]))  # type: ignore
    fields = {"local.learning_rate": 1, "data.assignment": [[0, 1], [2]]}
    for right in (config.check(), Config().with_fields(fields)):
        assert isinstance(right.local.learning_rate, float)
        assert right.data.assignment == ((0, 1), (2,))


def test_overrides_set_fields_by_their_type():
    config = Config()
    for path, text in (
        ("rounds", "3"),
        ("local.learning_rate", "1"),
        ("data.tasks", "embedded30"),
        ("model.lora_targets", "('query', 'value')"),
    ):
        config = config.override(path, text)
    assert (config.rounds, config.local.learning_rate) == (3, 1.0)
    assert (config.data.tasks, config.model.lora_targets) == ("embedded30", ("query", "value"))
    assert config.override("data", "synthetic").data.source == "synthetic"


@pytest.mark.parametrize(
    ("path", "text", "words"),
    [
        ("roudns", "3", 'config.roudns: no such field. Did you mean "rounds"?'),
        ("local.stpes", "3", 'config.local.stpes: no such field. Did you mean "steps"?'),
        ("rounds", "many", "config.rounds: found 'many', expected int"),
        ("rounds", "True", "expected int"),
        ("local", "3", "config.local: is a block"),
        ("rounds.x", "3", "config.rounds: is a value"),
        ("local.learning_rate", "9" * 400, "expected float"),
        ("data.assignment", "{[]: 1}", "expected tuple"),
    ],
)
def test_wrong_overrides_are_named(path, text, words):
    with pytest.raises(ValueError, match="config") as error:
        Config().override(path, text)
    assert words in str(error.value)


OLD = {
    "fedprox_mu": 0.5,
    "personal_blocks": 2,
    "fedrep_personal_fraction": 0.25,
    "matfl_grouping": "hard",
    "matfl_threshold": -0.5,
    "ties_keep": 0.5,
    "lora_b_trains_a": True,
}


def of_before(config):
    """A config as JSON kept it when algorithms' choices were no blocks."""
    kept = json.loads(json.dumps(dataclasses.asdict(config)))
    for block in ("fed_lora_b", "fedper", "fedprox", "fedrep", "matfl", "ties"):
        del kept[block]
    return kept | OLD


def test_configs_of_before_are_read_by_the_names_of_now():
    found = Config.from_json(of_before(Config(algorithm="fedper", rounds=3)))
    assert (found.rounds, found.fedprox.mu, found.ties.keep) == (3, 0.5, 0.5)
    # The field of two algorithms is that of the run's own.
    assert (found.fedper.personal_blocks, found.fedrep.personal_blocks) == (2, 1)
    assert (found.fedrep.personal_fraction, found.fed_lora_b.trains_a) == (0.25, True)
    assert (found.matfl.grouping, found.matfl.threshold) == ("hard", -0.5)
    assert differences(of_before(found), found) == []
    assert differences(of_before(found), found.with_fields({"fedprox.mu": 1})) == [
        "config.fedprox.mu: there 0.5, here 1.0"
    ]
    lacking = of_before(found)
    del lacking["ties_keep"]
    with pytest.raises(ValueError, match=r"^config\.ties: missing\.$"):
        Config.from_json(lacking)
    with pytest.raises(ValueError, match=r"^config\.fedprox: found 3, expected a block of fields"):
        Config.from_json(of_before(found) | {"fedprox": 3})


def test_a_block_can_be_given_whole():
    local = LocalConfig(steps=3)
    assert Config().with_fields({"local": local}).local is local
    with pytest.raises(
        ValueError, match=r"config\.local: is a block .* give a LocalConfig\(\.\.\.\)"
    ):
        Config().with_fields({"local": {"steps": 3}})


@pytest.mark.parametrize("name", OLD)
def test_fields_of_before_are_refused_with_the_name_of_now(name):
    for change in (lambda: Config().override(name, "1"), lambda: Config().with_fields({name: 1})):
        with pytest.raises(
            ValueError, match=rf"config\.{name}: is config\.\w+\.\w+ .*now\."
        ) as error:
            change()
        told = re.findall(r"config\.(\w+\.\w+)", str(error.value))
        assert Config().with_fields(dict.fromkeys(told, OLD[name])) != Config()
