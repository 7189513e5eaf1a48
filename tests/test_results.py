"""The results in the repository are what its code says of the runs that were made."""

import io
import json
import re
from pathlib import Path

import pytest
from PIL import Image

import matu_jax
from matu_jax.comparison import figures, report
from matu_jax.comparison.drawing import Drawing

RESULTS = Path(matu_jax.__file__).parents[1] / "experiments" / "results"


@pytest.mark.parametrize(
    "folder", sorted(file.parent.name for file in RESULTS.glob("*/comparison.json"))
)
def test_a_report_says_what_the_code_says_of_its_runs(folder, tmp_path, monkeypatch):
    blank = io.BytesIO()
    Image.new("RGB", (1, 1)).save(blank, format="PNG")
    for name in ("traffic", "curves", "per_task", "similarity"):
        drawing = Drawing(blank.getvalue(), 1, 1)
        monkeypatch.setattr(figures, name, lambda *_, drawing=drawing, **__: drawing)
    comparison = json.loads((RESULTS / folder / "comparison.json").read_text("utf-8"))
    report.write(comparison, tmp_path)
    text = (RESULTS / folder / "report.md").read_text("utf-8")
    assert text == (tmp_path / "report.md").read_text("utf-8"), (
        f"make it anew: comparison.report.write(its comparison.json, {folder!r})"
    )
    pictures = set(re.findall(r"\]\(([\w.-]+\.png)\)", text))
    assert pictures == {file.name for file in (RESULTS / folder).glob("*.png")}
