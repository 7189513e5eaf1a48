"""Ctrl-C and SIGTERM: work that is under way is finished and saved, then the program ends."""

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any


class Stopped(KeyboardInterrupt):
    """A program that was told to end.

    Attributes:
      exit_code: 128 + the signal's number, as shells have it: 130 Ctrl-C, 143 SIGTERM.
    """

    def __init__(self, message: str, number: int = signal.SIGINT):
        super().__init__(message)
        self.exit_code: int = 128 + number


class StopRequest:
    """Notes the first Ctrl-C or SIGTERM instead of ending; a second one ends at once.

    A context manager. In other threads than the main one, where Python takes no signals, it does
    nothing.

    Attributes:
      signal: the number of the signal that has come, or None.

    Args:
      say: called with no arguments at the first signal.
    """

    def __init__(self, say: Callable[[], None]):
        self.signal: int | None = None
        self._say = say
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.signal is not None:
            raise Stopped("Stopped in the middle of a round, which is lost.", number)
        self.signal = number
        self._say()


def end_on_sigterm() -> None:
    """Makes SIGTERM raise `Stopped`, as Ctrl-C raises KeyboardInterrupt; in the main thread."""

    def end(number: int, _: FrameType | None) -> None:
        raise Stopped("", number)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, end)
