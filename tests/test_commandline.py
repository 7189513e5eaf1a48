"""What programs print is printed as it is: names and paths are the user's, and no styles."""

import ast
import io
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

import matu_jax
from matu_jax import report
from matu_jax.commandline import UserError, plain_console, run_program

PACKAGE = Path(matu_jax.__file__).parent
NAME = "lr[/3] [red]x[/red] :fire: [link=a]"


def test_a_console_prints_brackets_and_colons_as_they_are():
    out = io.StringIO()
    console = plain_console(file=out, width=200)
    table = Table(NAME, title=NAME, caption=NAME)
    table.add_row(NAME)
    console.print(NAME)
    console.print(table)
    assert out.getvalue().count(NAME) == 5


def test_tables_of_a_run_print_names_as_they_are_on_any_console():
    summary = {
        "algorithm": NAME,
        "seed": 0,
        "rounds": 1,
        "selected_round": 1,
        "accuracy": {"per_task": {NAME: 0.5}, "mean": 0.5},
        "communication": dict.fromkeys(
            ("uplink_bits_per_client_round", "downlink_bits_per_client_round"), 1.0
        ),
        "seconds": {"total": 1.0},
    }
    for console in (Console, plain_console):
        out = io.StringIO()
        console = console(file=out, width=200)
        console.print(report.result_table(summary))
        console.print(report.plan_table({NAME: NAME}))
        assert out.getvalue().count(NAME) == 4


def test_a_mistake_with_brackets_is_one_message(capsys):
    def work(_):
        raise UserError(f"{NAME} is missing")

    assert run_program(work, interrupted="") == 2
    assert capsys.readouterr().err == f"error: {NAME} is missing\n"


def calls(name):
    """Every call of a function or class of this name in the package, with where it is."""
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == name:
                yield f"{file.relative_to(PACKAGE)}:{node.lineno}", node


def given(call):
    return {word.arg: ast.unparse(word.value) for word in call.keywords}


def test_every_console_of_the_package_is_a_plain_one_or_prints_nothing():
    loud = {where for where, call in calls("Console") if given(call) != {"quiet": "True"}}
    assert [where.split(":")[0] for where in loud] == ["commandline.py"]  # the plain console's own
    for name in ("print", "log", "Table", "Text"):
        assert not [w for w, call in calls(name) if given(call).get("markup", "False") != "False"]


def test_bars_and_panels_which_do_not_ask_the_console_have_no_markup():
    texts = [
        (where, call)
        for where, call in calls("TextColumn")
        if "{" in ast.unparse(call.args[0])  # what is filled in may be the user's
    ]
    assert texts
    assert not [where for where, call in texts if given(call).get("markup") != "False"]
    for name in ("Panel", "from_markup", "render_markup", "Rule", "Prompt", "Status"):
        assert not [where for where, _ in calls(name)], f"{name} reads markup of its own"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_what_an_output_cannot_hold_is_no_traceback(encoding, monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr("sys.stdout", out)
    assert run_program(lambda console: console.print("“run–\udcff”"), interrupted="") == 0
    out.flush()
    assert rb"\udcff" in out.buffer.getvalue()
