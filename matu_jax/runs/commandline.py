"""The command line that the programs share: an experiment file, and fields to change in it.

--config FILE             an experiment: a Python file with get_config()
--config.FIELD=VALUE      changes a field, such as --config.rounds=3 or --config.local.steps=10;
                          --config.data=VALUE is short for --config.data.source=VALUE
"""

import argparse
import contextlib
import errno
import io
import logging
import os
import runpy
import shlex
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from rich.console import Console, ConsoleOptions
from rich.segment import Segment
from rich.text import Text

from matu_jax.config import Config
from matu_jax.data.selection import is_utf8
from matu_jax.errors import UserError, did_you_mean, visible
from matu_jax.json_files import regular_file
from matu_jax.runs.advice import FORM, advice
from matu_jax.runs.interruption import end_on_sigterm


class _OutputError(Exception):
    """Standard output or standard error takes nothing more."""


class _PlainConsole(Console):
    """Shows control characters in texts, and says so where its file cannot be written."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text), **options)

    def render(self, renderable: Any, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else visible(text), style, control)

    def on_broken_pipe(self) -> None:
        raise _OutputError(os.strerror(errno.EPIPE))

    def print(self, *objects: Any, **options: Any) -> None:
        try:
            super().print(*objects, **options)
        except OSError as error:
            del self._buffer[:]
            raise _OutputError(error.strerror) from None


class Parser(argparse.ArgumentParser):
    """A parser whose help and mistakes are printed as all else is."""

    def print_help(self, file: Any = None) -> None:
        """Prints the help on standard output."""
        plain_console(file=file).print(self.format_help(), end="")

    def error(self, message: str) -> NoReturn:
        """Raises the mistake as a `UserError`."""
        raise UserError(f"{message}. See --help.")


def plain_console(**options: Any) -> Console:
    """A console that prints text as it is, tables' and bars' included, on lines of any length.

    Only control characters, which a terminal would obey, are escaped; see `visible`. To rich's own,
    square brackets are styles and `:fire:` is a picture, which names and paths may hold. Bars' text
    columns and panels' titles do not ask the console: give them `markup=False`, or a
    `rich.text.Text`.

    Args:
      **options: of `rich.console.Console`.
    """
    return _PlainConsole(markup=False, emoji=False, highlight=False, soft_wrap=True, **options)


def run_program(
    work: Callable[[Console], int | None],
    *,
    interrupted: str,
    mistakes: tuple[type[Exception], ...] = (UserError,),
) -> int:
    """Does a program's work; a mistake of the user's and Ctrl-C become a message on stderr.

    Args:
      work: given a console to print on, returns the exit code; None = 0.
      interrupted: what to say after Ctrl-C.
      mistakes: exceptions whose text is for the user.

    Returns:
      The exit code: 2 after a mistake, or where standard output cannot be written; 130 after
      Ctrl-C, 143 after SIGTERM, else what the work returned.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # characters that a terminal or a log cannot hold
            stream.reconfigure(errors="backslashreplace")
    logging.getLogger("absl").setLevel(logging.ERROR)
    end_on_sigterm()
    try:
        try:
            return _exit_code(work, interrupted, mistakes)
        finally:  # also after --help, which ends the program
            _flush()
    except _OutputError as error:
        return _end_output(error)


def _exit_code(work: Callable, interrupted: str, mistakes: tuple[type[Exception], ...]) -> int:
    errors = plain_console(stderr=True)
    try:
        return work(plain_console()) or 0
    except mistakes as error:
        errors.print(f"error: {error}", style="bold red")
        return 2
    except KeyboardInterrupt as error:
        errors.print(str(error) or interrupted)
        return getattr(error, "exit_code", 130)
    except Exception as error:
        text = without_devices(error)
        if text is None:
            raise
        errors.print(f"error: {text}", style="bold red")
        return 2


def _flush() -> None:
    if sys.stdout is None:
        raise _OutputError(os.strerror(errno.EBADF))
    try:
        sys.stdout.flush()
    except OSError as error:
        raise _OutputError(error.strerror) from None


def _end_output(error: _OutputError) -> int:
    """Says what is wrong where it still can, and keeps Python from writing once more at its end."""
    for stream in filter(None, (sys.stderr, sys.stdout)):
        try:
            if stream is sys.stderr:
                stream.write(f"error: standard output cannot be written: {error}.\n")
            stream.flush()
        except OSError:
            with contextlib.suppress(OSError), open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())
    return 2


def without_devices(error: Exception) -> str | None:
    """What to say of an error with which JAX ended its search for devices; None for any other.

    Where a platform is asked for that it does not know, JAX fails in an assertion without words.
    """
    frames = traceback.extract_tb(error.__traceback__)
    searched = frames and Path(frames[-1].filename).name == "xla_bridge.py"
    if not searched or not isinstance(error, (RuntimeError, AssertionError)):
        return None
    if "before" in str(error):  # a setting that came after JAX had begun: no search at all
        return None
    asked = os.environ.get("JAX_PLATFORMS")
    words = str(error).strip().split("\n")[0]
    text = "JAX finds no device" + (f" ({words})" if words else "")
    if asked:
        return (
            f"{text}; JAX_PLATFORMS is {asked!r}. Unset it, or set JAX_PLATFORMS=cpu, to run "
            "without an accelerator; for an NVIDIA GPU: pip install -r requirements-cuda.txt, "
            "for a Cloud TPU: pip install 'jax[tpu]'."
        )
    return f"{text}. Set JAX_PLATFORMS=cpu to run without an accelerator."


INTERRUPTED = "Interrupted. The same command with the same --workdir goes on."


class Source(NamedTuple):
    """Where an experiment, or a comparison, is from: the words about it on a command line.

    Attributes:
      file: of `--config`.
      fields: to change in it, such as {"local.steps": "10"}.
      options: of a comparison: which part of it, and its workdir, such as {"arms": "matu"}.
    """

    file: Path
    fields: Mapping[str, str] = {}
    options: Mapping[str, str] = {}

    def command(self, program: str, words: Sequence[str] = (), **options: str) -> str:
        """A command line about the same experiment, for messages; see `command`.

        Args:
          program: of the package, such as "train".
          words: what follows.
          options: in place of those that were given, such as arms="matu".
        """
        given = {f"config.{name}": text for name, text in self.fields.items()}
        if program == "compare":  # the only one that takes them
            given |= self.options
        given |= options
        changes = [f"--{name}={text}" for name, text in given.items()]
        return command(program, self.file, [*changes, *words])


def command(program: str, file: Path | str, words: Sequence[str] = ()) -> str:
    """A command line that a message tells to run, quoted for a shell.

    Args:
      program: of the package, such as "train".
      file: of `--config`.
      words: what follows.
    """
    return shlex.join(["python", "-m", f"matu_jax.{program}", "--config", str(file), *words])


def check_words(words: Sequence[str]) -> None:
    """Refuses words that are no UTF-8, such as names of files of another encoding.

    Raises:
      UserError: since they could be neither printed nor noted in results.
    """
    for word in words:
        if not is_utf8(word):
            raise UserError(
                f"found {word!a}, which is no UTF-8. Rename the file, or give another name."
            )


def read_words(
    argv: Sequence[str], doc: str, options: Sequence[str] = (), flags: Sequence[str] = ()
) -> tuple[Source, dict[str, str]]:
    """Reads the words of a command line.

    Args:
      argv: the program's name, then its arguments.
      doc: what --help prints.
      options: names of options that take a value.
      flags: names of options that take none.

    Returns:
      The experiment's file with the fields to change, and the options given ("" for a flag).

    Raises:
      UserError: with what is wrong, and where.
      SystemExit: after --help.
    """
    given: dict[str, str] = {}
    words = list(argv[1:])
    check_words(words)
    while words:
        word = words.pop(0)
        if word in ("-h", "--help"):
            plain_console().print(doc)
            raise SystemExit(0)
        name, equals, value = word.removeprefix("--").partition("=")
        known = name in ("config", *options, *flags) or name.startswith("config.")
        if not word.startswith("--") or not known:
            hint = did_you_mean(name, ["config", *options, *flags])
            raise UserError(f"found {word!r}, no such option.{hint} See --help.")
        if name in flags:
            if equals:
                raise UserError(f"--{name}: found {value!r}, expected no value.")
        elif not equals:
            if not words:
                raise UserError(f"--{name}: found no value, expected --{name}=VALUE.")
            value = words.pop(0)
        given[name] = value
    if "config" not in given:
        raise UserError("--config is missing; for example --config experiments/quickstart.py")
    file = Path(given.pop("config"))
    fields = {name: given.pop(name) for name in list(given) if name.startswith("config.")}
    fields = {name.removeprefix("config."): text for name, text in fields.items()}
    return Source(file, fields), given


def read_config(
    argv: Sequence[str], doc: str, options: Sequence[str] = (), flags: Sequence[str] = ()
) -> tuple[Config, Source, dict[str, str]]:
    """Reads a command line: an experiment with its changes, and the program's own options.

    Args:
      argv: the program's name, then its arguments.
      doc: what --help prints.
      options: names of options that take a value.
      flags: names of options that take none.

    Returns:
      The checked config, where it is from, and the options given ("" for a flag).

    Raises:
      UserError: with what is wrong, and where.
      SystemExit: after --help.
    """
    source, rest = read_words(argv, doc, options, flags)
    config = load_experiment(source.file)
    try:
        return overridden(config, source.fields).check(), source, rest
    except ValueError as error:
        raise UserError(str(error)) from None


def overridden(config: Config, changes: Mapping[str, str]) -> Config:
    """A config with the fields of a command line, such as {"local.steps": "10"}.

    Raises:
      ValueError: for an unknown field (with "did you mean"), or a value of the wrong type.
    """
    for name, text in changes.items():
        config = config.override(name, text)
    return config


def load_experiment(file: Path) -> Config:
    """Runs an experiment file's `get_config()`.

    Raises:
      UserError: if the file cannot be read, fails (with its line), or yields no `Config`.
    """
    config = run_file(file)
    if type(config) is not Config:  # a subclass's further fields could not be read again
        raise UserError(
            f"--config {file}: get_config() returned {type(config).__name__}, expected a "
            f"matu_jax.config.Config itself (a comparison is run by matu_jax.compare). {FORM}"
        )
    return config


def run_file(file: Path) -> Any:
    """Runs a file's `get_config()` and returns what it returns.

    Raises:
      UserError: if the file cannot be read, or fails (with its line).
    """
    try:
        if file.is_dir():
            raise IsADirectoryError(errno.EISDIR, "is a directory, expected a file", str(file))
        found = runpy.run_path(str(regular_file(file))).get("get_config")
        if not callable(found):
            what = "defines no" if found is None else "has no function"
            raise UserError(f"--config {file}: {what} get_config(). {FORM}")
        return found()
    except UserError:
        raise
    except SystemExit as error:
        raise UserError(
            f"--config {file}: ended the program itself (exit code {error.code}) before "
            "get_config() returned. Take the call of sys.exit or exit out of it."
        ) from None
    except OSError as error:
        raise UserError(f"--config {file}: {error.strerror}.") from None
    except SyntaxError as error:
        raise UserError(f"--config {file}, line {error.lineno}: {error.msg}.") from None
    except Exception as error:
        # Whatever the user's file raises is the user's to mend: say what and where.
        lines = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == str(file)]
        where = f", line {lines[-1].lineno}" if lines else ""
        text = str(error.args[0]) if error.args else ""
        told = advice(error, (lines[-1].line or "") if lines else "")
        raise UserError(f"--config {file}{where}: {type(error).__name__}: {text}{told}") from None
