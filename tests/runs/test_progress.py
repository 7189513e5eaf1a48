"""A line a round where nobody looks on; a bar on a terminal."""

import io
import re

import pytest

from matu_jax.runs.commandline import plain_console
from matu_jax.runs.progress import RoundProgress, draws_bars, duration


class Terminal(io.StringIO):
    def isatty(self):
        return True


def record(number, accuracy=None, compiling=0.0, **fields):
    return {
        "round": number,
        "loss": 0.5,
        "accuracy": None if accuracy is None else {"test_mean": accuracy},
        "seconds": {"compile": compiling},
        **fields,
    }


def told(file, *records, total=4, done=0, terminal=None, **options):
    console = plain_console(file=file, force_terminal=terminal)
    with RoundProgress(console, **options).begin(total, done) as progress:
        for each in records:
            progress.advance(each)
        progress.say("[bold]left out")
    return file.getvalue()


def test_a_log_gets_a_line_a_round_with_what_remains():
    text = told(io.StringIO(), record(3), record(4, 0.25, loss=None), done=2, label="a[/b]")
    third, fourth, said = text.splitlines()
    assert re.fullmatch(r"a\[/b\]: round 3 of 4: loss 0.500, 0.\d s, about 0 s to go", third)
    assert re.fullmatch(r"a\[/b\]: round 4 of 4: no loss, accuracy 25.0 %, 0.\d s", fourth)
    assert said == "a[/b]: [bold]left out"


def test_every_line_is_there_when_its_round_is_done():
    class Log(io.StringIO):
        flushed = ""

        def flush(self):
            self.flushed = self.getvalue()

    log = Log()
    with RoundProgress(plain_console(file=log)).begin(2, 0) as progress:
        for number in (1, 2):
            progress.advance(record(number))
            assert log.flushed.count("\n") == number


def test_what_remains_leaves_compilation_out(monkeypatch):
    clock = iter([0.0, 100.0, 110.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    log = io.StringIO()
    progress = RoundProgress(plain_console(file=log)).begin(12, 0)
    progress.advance(record(1, compiling=70.0))
    progress.advance(record(2))
    first, second = log.getvalue().splitlines()
    assert first.endswith("100.0 s, about 6 min to go")  # 11 rounds of 30 seconds: 330
    assert second.endswith("10.0 s, about 3 min to go")  # 10 rounds of 20 seconds: 200


def test_a_terminal_gets_a_bar_and_no_lines():
    text = told(Terminal(), record(1), record(2), terminal=True)
    assert "━" in text
    assert " of 4:" not in text
    assert "[bold]left out" in text


def test_a_bar_that_is_there_already_is_the_only_one():
    assert told(Terminal(), record(1), terminal=True, bar=False) == "[bold]left out\n"


@pytest.mark.parametrize(
    ("variables", "terminal"),
    [({"FORCE_COLOR": "1"}, False), ({"TERM": "dumb"}, True), ({"TTY_COMPATIBLE": "1"}, False)],
)
def test_colours_in_a_log_and_terminals_without_bars_get_lines(monkeypatch, variables, terminal):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    file = Terminal() if terminal else io.StringIO()
    assert not draws_bars(plain_console(file=file))
    assert "round 1 of 4: loss 0.500" in told(file, record(1))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (99.4, "99 s"), (100, "2 min"), (3599, "1 h 00 min"), (11_100, "3 h 05 min")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text
