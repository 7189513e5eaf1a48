"""The result pages and README say what was measured, and one command writes them."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import matu_jax
from matu_jax.comparison.arms import verdict_of
from matu_jax.comparison.collect import FEWEST_SEEDS, TOO_FEW

ROOT = Path(matu_jax.__file__).parents[1]
RESULTS = ROOT / "experiments" / "results"
PAGES = [ROOT / "README.md", *sorted(RESULTS.glob("*.md")), *sorted(RESULTS.glob("*/report.md"))]


def write_pages(root, *words):
    return subprocess.run(
        [sys.executable, root / "experiments" / "pages" / "write.py", *words],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def copy(tmp_path):
    """README, the results and what writes them, in a folder of their own."""
    (tmp_path / "experiments").mkdir()
    shutil.copy(ROOT / "README.md", tmp_path)
    for room in ("pages", "results"):
        shutil.copytree(ROOT / "experiments" / room, tmp_path / "experiments" / room)
    return tmp_path


def change(file, old, new):
    text = file.read_text("utf-8")
    assert text.count(old) == 1, (file, old)
    file.write_text(text.replace(old, new), "utf-8")
    return text


def test_every_report_table_and_number_is_current():
    done = write_pages(ROOT, "--check")
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_what_is_not_current_is_named_and_written(copy):
    results = copy / "experiments" / "results"
    report = results / "downloads30" / "report.md"
    reported = change(report, "clients receive, on thirty tasks\n", "clients receive\n")
    pictures = {file.name for file in report.parent.glob("*.png")}
    (report.parent / "thirty_rounds.png").unlink()
    (report.parent / "an old one.png").touch()
    readme = change(copy / "README.md", "**96.3 ± 0.3** | 1573", "**97.3 ± 0.3** | 1573")
    attacked = change(results / "reliability.md", "-->13 to 96<!--", "-->13 to 97<!--")
    change(results / "quickstart.json", '"mean": 94.6', '"mean": 94.7')
    before = (copy / "README.md").read_text("utf-8")
    done = write_pages(copy, "--check")
    assert done.returncode == 1, done.stderr
    assert done.stdout.splitlines() == [
        "not current: experiments/results/downloads30/report.md",
        "not current: README.md, table: quickstart",
        "not current: README.md, table: compare8",
        "not current: experiments/results/quickstart.md, table: quickstart-whole",
        "not current: experiments/results/reliability.md, numbers: attacks-undefended",
        "They are written by: python experiments/pages/write.py",
    ]
    assert (copy / "README.md").read_text("utf-8") == before
    done = write_pages(copy)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 5
    assert (copy / "README.md").read_text("utf-8") == readme.replace("| 94.6 ±", "| 94.7 ±")
    assert "| 94.7 ± 1.2 |" in (results / "quickstart.md").read_text("utf-8")
    assert (results / "reliability.md").read_text("utf-8") == attacked
    assert report.read_text("utf-8") == reported
    assert {file.name for file in report.parent.iterdir()} == {
        "comparison.json",
        "report.md",
        *pictures,
    }
    assert (report.parent / "thirty_rounds.png").stat().st_size > 1000
    assert write_pages(copy, "--check").returncode == 0


def test_a_page_with_a_wrong_comment_is_named_and_left_as_it_is(copy):
    results = copy / "experiments" / "results"
    change(copy / "README.md", "<!-- table: costs -->", "<!-- table: prices -->")
    change(results / "quickstart.md", "<!-- end -->\n\n- MaTU sends", "\n\n- MaTU sends")
    change(results / "reliability.md", "with clipping\n  alone <!--", "with clipping alone\n  <!--")
    change(results / "own_folders.md", "<!-- table: own-folders -->", "")
    change(results / "performance" / "scale.json", '"clients": 10000,', '"client": 10000,')
    before = {page: page.read_text("utf-8") for page in results.glob("*.md")}
    done = write_pages(copy)
    assert done.returncode == 1, done.stderr
    for words in (
        "README.md: nothing makes `table: prices`",
        "quickstart.md: a comment lacks its partner: <!-- table: quickstart-whole -->",
        "reliability.md: `numbers: attacks-kept-clip` begins a line",
        "own_folders.md: a comment lacks its partner: <!-- end -->",
        "performance.md: `table: scale` cannot be made: KeyError('clients')",
        "wrong: table: costs stands in no page",
    ):
        assert words in done.stdout
    assert before == {page: page.read_text("utf-8") for page in results.glob("*.md")}


def test_no_accuracy_is_written_by_hand():
    for page in PAGES:
        if page.name != "report.md":
            text = re.sub(r"<!-- table: .*?<!-- end -->", "", page.read_text("utf-8"), flags=re.S)
            assert not re.search(r"\d ± \d", text), page


def test_nothing_is_concluded_from_fewer_seeds_than_reports_conclude_from():
    seeds = []
    for file in RESULTS.glob("*/comparison.json"):
        comparison = json.loads(file.read_text("utf-8"))
        seeds.append(len(comparison["seeds"]))
        if seeds[-1] < FEWEST_SEEDS:
            arms = [arm for setting in comparison["settings"] for arm in setting["arms"]]
            assert {verdict_of(arm) for arm in arms} <= {TOO_FEW, "untested"}, file
    # A page may give a p-value once a comparison has enough seeds for one.
    if max(seeds) < FEWEST_SEEDS:
        for page in PAGES:
            assert not re.search(r"\bp [<=>≥] ?\d", page.read_text("utf-8")), page
