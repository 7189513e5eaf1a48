import io
import itertools
import subprocess
import sys

import matplotlib.colors
import matplotlib.figure
import numpy as np
import pytest
from matplotlib.image import AxesImage
from matplotlib.text import Annotation, Text
from PIL import Image
from rich.console import Console

from matu_jax.runs import figures as run_figures
from matu_jax.runs.tables import human_bits, human_bytes, plan_table, result_table


@pytest.fixture
def figures(monkeypatch):
    """The figures drawn, for a look at what is on them."""
    drawn = []
    original = run_figures.blank_figure
    monkeypatch.setattr(
        run_figures, "blank_figure", lambda *size: drawn.append(original(*size)) or drawn[-1]
    )
    return drawn


def accuracy_records(tasks, rounds, every=1):
    rng = np.random.default_rng(0)
    for number in range(1, rounds + 1):
        per_task = {f"task {i}": float(rng.uniform(0.2, 0.9)) for i in range(tasks)}
        mean = float(np.mean(list(per_task.values())))
        measured = {"validation_mean": mean + 0.01, "test_mean": mean, "test_per_task": per_task}
        yield {"round": number, "accuracy": measured if number % every == 0 else None}


@pytest.mark.parametrize(("tasks", "rounds", "every"), [(8, 10, 1), (30, 40, 5), (1, 1, 1)])
def test_accuracy_picture_holds_what_was_measured(tmp_path, figures, tasks, rounds, every):
    records = list(accuracy_records(tasks, rounds, every))
    run_figures.plot_rounds(records, tmp_path / "accuracy.png", title="a title")
    (axes,) = figures[0].axes
    lines = {line.get_label(): line for line in axes.lines}
    measured = [r for r in records if r["accuracy"]]
    for label, key in (("test, mean", "test_mean"), ("validation, mean", "validation_mean")):
        x, y = lines[label].get_data()
        assert list(x) == [r["round"] for r in measured]
        assert list(y) == [r["accuracy"][key] for r in measured]
    assert len(axes.lines) == tasks + 2
    low, high = axes.get_ylim()
    values = [v for r in measured for v in r["accuracy"]["test_per_task"].values()]
    assert low <= min(values)
    assert max(values) <= high
    assert axes.yaxis.get_major_formatter()(0.5) == "50%"
    named = {text.get_text() for text in axes.texts}
    assert named == ({f"task {i}" for i in range(tasks)} if tasks <= 10 else set())
    with Image.open(tmp_path / "accuracy.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 400


def test_chance_is_a_line_of_its_own_and_in_sight(tmp_path, figures):
    records = list(accuracy_records(3, 4))
    chance = {"task 0": 1 / 2, "task 1": 1 / 10, "task 2": 1 / 100, "of no curve": 1.0}
    run_figures.plot_rounds(records, tmp_path / "a.png", title="t", chance=chance)
    (axes,) = figures[0].axes
    (line,) = (line for line in axes.lines if line.get_label() == "chance, mean")
    np.testing.assert_allclose(line.get_ydata(), (0.5 + 0.1 + 0.01) / 3)
    assert axes.get_ylim()[0] < 0.2033 < axes.get_ylim()[1]
    assert "chance, mean" in [text.get_text() for text in figures[0].legends[0].get_texts()]


def test_dollars_in_names_are_no_mathematics(tmp_path, figures):
    names, title = ["$x_", "cost $1^$"], "a$b$ $\\frac$"
    accuracy = {
        "validation_mean": 0.5,
        "test_mean": 0.5,
        "test_per_task": dict.fromkeys(names, 0.5),
    }
    run_figures.plot_rounds([{"round": 1, "accuracy": accuracy}], tmp_path / "a.png", title=title)
    run_figures.plot_similarity(np.eye(2), names, names, tmp_path / "s.png", title=title)
    assert len(list(tmp_path.iterdir())) == 2


def test_similarities_that_are_noise_stay_pale(tmp_path, figures):
    matrix = np.array([[1, 0.502], [0.502, 1]])
    run_figures.plot_similarity(matrix, ["a", "b"], ["a", "b"], tmp_path / "s.png", title="t")
    (image,) = (c for c in figures[0].axes[0].get_children() if isinstance(c, AxesImage))
    assert image.get_clim() == pytest.approx((0.45, 0.55))
    noise, middle = (image.cmap(image.norm(value)) for value in np.array([0.502, 0.5]))
    assert min(noise[:3]) > 0.9
    assert min(middle[:3]) > 0.95


def test_names_beside_the_lines_do_not_cover_each_other(tmp_path, figures):
    ends = {f"task {i}": 0.95 + i / 1000 for i in range(8)} | {"low": 0.3}
    measured = {"validation_mean": 0.9, "test_mean": 0.9, "test_per_task": ends}
    run_figures.plot_rounds([{"round": 1, "accuracy": measured}], tmp_path / "a.png", title="t")
    (axes,) = figures[0].axes
    boxes = [Text.get_window_extent(text) for text in axes.texts]  # without the lines to them
    assert len(boxes) == 9
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_a_task_without_a_value_leaves_a_gap(tmp_path, figures):
    records = list(accuracy_records(3, 2))
    records[1]["accuracy"]["test_per_task"]["task 1"] = None
    run_figures.plot_rounds(records, tmp_path / "accuracy.png", title="t")
    assert np.isnan(figures[0].axes[0].lines[1].get_ydata()[1])


def test_accuracy_picture_needs_one_evaluation(tmp_path):
    with pytest.raises(ValueError, match="no round that was measured"):
        run_figures.plot_rounds([{"round": 1, "accuracy": None}], tmp_path / "a.png", title="t")


def similarity_case(tasks):
    rng = np.random.default_rng(tasks)
    matrix = rng.uniform(0.45, 0.58, (tasks, tasks))
    matrix = (matrix + matrix.T) / 2
    np.fill_diagonal(matrix, 1)
    names = [f"task {i}" for i in range(tasks)]
    return matrix, names, [("b", "a", "c")[i % 3] for i in range(tasks)]


@pytest.mark.parametrize("tasks", [1, 8, 30])
def test_similarity_picture_groups_families(tmp_path, figures, tasks):
    matrix, names, families = similarity_case(tasks)
    matrix[0, -1] = matrix[-1, 0] = np.inf  # a cell that was not measured
    run_figures.plot_similarity(matrix, names, families, tmp_path / "s.png", title="t")
    axes = figures[0].axes[0]
    shown = [label.get_text() for label in axes.get_yticklabels()]
    assert shown == [label.get_text() for label in axes.get_xticklabels()]
    assert sorted(shown) == sorted(names)
    by_position = [families[names.index(name)] for name in shown]
    assert [family for family, _ in itertools.groupby(by_position)] == ["b", "a", "c"][:tasks]

    (image,) = (child for child in axes.get_children() if isinstance(child, AxesImage))
    array = image.get_array()
    assert array is not None
    cells = np.ma.filled(array, np.nan)
    for (row, a), (column, b) in itertools.product(enumerate(shown), repeat=2):
        expected = matrix[names.index(a), names.index(b)]
        if row == column or not np.isfinite(expected):
            assert np.isnan(cells[row, column])
        else:
            assert cells[row, column] == expected
    low, high = image.get_clim()
    assert low + high == pytest.approx(1)
    assert low < np.nanmin(cells, initial=0.5) + 1e-9
    assert high > np.nanmax(cells, initial=0.5) - 1e-9

    numbers = [t for t in axes.texts if not isinstance(t, Annotation)]
    expected = np.isfinite(cells).sum() if tasks <= 10 else 0
    assert len(numbers) == expected
    for text in numbers:
        column, row = (int(x) for x in text.get_position())
        assert text.get_text() == f"{cells[row, column]:.2f}"
        paint = image.cmap(image.norm(cells[row, column]))
        assert contrast(text.get_color(), paint) > 3.5
    labels = [text for text in axes.texts if isinstance(text, Annotation)]
    assert {text.get_text() for text in labels} == set(families)
    assert figures[0].axes[1].get_ylabel() == "direction similarity, 0.5 = unrelated"


def contrast(one, other):
    """Contrast ratio of two colours, from 1 to 21 (WCAG 2.1)."""

    def luminance(color):
        rgb = np.array(matplotlib.colors.to_rgb(color))
        return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) @ weights

    weights = np.array([0.2126, 0.7152, 0.0722])
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_family_labels_do_not_cover_each_other(tmp_path, figures):
    matrix, names, _ = similarity_case(30)
    families = [f"a long name {i}" for i in range(30)]
    run_figures.plot_similarity(matrix, names, families, tmp_path / "s.png", title="t")
    boxes = [text.get_window_extent() for text in figures[0].axes[0].texts]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


@pytest.mark.parametrize(
    ("shape", "names", "families"),
    [((2, 2), 3, 3), ((2, 3), 2, 2), ((2, 2), 2, 1), ((0, 0), 0, 0)],
)
def test_similarity_picture_refuses_lengths_that_differ(tmp_path, shape, names, families):
    with pytest.raises(ValueError, match=r"plot_similarity: found similarity"):
        run_figures.plot_similarity(
            np.zeros(shape), ["n"] * names, ["f"] * families, tmp_path / "s.png", title="t"
        )
    assert not list(tmp_path.iterdir())


def test_drawing_leaves_pyplot_alone():
    program = (
        "import sys; from matu_jax.runs import figures\n"
        "assert 'matplotlib' not in sys.modules and 'rich' not in sys.modules\n"
        "import tempfile, os; path = os.path.join(tempfile.mkdtemp(), 'x.png')\n"
        "figures.plot_similarity([[1.0]], ['a'], ['b'], path, title='t')\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)


def rendered(table):
    console = Console(width=100, file=io.StringIO(), record=True)
    console.print(table)
    return console.export_text()


def summary():
    return {
        "algorithm": "matu",
        "seed": 3,
        "rounds": 10,
        "selected_round": 9,
        "accuracy": {
            "mean": 0.8125,
            "validation_mean": 0.8,
            "per_task": {"hue [bold]": 0.75, "tilt": 0.875},
        },
        "communication": {
            "uplink_bits_per_client_round": 1259520,
            "downlink_bits_per_client_round": 131072.0,
            "uplink_bits_total": 0,
            "downlink_bits_total": 0,
        },
        "seconds": {"total": 93.4},
        "overhead": {"seconds": 1.0, "share": 0.0123},
    }


def test_result_table_says_accuracy_traffic_and_time():
    text = rendered(result_table(summary()))
    for words in (
        "matu, seed 3: round 9 of 10,",
        "the best on validation",
        "1.26 Mbit up, 131 kbit down",
        "93 seconds in all",
        "1.2 % the algorithm's own",
    ):
        assert words in text
    rows = [line.strip("│ ").split("│") for line in text.splitlines() if "│" in line]
    found = {name.strip(): value.strip() for name, value in rows}
    assert found == {"hue [bold]": "75.0 %", "tilt": "87.5 %", "mean": "81.2 %"}


def test_a_table_says_where_validation_chose_nothing():
    values = summary()
    values["accuracy"]["validation_mean"] = None
    text = rendered(result_table(values))
    assert "the best on validation" not in text
    assert "the last one: validation gave no finite number" in " ".join(text.split())


def test_result_table_without_a_value():
    values = summary()
    values["accuracy"]["per_task"]["tilt"] = None
    assert "–" in rendered(result_table(values))


def test_a_table_says_that_its_data_was_generated():
    fingerprints = {"tilt": "ab" * 32, "hue": {"train": "cd" * 32}}
    assert "stand-ins" not in rendered(result_table(summary() | {"data_fingerprint": fingerprints}))
    fingerprints = {"mnist": "synthetic-0123"}
    text = rendered(result_table(summary() | {"data_fingerprint": fingerprints}))
    assert "on generated stand-ins" in text


def test_plan_table_has_a_row_each_in_order():
    text = rendered(plan_table({"clients": 12, "tasks [all]": "8: [red]digit"}))
    lines = [line.split() for line in text.splitlines() if line.strip()]
    assert lines == [["clients", "12"], ["tasks", "[all]", "8:", "[red]digit"]]


@pytest.mark.parametrize(
    ("value", "bits", "count"),
    [
        (0, "0 bit", "0 B"),
        (1, "1 bit", "1 B"),
        (7.5, "7.50 bit", "7.50 B"),
        (999, "999 bit", "999 B"),
        (999.7, "1.00 kbit", "0.976 KiB"),
        (1000, "1.00 kbit", "0.977 KiB"),
        (1536, "1.54 kbit", "1.50 KiB"),
        (131_072, "131 kbit", "128 KiB"),
        (1_259_520, "1.26 Mbit", "1.20 MiB"),
        (999_600, "1.00 Mbit", "976 KiB"),
        (3_456_789_012, "3.46 Gbit", "3.22 GiB"),
        (5 * 10**15, "5000 Tbit", "4547 TiB"),
    ],
)
def test_human_units(value, bits, count):
    assert human_bits(value) == bits
    assert human_bytes(value) == count
