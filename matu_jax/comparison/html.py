"""A document of a few kinds of block, written as one HTML file or as Markdown.

Every string is data: whatever stands in it is shown, never read as HTML or Markdown.
"""

import base64
import html
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple


class Bold(str):
    """Words in bold."""


class Code(str):
    """Words in the font of code, such as a field's name."""


Inline = Sequence[str]
"""A run of words: `str`, `Bold` and `Code` in any order, joined without spaces."""


class Heading(NamedTuple):
    """A heading; those of level 2 are the chapters that the page's index lists."""

    level: int
    text: str


class Paragraph(NamedTuple):
    """Running text; `kind` is "", "lead" (the opening), "note" (small) or "notice" (a warning)."""

    parts: Inline
    kind: str = ""


class Bullets(NamedTuple):
    """A list without numbers."""

    items: Sequence[Inline]


class Row(NamedTuple):
    """A row of a table; `kind` is "", "ours" or "reference"."""

    cells: Sequence[Inline]
    kind: str = ""


class Table(NamedTuple):
    """A table whose first `left` columns hold words, and the others numbers."""

    caption: Inline
    header: Sequence[str]
    rows: Sequence[Row]
    left: int = 1


class Listing(NamedTuple):
    """Text in the font of code, line by line."""

    text: str


class Picture(NamedTuple):
    """A PNG: embedded in HTML, referred to by file name in Markdown; sizes are CSS pixels."""

    file: str
    png: bytes
    width: int
    height: int
    alt: str
    caption: Inline


class Details(NamedTuple):
    """Blocks that stay folded until the reader opens them."""

    summary: str
    blocks: Sequence["Block"]


Block = Heading | Paragraph | Bullets | Table | Listing | Picture | Details

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: #1c2730; overflow-wrap: anywhere;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; }
main { max-width: 78rem; margin: 0 auto; padding: 1.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: .5rem 0 1rem; }
h2 { font-size: 1.45rem; line-height: 1.25; margin: 3rem 0 .75rem; padding-top: 1rem;
  border-top: 2px solid #0b5394; }
h3 { font-size: 1.12rem; margin: 2rem 0 .5rem; }
p, ul { max-width: 50rem; margin: .6rem 0; }
ul { padding-left: 1.3rem; }
li { margin: .25rem 0; }
nav ul { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .25rem 1.25rem;
  max-width: none; }
a { color: #0b5394; }
.lead { font-size: 1.08rem; }
.note, figcaption { font-size: .9rem; color: #45555f; }
.notice { background: #fff4e0; border-left: 4px solid #d9730d; padding: .6rem .9rem; }
.scroll { overflow-x: auto; width: fit-content; max-width: 100%;
  margin: .75rem 0 1.25rem; border: 1px solid #d5dde3; border-radius: 6px; }
table { border-collapse: collapse; font-size: .9rem; overflow-wrap: normal;
  font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .5rem; text-align: right; white-space: nowrap; background: #fff;
  border-bottom: 1px solid #e4e9ed; }
thead th { vertical-align: bottom; white-space: normal; min-width: 4.6rem; font-weight: 600;
  line-height: 1.3; background: #eef3f7; border-bottom: 2px solid #b8c6d1; }
th.word, td.word { text-align: left; }
td.word { white-space: normal; min-width: 9rem; }
tbody th { font-weight: 400; }
tbody tr:last-child > * { border-bottom: 0; }
th:first-child { position: sticky; left: 0; min-width: 8rem; max-width: 12rem; white-space: normal;
  border-right: 1px solid #d5dde3; }
tr.ours > * { background: #e3eef8; }
tr.reference > * { background: #f5f2ea; }
.figures { display: grid; gap: 1.5rem 2rem; margin: 1.25rem 0; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); }
figure { margin: 0; min-width: 0; }
img { display: block; max-width: 100%; height: auto; }
figcaption { margin-top: .4rem; max-width: 36rem; }
pre { font: .875rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-x: auto;
  background: #f4f6f8; border-radius: 6px; padding: .75rem .9rem; margin: .6rem 0; }
code { font: .92em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
details { margin: .75rem 0; }
summary { cursor: pointer; font-weight: 600; color: #0b5394; }
@media (max-width: 600px) {
  main { padding: 1rem 1rem 3rem; }
  h1 { font-size: 1.55rem; }
  th:first-child { min-width: 6rem; max-width: 8rem; }
}
"""


def to_html(title: str, blocks: Iterable[Block]) -> str:
    """The document as one HTML file that needs no other file, no network and no script."""
    blocks = list(blocks)
    chapters = [block.text for block in blocks if isinstance(block, Heading) and block.level == 2]
    anchors = iter(range(1, len(chapters) + 1))
    body = []
    for pictures, group in itertools.groupby(blocks, lambda block: isinstance(block, Picture)):
        inner = [_html_block(block, anchors) for block in group]
        body += ['<div class="figures">', *inner, "</div>"] if pictures else inner
    index = "".join(
        f'<li><a href="#part-{i}">{html.escape(text)}</a></li>'
        for i, text in enumerate(chapters, start=1)
    )
    lines = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        # Even a string that slipped through could fetch and run nothing.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">",
        f"<title>{html.escape(title)}</title>",
        f"<style>{_STYLE}</style>",
        "</head>",
        "<body>",
        "<main>",
        f"<h1>{html.escape(title)}</h1>",
        f'<nav aria-label="Contents"><ul>{index}</ul></nav>' if chapters else "",
        *body,
        "</main>",
        "</body>",
        "</html>",
    ]
    return "\n".join(line for line in lines if line) + "\n"


def to_markdown(title: str, blocks: Iterable[Block]) -> str:
    """The document as GitHub's Markdown; pictures are files beside it."""
    parts = [f"# {_markdown([title])}", *(_markdown_block(block) for block in blocks)]
    return "\n\n".join(parts) + "\n"


def _html_block(block: Block, anchors: Iterator[int]) -> str:
    match block:
        case Heading(level, text):
            anchor = f' id="part-{next(anchors)}"' if level == 2 else ""
            return f"<h{level}{anchor}>{html.escape(text)}</h{level}>"
        case Paragraph(parts, kind):
            return f"<p{_class(kind)}>{_html(parts)}</p>"
        case Bullets(items):
            return "<ul>" + "".join(f"<li>{_html(item)}</li>" for item in items) + "</ul>"
        case Listing(text):
            return f'<pre tabindex="0">{html.escape(text)}</pre>'
        case Details(summary, blocks):
            inner = "\n".join(_html_block(each, anchors) for each in blocks)
            return f"<details><summary>{html.escape(summary)}</summary>\n{inner}\n</details>"
        case Picture(_, png, width, height, alt, caption):
            data = base64.b64encode(png).decode()
            return (
                f'<figure><img src="data:image/png;base64,{data}" width="{width}" '
                f'height="{height}" alt="{html.escape(alt)}">'
                f"<figcaption>{_html(caption)}</figcaption></figure>"
            )
        case Table():
            return _html_table(block)


def _html_table(table: Table) -> str:
    kinds = ["word" if i < table.left else "" for i in range(len(table.header))]
    head = "".join(
        f'<th scope="col"{_class(kind)}>{html.escape(text)}</th>'
        for kind, text in zip(kinds, table.header, strict=True)
    )
    rows = []
    for cells, kind in table.rows:
        first, *rest = (
            (f"{_class(column)}>{_html(cell)}") for column, cell in zip(kinds, cells, strict=True)
        )
        inner = f'<th scope="row"{first}</th>' + "".join(f"<td{cell}</td>" for cell in rest)
        rows.append(f"<tr{_class(kind)}>{inner}</tr>")
    # The caption is outside the box that scrolls, so that a narrow screen shows all of it.
    label = html.escape("".join(table.caption))
    return (
        f'<p class="note">{_html(table.caption)}</p>\n'
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n" + "\n".join(rows) + "\n</tbody></table></div>"
    )


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""


def _html(parts: Inline) -> str:
    tags = {Bold: "strong", Code: "code"}
    escaped = ((tags.get(type(part)), html.escape(part)) for part in parts)
    return "".join(f"<{tag}>{text}</{tag}>" if tag else text for tag, text in escaped)


def _markdown_block(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f"{'#' * level} {_markdown([text])}"
        case Paragraph(parts, "notice"):
            return f"> **Note.** {_markdown(parts)}"
        case Paragraph(parts):
            return _at_line_start(_markdown(parts))
        case Bullets(items):
            return "\n".join(f"- {_at_line_start(_markdown(item))}" for item in items)
        case Listing(text):
            fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
            return f"{fence}text\n{text}\n{fence}"
        case Details(summary, blocks):
            inner = "\n\n".join(map(_markdown_block, blocks))
            return f"<details><summary>{html.escape(summary)}</summary>\n\n{inner}\n\n</details>"
        case Picture(file, _, _, _, alt, caption):
            return f"![{_markdown([alt])}]({file})\n\n{_at_line_start(_markdown(caption))}"
        case Table(caption, header, rows, left):
            marks = [":--" if i < left else "--:" for i in range(len(header))]
            lines = [[_markdown([text]) for text in header], marks]
            lines += [[_markdown(cell) for cell in row.cells] for row in rows]
            text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
            return f"{_at_line_start(_markdown(caption))}\n\n{text}"


_MEANT = re.compile(r"[\\`*\[\]|~$]|<(?! )|&(?=#?\w+;)|(?<!\w)_|_(?!\w)")
"""What Markdown would not take for text."""


def _markdown(parts: Inline) -> str:
    """Words as Markdown of one line, good in a table's cell as well."""
    text = []
    for part in parts:
        line = re.sub(r"\s*\n\s*", " ", part)
        if isinstance(part, Code):
            fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
            space = " " if "`" in line else ""
            line = f"{fence}{space}{line}{space}{fence}".replace("|", r"\|")
        else:
            line = _MEANT.sub(r"\\\g<0>", line)
            line = f"**{line}**" if isinstance(part, Bold) and line.strip() else line
        text.append(line)
    return "".join(text)


def _at_line_start(line: str) -> str:
    """Takes away the meaning that a line's first characters could have: a list, a heading."""
    return re.sub(r"^(\d+)([.)])|^([-+#=>])", r"\1\\\2\3", line)
