"""What a user is told: mistakes without a traceback, and near misses of a name."""

import difflib
import re
from typing import Any

# What a terminal obeys or turns around in place of showing it: C0 and C1 but tab and newline, line
# and paragraph separators, and the marks, embeddings and isolates of the bidirectional algorithm.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


class UserError(Exception):
    """A mistake of the user's, to be shown without a traceback."""


def visible(text: str) -> str:
    """Text whose control characters are written as in Python, to be shown and not obeyed."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def did_you_mean(word: str, choices: Any) -> str:
    """A hint such as ` Did you mean "rounds"?`, or the choices if nothing is near."""
    choices = sorted(choices)
    near = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    return f' Did you mean "{near[0]}"?' if near else f" Choices: {', '.join(choices)}."
