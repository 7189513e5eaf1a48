"""What programs print is printed as it is: names and paths are the user's, and no styles."""

import ast
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table
from rich.text import Text

import matu_jax
from matu_jax import export
from matu_jax.errors import UserError
from matu_jax.runs.commandline import plain_console, run_file, run_program
from matu_jax.runs.tables import plan_table, result_table

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
        console.print(result_table(summary))
        console.print(plan_table({NAME: NAME}))
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
    assert not loud
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


ATTACK = "a\x1b[2J\rb\u202ec\x07d\x9be\u2066f"
SHOWN = r"a\x1b[2J\rb\u202ec\x07d\x9be\u2066f"


def test_control_characters_of_names_are_shown_and_not_obeyed():
    out = io.StringIO()
    console = plain_console(file=out, width=300)
    table = Table(ATTACK, title=ATTACK, caption=ATTACK)
    table.add_row(ATTACK)
    console.print(f"{ATTACK}\n\tnext")
    console.print(table)
    console.print(Text(ATTACK.replace("\r", "").replace("\x07", "")))  # which rich drops itself
    text = out.getvalue()
    assert text.count(SHOWN) == 5
    assert text.startswith(f"{SHOWN}\n        next\n")
    assert not set(text) & set("\x1b\r\x07\x9b\u202e\u2066")


def test_the_consoles_own_colours_stay():
    out = io.StringIO()
    console = plain_console(file=out, force_terminal=True, color_system="standard", width=80)
    console.print("\x1b[31m", style="bold red")
    assert out.getvalue() == "\x1b[1;31m\\x1b[31m\x1b[0m\n"


def test_letters_of_all_scripts_stay_as_they_are():
    out = io.StringIO()
    text = "眼科 عربي עברית क्‍ष 👩‍🔬 é"
    plain_console(file=out, width=80).print(text)
    assert out.getvalue() == f"{text}\n"


PROGRAM = """
import sys
from matu_jax.runs.commandline import read_words, run_program

def work(console):
    if sys.argv[1:]:
        read_words(sys.argv, "help")
    console.print("result")

sys.exit(run_program(work, interrupted=""))
"""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="of Linux")
@pytest.mark.parametrize("words", ["", "--help"])
@pytest.mark.parametrize(
    ("to", "reason"), [(">/dev/full", "No space left on device"), (">&-", "Bad file descriptor")]
)
def test_an_output_that_cannot_be_written_is_one_message(words, to, reason):
    command = f'exec "{sys.executable}" -c "$PROGRAM" {words} {to}'
    done = subprocess.run(
        ["sh", "-c", command],
        env={**os.environ, "PROGRAM": PROGRAM},
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert done.stderr == f"error: standard output cannot be written: {reason}.\n"
    assert done.returncode == 2


def test_where_nothing_can_be_said_the_exit_code_still_says_it():
    command = f'exec "{sys.executable}" -c "$PROGRAM" >/dev/full 2>/dev/full'
    env = {**os.environ, "PROGRAM": PROGRAM}
    assert subprocess.run(["sh", "-c", command], env=env, check=False).returncode == 2


def test_a_mistake_in_the_words_of_export_is_one_message(capsys):
    assert export.main(["export", "--workdir=w", "--task=t", "--out=o", "x\x1b[2J"]) == 2
    assert capsys.readouterr().err == ("error: unrecognized arguments: x\\x1b[2J. See --help.\n")


def test_a_config_that_is_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "e.py")
    with pytest.raises(UserError, match=r"e\.py: not a regular file"):
        run_file(tmp_path / "e.py")
