import base64
import copy
import html.parser
import io
import itertools
import os
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from comparisons import ARMS, ATTRIBUTES, DOMAINS, make_comparison, one_arm, one_setting  # noqa: F401
from markdown_it import MarkdownIt
from PIL import Image

from matu_jax.comparison import appendix, figures, report, words
from matu_jax.comparison.arms import best_first
from matu_jax.comparison.collect import verdict
from matu_jax.comparison.drawing import Drawing
from matu_jax.comparison.html import (
    Bold,
    Bullets,
    Code,
    Heading,
    Listing,
    Paragraph,
    Row,
    Table,
    to_html,
    to_markdown,
)
from matu_jax.runs import figures as pictures


def arm_of(comparison, label, setting=0):
    return next(a for a in comparison["settings"][setting]["arms"] if a["label"] == label)


class Page(html.parser.HTMLParser):
    """What stands in a page: tags with their attributes, and tables as lists of rows of text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.tables, self.bold, self.text = [], [], set(), []
        self._open = []
        self.feed(text)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self._open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if "style" in self._open:
            return
        self.text.append(data)
        if "td" in self._open or "th" in self._open:
            self.tables[-1][-1][-1] += data
        if "strong" in self._open:
            self.bold.add(data)

    def table(self, header):
        return [table for table in self.tables if table[0][1] == header]


def written(comparison, folder):
    files = report.write(comparison, folder)
    assert files[0].name == "report.html"
    page = files[0].read_text(encoding="utf-8")
    return Page(page), page, files[1].read_text(encoding="utf-8"), files[2:]


@pytest.fixture
def undrawn(monkeypatch):
    """Blank pictures in place of drawn ones, for tests of words."""
    blank = io.BytesIO()
    Image.new("RGB", (600, 600)).save(blank, format="PNG")
    for name in ("traffic", "curves", "per_task", "similarity"):
        drawing = Drawing(blank.getvalue(), 300, 300)
        monkeypatch.setattr(figures, name, lambda *_, drawing=drawing, **__: drawing)


def result_rows(page, setting=0):
    header, *rows = page.table("test accuracy")[setting]
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows}


def test_table_says_what_was_measured(tmp_path, undrawn):
    comparison = make_comparison()
    per_task, matu = (arm_of(comparison, label) for label in ("per_task", "matu"))
    per_task["accuracy"].update(mean=0.9, std=0.0123)
    per_task["against_ours"].update(difference=0.0891, p_value=0.0123)
    matu["accuracy"].update(mean=0.81, std=0.02)
    arm_of(comparison, "matu, transfer")["against_ours"].update(difference=-0.1, p_value=1e-5)
    page, _, _, _ = written(comparison, tmp_path)
    rows = result_rows(page)
    assert next(iter(rows)) == "per_task (reference)"
    assert list(rows["per_task (reference)"].values()) == [
        "per_task (reference)",
        "90.0 ± 1.2 %",
        "100.0 %",
        "1.57 Mbit",
        "786 kbit",
        "227 Mbit",  # 1.573 Mbit × 1.5 × 12 clients × 8 rounds = 226.5 Mbit
        "1.50 MiB",
        "4",
        "+8.9 (p = 0.012)",
        "123",
        "1.3",
        "0.012",
    ]
    ours = rows["matu (ours)"]
    assert ours["test accuracy"] == "81.0 ± 2.0 %"
    assert ours["of reference’s accuracy"] == "90.0 %"
    assert ours["points against ours (p-value)"] == "–"
    assert rows["matu, transfer"]["points against ours (p-value)"] == "−10.0 (p < 0.001)"


def test_best_is_first_and_bold_and_ties_share_it(tmp_path, undrawn):
    comparison = make_comparison()
    arm_of(comparison, "matu, transfer")["accuracy"].update(mean=0.95, std=0.001)
    arm_of(comparison, "matu, maximum")["accuracy"].update(mean=0.95, std=0.002)
    page, _, markdown, _ = written(comparison, tmp_path)
    assert list(result_rows(page))[:2] == ["matu, maximum", "matu, transfer"]
    assert {"95.0 ± 0.1 %", "95.0 ± 0.2 %", "matu, maximum", "matu, transfer"} <= page.bold
    other = result_rows(page)["per_task (reference)"]["test accuracy"]
    assert other not in page.bold
    assert "| **matu, transfer** | **95.0 ± 0.1 %** |" in markdown
    assert f"| {other} |" in markdown


def test_what_is_bold_is_bold_for_every_reader(tmp_path, undrawn):
    page, _, markdown, _ = written(make_comparison(), tmp_path)
    shown = Page(MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown))
    assert "Accuracy over rounds." in page.bold
    assert shown.bold == page.bold


def test_in_short_gives_the_verdicts(tmp_path, undrawn):
    comparison = make_comparison(ARMS[:7])
    matu, per_task = arm_of(comparison, "matu"), arm_of(comparison, "per_task")
    matu["accuracy"].update(mean=0.8, std=None)
    per_task["accuracy"].update(mean=0.96, std=None)
    for label, difference, p in (
        ("per_task", 0.16, 0.001),
        ("fedavg", -0.4, 0.049),
        ("fedprox", -0.3, 0.001),
        ("individual", -0.1, 0.05),
        ("matu, maximum", 0.1, 0.9),
    ):
        arm_of(comparison, label)["against_ours"].update(difference=difference, p_value=p)
    arm_of(comparison, "matu, transfer")["against_ours"] = None
    _, _, markdown, _ = written(comparison, tmp_path)
    short = markdown.split("## In short")[1].split("triples")[0].splitlines()
    short = [line for line in short if line.startswith("-")]
    names = iter(["fedprox", "fedavg"])
    order = sorted(names, key=lambda n: -arm_of(comparison, n)["accuracy"]["mean"])
    assert short == [
        "- Best: **per_task** with **96.0 %**.",
        # 0.8 / 0.96 and 836 / 1573
        "- **matu** (ours) reaches 80.0 %: 83.3 % of the accuracy of **per_task** (reference) "
        "with 53.1 % of its uplink per client and round.",
        f"- matu beats (p < 0.05): {order[0]}; {order[1]}.",
        "- matu cannot be told from (p ≥ 0.05): "
        + "; ".join(
            sorted(
                ["matu, maximum", "individual"],
                key=lambda n: -arm_of(comparison, n)["accuracy"]["mean"],
            )
        )
        + ".",
        "- matu loses to (p < 0.05): per_task.",
        "- Not tested against matu: matu, transfer.",
    ]


def test_in_short_names_the_downlink_where_it_differs(tmp_path, undrawn):
    comparison = make_comparison(ARMS[:7])
    per_task = arm_of(comparison, "per_task")["communication"]["downlink_bits_per_client_round"]
    matu = arm_of(comparison, "matu")["communication"]
    matu["downlink_bits_per_client_round"] = per_task / 4
    _, _, markdown, _ = written(comparison, tmp_path)
    assert "with 53.1 % of its uplink and 25.0 % of its downlink per client and round." in markdown


def emptied(value):
    """The value with every number and text of a measurement replaced by None."""
    if isinstance(value, dict):
        return {key: emptied(each) for key, each in value.items()}
    if isinstance(value, list):
        return [emptied(each) for each in value]
    return None


def test_nothing_measured_shows_dashes_and_does_not_fail(tmp_path):
    comparison = make_comparison()
    for setting in comparison["settings"]:
        for arm in setting["arms"]:
            for key in set(arm) - {"label", "algorithm", "commands", "overrides"}:
                arm[key] = emptied(arm[key])
    for key in ("commit", "tuning", "date"):
        comparison[key] = None
    comparison["machine"] = {"processor": None, "cores": None, "devices": None}
    page, _, _, drawn = written(comparison, tmp_path)
    for row in result_rows(page).values():
        assert list(row.values())[1:] == ["–"] * 11
    assert not drawn
    assert "No arm has a result yet." in "".join(page.text)


@pytest.mark.parametrize(
    "key",
    ["accuracy", "curve", "communication", "server_state_bytes", "seconds", "rounds_to_95"],
)
def test_one_block_missing_leaves_the_others(tmp_path, key):
    comparison = make_comparison()
    comparison["settings"] = comparison["settings"][:1]
    arm_of(comparison, "matu, maximum")[key] = None
    page, _, _, drawn = written(comparison, tmp_path)
    assert ("–" in result_rows(page)["matu, maximum"].values()) == (key != "curve")
    assert len(drawn) == 4
    assert ("Not measured, so not shown: matu, maximum." in "".join(page.text)) == (
        key in ("accuracy", "curve", "communication")
    )


def test_a_number_that_is_not_finite_is_no_number(tmp_path, undrawn):
    comparison = make_comparison()
    arm_of(comparison, "matu, maximum")["accuracy"].update(mean=float("nan"))
    page, _, _, _ = written(comparison, tmp_path)
    assert list(result_rows(page))[-1] == "matu, maximum"
    assert result_rows(page)["matu, maximum"]["test accuracy"] == "–"


def test_one_seed_has_no_spread(tmp_path):
    comparison = make_comparison()
    comparison["seeds"] = [0]
    for setting in comparison["settings"]:
        for arm in setting["arms"]:
            arm["accuracy"]["std"] = None
            arm["curve"]["std"] = None
            for value in arm["accuracy"]["per_task"].values():
                value["std"] = None
    page, _, markdown, drawn = written(comparison, tmp_path)
    assert all("±" not in row["test accuracy"] for row in result_rows(page).values())
    assert "1 seed (0)" in markdown
    assert "There is one seed" in markdown
    assert len(drawn) == 8


def test_missing_runs_are_told(tmp_path, undrawn):
    comparison = make_comparison()
    comparison["settings"][1]["missing"] = [
        {"label": "matu", "seed": 1},
        {"label": "fedavg", "seed": 0},
        {"label": "matu", "seed": 2},
    ]
    page, text, markdown, _ = written(comparison, tmp_path)
    words = "3 runs (matu: seeds 1 and 2; fedavg: seed 0)."
    notice = re.findall('<p class="notice">(.*?)</p>', text)
    assert len(notice) == 1
    assert words in notice[0]
    assert markdown.count(words) == 2  # in short, and at the setting
    assert "Not complete." in page.bold


def test_marks_and_rounds(tmp_path, undrawn):
    comparison = make_comparison(ARMS)
    arm_of(comparison, "fedavg")["rounds_to_95"] = {"mean": None, "reached": 0, "of": 3}
    arm_of(comparison, "matfl")["rounds_to_95"] = {"mean": 4.5, "reached": 3, "of": 3}
    page, _, markdown, _ = written(comparison, tmp_path)
    rows = result_rows(page)
    assert rows["fedper"]["server state"] == "1.50 MiB †"
    assert rows["fedavg"]["server state"] == "1.50 MiB"
    assert "† This state grows with the number of clients." in markdown
    found = {label: row["rounds to 95 % of reference"] for label, row in rows.items()}
    assert found["fedavg"] == "never"
    assert found["ties"] == "4 (2 of 3)"
    assert found["matfl"] == "4.5"
    assert rows["individual"]["total traffic"] == "0 bit"


def test_page_fetches_nothing_and_closes_its_tags(tmp_path):
    page, text, _, drawn = written(make_comparison(), tmp_path)
    assert "script" not in {tag for tag, _ in page.tags}
    assert not {"link", "iframe", "object", "base"} & {tag for tag, _ in page.tags}
    sources = [value for _, a in page.tags for k, value in a.items() if k in ("src", "srcset")]
    assert len(sources) == len(drawn) == 8
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    links = [a["href"] for _, a in page.tags if "href" in a]
    anchors = {f"#{a['id']}" for _, a in page.tags if "id" in a}
    assert links
    assert set(links) == anchors
    assert "url(" not in text
    assert "@import" not in text
    for tag, attributes in page.tags:
        if tag == "img":
            assert attributes["alt"]
    assert [tag for tag, _ in page.tags].count("figcaption") == 8


def test_pictures_are_the_files(tmp_path):
    page, _, markdown, drawn = written(make_comparison(), tmp_path)
    sources = [a["src"].partition(",")[2] for tag, a in page.tags if tag == "img"]
    assert [base64.b64decode(source) for source in sources] == [f.read_bytes() for f in drawn]
    linked = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", markdown)
    assert [tmp_path / name for name in linked] == drawn
    for file in drawn:
        assert file.stat().st_size < 150_000
        with Image.open(file) as picture:
            assert picture.format == "PNG"
            assert min(picture.size) > 500
            assert len(picture.convert("RGB").getcolors(10**6) or []) > 20


def test_files_are_replaced_and_pipes_not_waited_at(tmp_path, undrawn):
    for name in ("report.html", "report.md"):
        os.mkfifo(tmp_path / name)
    files = report.write(make_comparison(), tmp_path)
    assert all(file.is_file() for file in files)
    assert {path.name for path in tmp_path.iterdir()} == {file.name for file in files}


def test_equal_input_gives_equal_files(tmp_path):
    first = report.write(make_comparison(), tmp_path / "a")
    comparison = make_comparison()
    before = copy.deepcopy(comparison)
    second = report.write(comparison, tmp_path / "b")
    assert comparison == before
    assert [f.name for f in first] == [f.name for f in second]
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()
    assert report.markdown(comparison) == first[1].read_text(encoding="utf-8")


HOSTILE = '<img src="http://x.test/a.png" onerror=alert(1)>|`*_$a$ & "b"\nc'


def test_what_a_user_wrote_stays_text(tmp_path):
    comparison = make_comparison()
    comparison["title"] = comparison["command"] = comparison["commit"] = HOSTILE
    comparison["ours"] = HOSTILE
    comparison["machine"]["processor"] = comparison["versions"]["jax"] = HOSTILE
    comparison["experiment"]["name"] = HOSTILE
    comparison["tuning"]["arms"][HOSTILE] = comparison["tuning"]["arms"].pop("matu")
    setting = comparison["settings"][0]
    setting["name"] = setting["description"] = setting["overrides"][HOSTILE] = HOSTILE
    setting["tasks"] = [f"{HOSTILE} {i}" for i in range(8)]
    setting["label_spaces"] = [HOSTILE] * 4 + ["b"] * 4
    setting["missing"] = [{"label": HOSTILE, "seed": 1}]
    arm = arm_of(comparison, "matu")
    arm["label"] = arm["algorithm"] = HOSTILE
    arm["overrides"] = {HOSTILE: HOSTILE}
    arm["commands"] = [HOSTILE]
    page, text, markdown, drawn = written(comparison, tmp_path)
    assert '<img src="http' not in text
    for tag, attributes in page.tags:
        assert "onerror" not in attributes
        if tag == "img":
            assert attributes["src"].startswith("data:")
    assert HOSTILE in "".join(page.text)
    assert all(re.fullmatch(r"[a-z0-9-]+_[a-z]+\.png", file.name) for file in drawn)

    # An independent reader of Markdown finds the same words, and no tag but those of the folds.
    shown = Page(MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown))
    assert {a["src"] for tag, a in shown.tags if tag == "img"} == {file.name for file in drawn}
    assert HOSTILE in "".join(shown.text)
    assert HOSTILE.replace("\n", " ") in "".join(shown.text)
    assert not any(key.startswith("on") for _, a in shown.tags for key in a)
    for table, other in zip(page.tables, shown.tables, strict=True):
        assert [[cell.replace("\n", " ") for cell in row] for row in table] == other


def test_settings_with_like_names_have_files_of_their_own(tmp_path, undrawn):
    comparison = make_comparison()
    for setting, name in zip(comparison["settings"], ("A b", "a/b"), strict=True):
        setting["name"] = name
    _, _, _, drawn = written(comparison, tmp_path)
    assert len({file.name for file in drawn}) == 8
    names = {file.name.rpartition("_")[0] for file in drawn}
    assert names == {"a-b", "setting-2-a-b"}


def test_order_of_chapters(tmp_path, undrawn):
    _, _, markdown, _ = written(make_comparison(), tmp_path)
    assert re.findall("^## (.*)$", markdown, flags=re.MULTILINE) == [
        "In short",
        "Setting “pairs”",
        "Setting “triples”",
        "What the p-values mean",
        "Tuning",
        "Configuration and versions",
        "To do it again",
    ]
    assert "data.clients = 12" in markdown
    assert "--config.algorithm=fedavg" not in markdown
    assert markdown.count("--config.algorithm=per_task --config.seed=2") == 2


def test_thirty_tasks_and_twelve_arms(tmp_path):
    _, _, _, drawn = written(make_comparison(ARMS, 30), tmp_path)
    assert len(drawn) == 8
    assert all(file.stat().st_size < 150_000 for file in drawn)


def test_no_settings_and_no_arms(tmp_path):
    comparison = make_comparison()
    comparison["settings"][0]["arms"] = []
    comparison["settings"] = comparison["settings"][:1]
    written(comparison, tmp_path / "a")
    comparison["settings"] = []
    written(comparison, tmp_path / "b")


def test_a_matrix_that_does_not_fit_is_refused(tmp_path):
    comparison = make_comparison()
    arm_of(comparison, "matu")["similarity"]["matrix"] = [[1.0, 0.5], [0.5, 1.0]]
    with pytest.raises(ValueError, match=r"found a matrix \(2, 2\), 8 tasks"):
        report.write(comparison, tmp_path)
    assert not list(tmp_path.iterdir())


# --- Pictures -----------------------------------------------------------------------------------


def sent(arm):
    communication = arm["communication"]
    return communication["uplink_bits_total"] + communication["downlink_bits_total"]


LABELS: dict[str, Any] = {"ours": "matu", "reference": "per_task"}


@pytest.fixture
def drawn(monkeypatch):
    """The figures drawn, for a look at what is on them."""
    found = []
    original = pictures.blank_figure
    monkeypatch.setattr(
        pictures, "blank_figure", lambda *size: found.append(original(*size)) or found[-1]
    )
    return found


def overlaps(texts):
    boxes = [text.get_window_extent() for text in texts if text.get_text()]
    return [
        (a.get_text(), b.get_text())
        for (a, one), (b, other) in itertools.combinations(zip(texts, boxes, strict=True), 2)
        if one.overlaps(other)
    ]


@pytest.mark.parametrize("seed", range(4))
def test_labels_of_the_scatter_do_not_cover_each_other(drawn, seed):
    arms = make_comparison(ARMS)["settings"][0]["arms"]
    rng = np.random.default_rng(seed)
    for arm in arms:
        arm["accuracy"]["mean"] = 0.8 + 0.01 * rng.normal()
        arm["accuracy"]["std"] = None
    assert figures.traffic(arms, **LABELS)
    (axes,) = drawn[0].axes
    texts = list(axes.texts)
    assert {text.get_text() for text in texts} == set(ARMS)
    assert not overlaps(texts)
    frame = axes.get_window_extent()
    for text in texts:
        box = text.get_window_extent()
        assert frame.x0 - 1 <= box.x0
        assert box.x1 <= frame.x1 + 1
        assert frame.y0 - 1 <= box.y0
        assert box.y1 <= frame.y1 + 1


def test_an_arm_that_sends_nothing_stands_left_of_the_others(drawn):
    arms = make_comparison(ARMS)["settings"][0]["arms"]
    figures.traffic(arms, **LABELS)
    (axes,) = drawn[0].axes
    ticks = dict(
        zip((t.get_text() for t in axes.get_xticklabels()), axes.get_xticks(), strict=True)
    )
    markers = [line for line in axes.lines if line.get_marker() in ("o", "D")]
    places = {round(float(line.get_xdata()[0]), 6) for line in markers}
    assert len(markers) == 12
    assert min(places) == round(ticks["nothing"], 6)
    assert sorted(places)[1:] == sorted(
        {round(float(np.log10(sent(a))), 6) for a in arms if a["label"] != "individual"}
    )


def test_a_difference_whose_mean_and_ranks_disagree_is_no_victory(tmp_path, undrawn):
    comparison = make_comparison(ARMS[:7])
    for label, ranks in (("fedavg", 0.4), ("fedprox", -0.4)):
        arm_of(comparison, label)["against_ours"].update(
            difference=-0.001, p_value=0.007, rank_correlation=ranks
        )
    page, _, markdown, _ = written(comparison, tmp_path)
    assert "- matu is ahead on most tasks or in the mean, but not both, of (p < 0.05): fedavg." in (
        markdown
    )
    assert "fedprox" in next(x for x in markdown.splitlines() if x.startswith("- matu beats"))
    column = "points against ours (p-value)"
    assert result_rows(page)["fedavg"][column] == "−0.1 (p = 0.007) ‡"
    assert result_rows(page)["fedprox"][column] == "−0.1 (p = 0.007)"
    assert "‡ One of the two arms is ahead on most tasks" in markdown


@pytest.mark.parametrize("seeds", [1, 2, 4])
@pytest.mark.parametrize("counted", [True, False])  # older comparisons do not say how many
def test_from_few_seeds_nothing_is_concluded(tmp_path, undrawn, seeds, counted):
    comparison = make_comparison(ARMS[:7])
    for arm in (arm for setting in comparison["settings"] for arm in setting["arms"]):
        arm["accuracy"]["per_seed"] = [arm["accuracy"]["mean"]] * seeds + [None] * (5 - seeds)
        if tested := arm["against_ours"]:
            tested.update(difference=-0.1, p_value=1e-5, rank_correlation=0.5, seeds=seeds)
            if not counted:
                del tested["seeds"]
    page, _, markdown, _ = written(comparison, tmp_path)
    others = "; ".join(
        arm["label"] for arm in best_first(comparison["settings"][0]) if arm["label"] != "matu"
    )
    for text in (markdown, "".join(page.text)):
        assert f"Too few seeds to tell (fewer than 5) whether matu beats: {others}." in text
        assert "Highest accuracy: " in text
        for word in ("p <", "p =", "p ≥", "‡", "Best: ", "loses", "is called a difference"):
            assert word not in text
    assert result_rows(page)["fedavg"]["points against ours (p-value)"] == "−10.0"


def test_the_arm_with_the_fewest_seeds_decides_whether_one_is_best(tmp_path, undrawn):
    comparison = make_comparison(ARMS[:7])
    assert "- Best: " in written(comparison, tmp_path / "all")[2]
    arm_of(comparison, "fedavg")["accuracy"]["per_seed"] = [0.3, None, None, None, None]
    assert "- Highest accuracy: " in written(comparison, tmp_path / "one")[2]


@pytest.mark.parametrize(
    ("tested", "seeds", "expected"),
    [
        ({"difference": -0.1, "p_value": 0.01}, 5, "beats"),
        ({"difference": 0.1, "p_value": 0.01}, 5, "loses"),
        ({"difference": 0.1, "p_value": 0.05}, 5, "ties"),
        ({"difference": 0.1, "p_value": 0.01, "rank_correlation": -0.1}, 9, "mixed"),
        ({"difference": -0.1, "p_value": 1e-9}, 4, "too few seeds to tell"),
        ({"difference": 0.0, "p_value": 1.0}, 0, "too few seeds to tell"),
        ({"difference": 0.1, "p_value": None}, 5, "untested"),
        (None, 5, "untested"),
    ],
)
def test_verdicts(tested, seeds, expected):
    assert verdict(tested, seeds) == expected


def test_chance_is_drawn_in_every_panel_where_it_is_known(drawn):
    arms = make_comparison()["settings"][0]["arms"]
    figures.curves(arms, chance=0.25, **LABELS)
    figures.curves(arms, **LABELS)
    for figure, expected in zip(drawn, (1, 0), strict=True):
        panels = [axes for axes in figure.axes if axes.get_visible()]
        for axes in panels:
            dotted = [line for line in axes.lines if line.get_linestyle() == ":"]
            assert len(dotted) == expected
            assert all(set(line.get_ydata()) == {0.25} for line in dotted)
            assert not expected or axes.get_ylim()[0] < 0.25
        assert ("chance" in [t.get_text() for t in figure.legends[0].get_texts()]) == bool(expected)


def test_pareto_front_is_what_nothing_beats(drawn):
    arms = make_comparison(ARMS)["settings"][0]["arms"]
    figures.traffic(arms, **LABELS)
    front = next(line for line in drawn[0].axes[0].lines if "Pareto" in str(line.get_label()))
    points = [(sent(a), a["accuracy"]["mean"]) for a in arms]
    expected = {
        y for x, y in points if not any((u <= x and v > y) or (u < x and v >= y) for u, v in points)
    }
    assert set(front.get_ydata()) == expected


@pytest.mark.parametrize(
    "traffic",
    [[0], [0, 0], [5e6], [5e6, 5e6], [1, 1e15], [0, 1e5, 1.2e5], [3.3e7, 4.1e7], [7e8, 9e12]],
)
def test_axis_of_traffic_has_ticks_that_can_be_read(drawn, traffic):
    arms = make_comparison()["settings"][0]["arms"][: len(traffic)]
    for arm, bits in zip(arms, traffic, strict=False):
        arm["communication"].update(uplink_bits_total=bits, downlink_bits_total=0)
    assert figures.traffic(arms, **LABELS)
    (axes,) = drawn[0].axes
    labels = axes.get_xticklabels()
    names = [label.get_text() for label in labels]
    assert names.count("nothing") == (0 in traffic)
    assert len(names) > (0 in traffic) or not max(traffic)
    assert not overlaps(labels)


def test_panels_show_each_arm_with_its_band(drawn):
    arms = make_comparison(ARMS)["settings"][0]["arms"]
    arms[3]["curve"] = None
    arms[4]["curve"]["mean"][1] = None
    figures.curves(arms, **LABELS)
    panels = [axes for axes in drawn[0].axes if axes.get_visible()]
    left = [arm for arm in arms if arm["curve"]]
    assert [axes.get_title(loc="left") for axes in panels] == [arm["label"] for arm in left]
    for axes, arm in zip(panels, left, strict=True):
        line = axes.lines[-1]
        expected = [np.nan if v is None else v for v in arm["curve"]["mean"]]
        np.testing.assert_array_equal(line.get_ydata(), expected)
        assert len(axes.collections) == 1
        low, high = axes.get_ylim()
        assert low <= np.nanmin(expected)
        assert np.nanmax(expected) <= high


def test_an_arm_that_is_ours_and_the_reference_stands_in_the_legend_once(drawn):
    arms = make_comparison(ARMS)["settings"][0]["arms"]
    figures.curves(arms, ours=arms[0]["label"], reference=arms[0]["label"])
    (legend,) = drawn[0].legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["± std", f"{arms[0]['label']} (reference)", "others"]


@pytest.mark.parametrize(("arms", "tasks"), [(ARMS, 8), (ARMS, 30), (ARMS[:1], 1)])
def test_table_in_colours_holds_every_number(drawn, arms, tasks):
    setting = make_comparison(arms, tasks)["settings"][0]
    arm = setting["arms"][-1]
    arm["accuracy"]["per_task"][setting["tasks"][0]]["mean"] = None
    figures.per_task(setting["arms"], setting["tasks"], **LABELS)
    axes, bar = drawn[0].axes
    assert [t.get_text() for t in axes.get_yticklabels()] == [*setting["tasks"], "mean"]
    assert [t.get_text() for t in axes.get_xticklabels()] == list(arms)
    found = {tuple(int(v) for v in t.get_position()): t.get_text() for t in axes.texts}
    assert found[len(arms) - 1, 0] == "–"
    for column, arm in enumerate(setting["arms"]):
        assert found[column, tasks] == f"{100 * arm['accuracy']['mean']:.0f}"
        for row, task in enumerate(setting["tasks"]):
            value = arm["accuracy"]["per_task"][task]["mean"]
            assert found[column, row] == ("–" if value is None else f"{100 * value:.0f}")
    assert bar.get_xlabel() == "points above or below per_task"
    for label in axes.get_yticklabels(), axes.get_xticklabels(), axes.texts:
        assert not overlaps(list(label))


def test_table_in_colours_without_the_reference(drawn):
    setting = make_comparison(ARMS[1:3])["settings"][0]
    assert figures.per_task(setting["arms"], setting["tasks"], **LABELS)
    assert drawn[0].axes[1].get_xlabel() == "test accuracy, %"


@pytest.mark.parametrize("tasks", [2, 8, 30])
def test_similarity_stands_beside_the_truth_in_the_same_order(drawn, tasks):
    setting = make_comparison(tasks=tasks)["settings"][0]
    matrix = setting["arms"][1]["similarity"]["matrix"]
    if tasks > 2:
        matrix[0][1] = matrix[1][0] = None
    figures.similarity(matrix, setting["tasks"], setting["label_spaces"])
    measured, truth, _ = drawn[0].axes
    names = [label.get_text() for label in measured.get_yticklabels()]
    assert sorted(names) == sorted(setting["tasks"])
    cells, related = (
        np.ma.filled(axes.images[0].get_array(), np.nan) for axes in (measured, truth)
    )
    for (row, a), (column, b) in itertools.product(enumerate(names), repeat=2):
        i, j = setting["tasks"].index(a), setting["tasks"].index(b)
        if i == j:
            assert np.isnan(cells[row, column])
            assert np.isnan(related[row, column])
            continue
        assert related[row, column] == (setting["label_spaces"][i] == setting["label_spaces"][j])
        if matrix[i][j] is None:
            assert np.isnan(cells[row, column])
        else:
            assert cells[row, column] == matrix[i][j]
    assert not overlaps(measured.get_yticklabels())


def test_tasks_that_share_no_label_space_have_no_truth_to_be_found():
    comparison = make_comparison()
    for setting in comparison["settings"]:
        setting["label_spaces"] = setting["tasks"]
        for arm in setting["arms"]:
            keys = ("auc_mean", "auc_first_round", "auc_last_round")
            arm["similarity"] = arm["similarity"] and arm["similarity"] | dict.fromkeys(keys)
    text = report.markdown(comparison)
    assert "holds to be related" in text
    assert not re.search("label space|the truth|AUC", text)
    assert re.search("label space.*the truth.*AUC", report.markdown(make_comparison()), re.S)


def test_long_names_are_cut_and_dollars_are_no_mathematics(drawn):
    arms = make_comparison()["settings"][0]["arms"]
    arms[0]["label"] = "$x$ " + "long " * 20
    figures.traffic(arms, **LABELS)
    texts = [text.get_text() for text in drawn[0].axes[0].texts]
    assert r"\$x\$ long long long long lon…" in texts


def test_importing_the_report_is_light():
    program = (
        "import sys; from matu_jax.comparison import report\n"
        "assert 'matplotlib' not in sys.modules and 'PIL' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)


# --- Documents ----------------------------------------------------------------------------------


def test_markdown_keeps_words_as_they_are():
    blocks = [
        Paragraph(["- no list ", Bold("b*d"), " ", Code("a`b")]),
        Bullets([["1. no | number"]]),
        Table(["c"], ["a", "b"], [Row([["x|y"], [Code("p|q")]])]),
        Listing("```\ncode"),
        Heading(3, "per_task _x_"),
    ]
    assert to_markdown("<t>", blocks).split("\n\n") == [
        r"# \<t>",
        r"\- no list **b\*d** `` a`b ``",
        r"- 1\. no \| number",
        "c",
        "| a | b |\n| :-- | --: |\n| x\\|y | `p\\|q` |",
        "````text\n```\ncode\n````",
        "### per_task \\_x\\_\n",
    ]


def test_html_is_complete():
    text = to_html("a & b", [Heading(2, "<one>"), Paragraph(["x < ", Bold("y")])])
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>")
    assert "<title>a &amp; b</title>" in text
    assert '<h2 id="part-1">&lt;one&gt;</h2>' in text
    assert "<p>x &lt; <strong>y</strong></p>" in text
    assert ("meta", {"charset": "utf-8"}) in page.tags


def test_fields_of_before_are_given_by_the_names_of_now():
    found = "".join(map(str, words.fields_words({"fedprox_mu": 0.1, "rounds": 3})))
    assert "fedprox.mu = 0.1" in found
    assert "rounds = 3" in found
    listed = appendix.conditions({"experiment": {"algorithm": "ties", "ties_keep": 0.2}})
    assert "ties.keep = 0.2" in "".join(map(repr, listed))


def test_chance_far_from_all_curves_is_told_and_not_drawn(tmp_path):
    comparison = make_comparison()
    for setting in comparison["settings"]:
        perplexity = {"name": "perplexity", "higher_is_better": False, "percent": False}
        setting["measure"], setting["chance"] = perplexity, 256.0
        for arm in setting["arms"]:
            arm["measure"], arm["perplexity"] = perplexity, arm.pop("accuracy")
    text = written(comparison, tmp_path)[2]
    assert "Chance, guessing, is 256.0, too far away for the picture." in text
    assert "The dotted line is chance" not in text
    assert "perplexity over rounds, lower is better" in text.lower()
    turned = (
        "the higher the better (the axis is turned round: lower perplexity is better, and stands"
    )
    assert turned in text


def test_chance_is_told_beside_the_line_that_is_drawn(tmp_path):
    comparison = make_comparison()
    for setting in comparison["settings"]:
        setting["chance"] = 0.3083
    text = written(comparison, tmp_path)[2]
    assert "The dotted line is chance: guessing (30.8 %)." in text
    assert "turned round" not in text


@pytest.mark.parametrize(
    ("seconds", "words"), [(62.0, "1 minute"), (130.0, "2 minutes"), (8.0, "less than 30 seconds")]
)
def test_the_time_of_one_minute_is_a_minute(seconds, words):
    text = report.markdown(make_comparison() | {"run_seconds": seconds})
    assert f"; the runs took {words} in sum." in text
