"""Writes the tables and numbers of the result pages and of README from what was measured.

    python experiments/pages/write.py
    python experiments/pages/write.py --check

A report, results/NAME/report.md with its pictures, is made of results/NAME/comparison.json. In
README.md and the other pages of results/, a table of what was measured stands between the comments
`table: NAME` and `end`, and a number in a sentence between `numbers: NAME` and `end`. What stands
there is made by the function of that name in this folder, of the JSON files in results/. Nothing is
run or measured again, and what is current is left alone. With --check nothing is written: what is
not current is listed, and the exit code is 1.
"""

import argparse
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import comparison_tables
import other_tables
import sentences
from measured import RESULTS

from matu_jax.comparison import report

ROOT = RESULTS.parents[1]
COMMAND = "python experiments/pages/write.py"
TABLES = comparison_tables.TABLES | other_tables.TABLES
_BLOCK = re.compile(r"<!-- (table|numbers): ([\w-]+) -->(.*?)<!-- end -->", re.DOTALL)
_MARKER = re.compile(r"<!-- (?:(?:table|numbers): .*?|end) -->")
_AT_LINE_START = re.compile(r"^[\s>*-]*<!-- numbers: ([\w-]+)", re.MULTILINE)


def filled(text: str) -> tuple[str, list[str]]:
    """A page with its tables and numbers made anew.

    Returns:
      The page, and which of them have changed.

    Raises:
      ValueError: if a comment has no partner, or begins a line with a number, or nothing makes
        what should stand there.
    """
    changed = []

    def made(block: re.Match[str]) -> str:
        kind, name, before = block.groups()
        functions: dict[str, Callable[[], str]] = TABLES if kind == "table" else sentences.NUMBERS
        if name not in functions:
            raise ValueError(f"nothing makes `{kind}: {name}`")
        try:
            after = f"\n{functions[name]()}\n" if kind == "table" else functions[name]()
        except (KeyError, OSError) as error:
            raise ValueError(f"`{kind}: {name}` cannot be made: {error!r}") from error
        if after != before:
            changed.append(f"{kind}: {name}")
        return f"<!-- {kind}: {name} -->{after}<!-- end -->"

    begun = None
    for marker in [*_MARKER.findall(text), None]:
        if (marker == "<!-- end -->") != (begun is not None):
            raise ValueError(f"a comment lacks its partner: {begun or marker}")
        begun = marker if begun is None else None
    if found := _AT_LINE_START.search(text):
        # Markdown takes the rest of a line that begins with a comment for HTML.
        raise ValueError(f"`numbers: {found[1]}` begins a line: break the line elsewhere")
    return _BLOCK.sub(made, text), changed


def unused(texts: Iterable[str]) -> set[str]:
    """The tables and numbers that stand in none of the pages."""
    there = {f"{block[1]}: {block[2]}" for text in texts for block in _BLOCK.finditer(text)}
    known = {f"table: {name}" for name in TABLES} | {f"numbers: {x}" for x in sentences.NUMBERS}
    return known - there


def is_current(folder: Path) -> bool:
    """Whether a comparison's report says what its JSON says, and all its pictures are there."""
    file = folder / "report.md"
    text = report.markdown(json.loads((folder / "comparison.json").read_text("utf-8")))
    return (
        file.exists()
        and file.read_text("utf-8") == text
        and pictures_of(text) == {picture.name for picture in folder.glob("*.png")}
    )


def pictures_of(text: str) -> set[str]:
    return set(re.findall(r"\]\(([\w.-]+\.png)\)", text))


def write_report(folder: Path) -> None:
    """Makes a comparison's report.md and pictures anew."""
    comparison = json.loads((folder / "comparison.json").read_text("utf-8"))
    for picture in folder.glob("*.png"):
        picture.unlink()
    with tempfile.TemporaryDirectory() as made:
        for file in report.write(comparison, made):
            if file.suffix != ".html":
                shutil.copy(file, folder)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="list what is not current")
    check = parser.parse_args(argv).check
    stale, wrong = [], []
    for file in sorted(RESULTS.glob("*/comparison.json")):
        if not is_current(file.parent):
            stale.append(f"{file.parent.relative_to(ROOT)}/report.md")
            if not check:
                write_report(file.parent)
    pages = {page: page.read_text("utf-8") for page in [ROOT / "README.md", *RESULTS.glob("*.md")]}
    for page, text in pages.items():
        try:
            new, changed = filled(text)
        except ValueError as error:
            wrong.append(f"{page.relative_to(ROOT)}: {error}")
            continue
        stale += [f"{page.relative_to(ROOT)}, {block}" for block in changed]
        if changed and not check:
            page.write_text(new, "utf-8")
    wrong += [f"{block} stands in no page" for block in sorted(unused(pages.values()))]
    for line in stale:
        print(f"{'not current' if check else 'written'}: {line}")
    if stale and check:
        print(f"They are written by: {COMMAND}")
    for line in wrong:
        print(f"wrong: {line}")
    return int(bool(wrong or (stale and check)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
