"""What is said of experiment files that do not run, the ones of before among them."""

import pytest

from matu_jax.errors import UserError
from matu_jax.runs.commandline import load_experiment

OLD = """
from matu_jax.config import default


def get_config():
    config = default()
    config.rounds = 8
    return config
"""
NEW = """
from matu_jax.config import Config, LocalConfig


def get_config():
    config = Config(rounds=3)
    {line}
    return config
"""


def said(tmp_path, text):
    file = tmp_path / "mine.py"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        load_experiment(file)
    assert str(error.value).startswith(f"--config {file}")
    return str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        OLD,
        OLD.replace("import default", "import freeze"),
        "from matu_jax import config\n\n\ndef get_config():\n    return config.default()\n",
        "def get_config():\n    return {'rounds': 3}\n",
    ],
)
def test_what_is_told_to_write_works_as_it_stands(tmp_path, text):
    found = said(tmp_path, text)
    file = tmp_path / "told.py"
    told = found[found.index("    from matu_jax") :]
    file.write_text("\n".join(line.removeprefix("    ") for line in told.splitlines()))
    config = load_experiment(file)
    assert (config.rounds, config.local.steps) == (10, 20)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("config.local.steps = 2 * 4", {"local.steps": 8}),
        ("config.local.steps *= 2", {"local.steps": 40}),
        ("config.local = LocalConfig(steps=8)", {"local.steps": 8}),
        ("config.fedprox_mu = 0.25", {"fedprox.mu": 0.25}),
        ("config.rounds = 8  # few", {"rounds": 8}),
        ("config.local.optimizer = 'sgd'", {"local.optimizer": "sgd"}),
    ],
)
def test_a_line_that_changes_a_config_is_told_with_what_to_write_instead(tmp_path, line, expected):
    found = said(tmp_path, NEW.format(line=line))
    assert "line 7: FrozenInstanceError" in found
    told = found.splitlines()[-1].strip()
    file = tmp_path / "told.py"
    file.write_text(NEW.format(line=told))
    assert load_experiment(file) == load_experiment(file).with_fields(expected)
    assert load_experiment(file).rounds == expected.get("rounds", 3)


def test_what_cannot_be_put_in_place_is_told_as_an_expression(tmp_path):
    text = NEW.replace("{line}", "shipped = type('Shipped', (), {'experiment': config})")
    text = text.replace("    return", "    shipped.experiment.local.steps = 8\n    return")
    assert said(tmp_path, text).endswith('    shipped.experiment.with_fields({"local.steps": 8})')
    unknown = said(tmp_path, NEW.format(line="config.roudns = 8"))
    assert 'config = config.with_fields({"local.steps": 20})' in unknown


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("config = Config(roudns=3)", "unexpected keyword argument 'roudns'. Did you mean"),
        ("config = Config(local=LocalConfig(stpes=3))", 'Did you mean "steps"?'),
        (
            "config = Config(ties_keep=0.5)",
            "'ties_keep'. config.ties_keep: is config.ties.keep now.",
        ),
        ("config = Config(rounds=config.roudns)", 'Did you mean "rounds"?'),
        ("print(config.ties_keep)", "config.ties_keep: is config.ties.keep now."),
        ("config = config.with_fields({'roudns': 3})", 'Did you mean "rounds"?'),
    ],
)
def test_a_name_that_is_no_field_is_told_with_what_was_meant(tmp_path, line, words):
    assert words in said(tmp_path, NEW.format(line=line))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rounds = 3", "defines no get_config(). Write,"),
        ("get_config = 3", "has no function get_config(). Write,"),
        ("import ml_collections", "An experiment is a frozen Config."),
        ("import sys\n\n\ndef get_config():\n    sys.exit(0)", "(exit code 0) before get_config()"),
        (
            "import dataclasses\nfrom matu_jax.config import Config\n\n\n"
            "@dataclasses.dataclass(frozen=True)\nclass Mine(Config):\n    more: int = 3\n\n\n"
            "def get_config():\n    return Mine()",
            "returned Mine, expected a matu_jax.config.Config itself",
        ),
    ],
)
def test_a_file_without_a_config_is_told_so(tmp_path, text, words):
    assert words in said(tmp_path, text + "\n")


def test_a_directory_is_no_experiment(tmp_path):
    with pytest.raises(UserError, match="is a directory, expected a file"):
        load_experiment(tmp_path)
