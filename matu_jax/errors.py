"""What a user is told: mistakes without a traceback, and near misses of a name."""

import difflib
import itertools
import re
from collections.abc import Iterable, Sequence
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


def look_alike(names: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs of names that may be one, misspelled: `north` and `nroth`, `Site 1` and `site-1`.

    Names that are numbered, or differ in one letter that stands alone (`clinic A` and `clinic B`),
    are no such pairs.
    """
    words = {name: _WORD.findall(name) for name in sorted(set(names))}
    pairs = itertools.combinations(words, 2)
    return [(one, other) for one, other in pairs if _near(words[one], words[other])]


_WORD = re.compile(r"\d+|[^\W\d_]?[^\W\d_A-Z]+|[A-Z]+")


def _near(words: Sequence[str], others: Sequence[str]) -> bool:
    one, other = ([word.casefold() for word in each] for each in (words, others))
    if "".join(one) == "".join(other):
        return True
    unlike = [pair for pair in zip(one, other, strict=False) if len({*pair}) == 2]
    return len(one) == len(other) and all(
        min(map(len, pair)) > 2
        and not any(word.isdecimal() for word in pair)
        and difflib.SequenceMatcher(None, *pair).ratio() >= 0.8
        for pair in unlike
    )
