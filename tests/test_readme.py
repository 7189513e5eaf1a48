"""What the README says is run, or looked up."""

import dataclasses
import doctest
import json
import re
import shlex
import shutil
import subprocess
import sys
import types
from pathlib import Path

import contract
import numpy as np
import pytest
import tiny

import matu_jax
from matu_jax import algorithms, compare
from matu_jax.aggregation import fold
from matu_jax.algorithms import ALGORITHMS, build

ROOT = Path(matu_jax.__file__).parents[1]
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)


def test_the_library_example_runs():
    code = PYTHON[0]
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["new"]["w"].shape == (3, 4, 3)
    similarity = np.asarray(names["result"].similarity)
    assert similarity.shape == (2, 2)
    # Client 0's task 0 and client 1's task 1 moved every parameter the same way.
    np.testing.assert_allclose(similarity, 1.0)


def arms_of(comparison):
    """By setting: the arms that were measured, by the name that the README gives them."""
    file = ROOT / "experiments" / "results" / comparison / "comparison.json"
    return [
        {a["label"].replace("matu (paper's server)", "matu, the paper's server"): a for a in s}
        for s in (setting["arms"] for setting in json.loads(file.read_text())["settings"])
    ]


def rows_under(header, after=""):
    start = README.index(header, README.index(after))
    table = README[start : README.index("\n\n", start)].replace("*", "").replace("`", "")
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines()[2:]]


def assert_says(cells, arm):
    """That an accuracy, and the uplink if it is given, are those measured."""
    mean, std = (100 * arm["accuracy"][key] for key in ("mean", "std"))
    assert cells[0] == f"{mean:.1f} ± {std:.1f}", arm["label"]
    bits = arm["communication"]["uplink_bits_per_client_round"]
    for uplink in cells[1:]:
        assert uplink.split()[0] == f"{bits / 1000:.0f}", arm["label"]


def test_the_tables_of_rivals_say_what_was_measured():
    pairs, kin = arms_of("compare8")
    text = " ".join(README.split())
    behind = min(-100 * a["against_ours"]["difference"] for a in kin.values() if a["against_ours"])
    against = {
        name: (abs(100 * pairs[name]["against_ours"]["difference"]), pairs[name]["against_ours"])
        for name in ("per_task", "matfl")
    }
    (over, found), (under, lost) = against["per_task"], against["matfl"]
    assert found["difference"] < 0 < lost["difference"]
    assert f"by {behind:.1f} points over the next" in text
    assert f"by {over:.1f} points at 53 %" in text
    assert f'behind** `matfl` in "pairs", by {under:.1f} points' in text
    for name, accuracy, uplink, other, _ in rows_under("| | pairs |"):
        assert_says((accuracy, uplink), pairs.pop(name))
        assert_says((other,), kin[name])
    assert not pairs, "arms that the table leaves out"

    pairs, kin, fours = arms_of("traffic8")
    for name, accuracy, uplink, *others in rows_under("| | pairs |", after="Vectors may cross"):
        assert_says((accuracy, uplink), pairs.pop(name))
        for cell, arm in zip(others, (fours[name], kin[name]), strict=True):
            assert_says((cell,), arm)
    assert not pairs, "arms that the table leaves out"

    (thirty,) = arms_of("compare30")
    matu, per_task, matfl = (thirty[name] for name in ("matu", "per_task", "matfl"))
    halfway = [f"{100 * arm['curve']['mean'][0]:.1f}" for arm in (matu, per_task, matfl)]
    text = " ".join(README.split())
    assert "behind both ({} against {} and {} %)".format(*halfway) in text
    shares = [
        100 * matu[block][key] / per_task[block][key]
        for block, key in (("accuracy", "mean"), ("communication", "uplink_bits_per_client_round"))
    ]
    assert f"{shares[0]:.1f} % of one adapter per task at {shares[1]:.0f} % of its traffic" in text
    digits = [
        f"{100 * arm['accuracy']['per_task']['digit/handwritten']['mean']:.0f}"
        for arm in (matu, per_task)
    ]
    assert "({} against {} % on handwritten digits)".format(*digits) in text
    for name, accuracy, uplink in rows_under("| | thirty |"):
        assert_says((accuracy, uplink), thirty.pop(name))
    assert not thirty, "arms that the table leaves out"


def federations_of(comparison):
    """The arms measured, by the settings' names in a table of accuracies, which is checked."""
    start = f"| {comparison} |"
    header = next(line for line in README.splitlines() if line.startswith(start))
    names = [cell.strip(" `*") for cell in header.split("|")[2:-1]]
    measured = arms_of(comparison)
    rows = rows_under(start)
    assert len(rows) == len(measured)
    by_name = {}
    for row, arms in zip(rows, measured, strict=True):
        assert set(names) == set(arms)
        by_name[row[0].split(":")[0]] = arms
        for name, cell in zip(names, row[1:], strict=True):
            assert_says((cell,), arms[name])
    return by_name


def test_the_table_of_other_federations_says_what_was_measured():
    by_name = federations_of("settings8")

    def found(setting, arm):
        against = by_name[setting][arm]["against_ours"]
        return f"{abs(100 * against['difference']):.1f}"

    def ahead(setting, arm):
        return by_name[setting][arm]["against_ours"]["difference"] > 0

    text = " ".join(README.split())
    won = ("solo", "conflict", "distant", "skew 0.5", "skew 0.1")
    assert not any(ahead(s, "per_task") for s in won)
    points = [found(s, "per_task") for s in won]
    assert "ahead in five of the seven (by {}, {}, {}, {} and {} points)".format(*points) in text
    fours, part_time = found("fours", "per_task"), found("part-time", "per_task")
    assert ahead("fours", "per_task")
    assert ahead("part-time", "per_task")
    assert (
        f"({fours} points, at 28 % of the traffic) and with part-time clients ({part_time})" in text
    )
    lost = ("conflict", "distant", "fours", "skew 0.5")
    assert {s for s in by_name if ahead(s, "matfl")} == set(lost)
    points = [found(s, "matfl") for s in lost]
    assert f"(by {min(points)} to {max(points)} points" in text
    won = [found(s, "matfl") for s in ("solo", "skew 0.1", "part-time")]
    words = (
        "with one task a client ({} points), with strongly skewed labels ({}) and with part-time"
    )
    assert f"{words} clients ({{}})".format(*won) in text


def test_the_table_of_downloads_says_what_was_measured():
    by_name = federations_of("downloads8")
    text = " ".join(README.split())

    def crossed(arm):
        sent = arm["communication"]
        return [sent[f"{link}_bits_per_client_round"] for link in ("uplink", "downlink")]

    def shares(arms):
        pair = zip(crossed(arms["matu, int8 apart"]), crossed(arms["per_task"]), strict=True)
        return [f"{100 * ours / theirs:.0f}" for ours, theirs in pair]

    kbit = [f"{bits / 1000:.0f}" for bits in crossed(by_name["pairs"]["matu, int8 apart"])]
    words = (
        'sends {} % and receives {} % of what one adapter per task does in "pairs" ({} and {} kbit)'
    )
    assert words.format(*shares(by_name["pairs"]), *kbit) in text
    assert '{} and {} % in "fours"'.format(*shares(by_name["fours"])) in text

    def against(setting, arm):
        return 100 * by_name[setting][arm]["against_ours"]["difference"]

    folded = [against(s, name) for s in by_name for name in ("matu", "matu, int8")]
    assert max(folded) < 0
    won = [s for s in by_name if against(s, "per_task") < -0.05]
    assert set(by_name) - set(won) == {"part-time"}
    assert abs(against("part-time", "per_task")) < 0.05  # which the table's digits do not show
    words = 'ahead of `per_task` in six of the seven, by {:.1f} points in "fours", and level'
    assert words.format(-against("fours", "per_task")) in text
    behind = [against(s, "matfl") for s in ("pairs", "fours", "conflict", "distant", "skew 0.5")]
    assert min(behind) > 0
    words = '"distant" and "skew 0.5" (by {:.1f}, {:.1f}, {:.1f}, {:.1f} and {:.1f} points)'
    assert words.format(*behind) in text
    ahead = [-against(s, "matfl") for s in ("skew 0.1", "part-time")]
    assert "ahead in the others (by {:.1f} and {:.1f})".format(*ahead) in text

    (thirty,) = arms_of("downloads30")
    accuracies = [
        thirty[name]["accuracy"] for name in ("matu, int8 apart", "matu", "per_task", "matfl")
    ]
    reached = [f"{100 * a['mean']:.1f} ± {100 * a['std']:.1f}" for a in accuracies]
    words = "reaches {} %, MaTU as it is {}, `per_task` {} and `matfl` {}: it is ahead of all"
    assert words.format(*reached) in text
    beaten = [thirty[name]["against_ours"] for name in ("matu", "per_task", "matfl")]
    assert max(found["difference"] for found in beaten) < 0
    assert crossed(thirty["matfl"]) == crossed(thirty["per_task"])
    assert "with {} and {} % of the traffic of the last two".format(*shares(thirty)) in text


def test_what_is_said_of_ablations_was_measured():
    text = " ".join(README.split())
    fold, fours, related = arms_of("ablation_fold")
    other, pairs, kin, conflict = arms_of("ablation_rules")

    def ahead(arm):
        return f"{abs(100 * arm['against_ours']['difference']):.1f}"

    def both(arm):
        return f"{ahead(fold[arm])} and {ahead(fours[arm])}"

    def accuracy(arm):
        return f"{100 * arm['accuracy']['mean']:.1f}"

    down, up = "download not folded", "upload not folded"
    for words in (
        f"folding itself costs {ahead(fold[down])} points on the way down",
        f"and {ahead(fold[up])} on the way up",
        f"it is {ahead(fours[down])} and {ahead(fours[up])} points",
        f"Without masks {both('masks off')} points are lost",
        f"with B of LoRA alone {both('B only')}",
        f"and {ahead(fours['scales off'])} points with four",
        f"by least squares lose {ahead(fours['least-squares scales'])};",
        f'shrinkage in "pairs" ({accuracy(fold["mean of 3, sharpened"])})',
        f"({accuracy(related['mean of 3, sharpened'])} against {accuracy(related['mean of 3'])} %)",
        f"(there) and {ahead(other['no transfer'])} ([ablation_rules]",
        f"costs {ahead(pairs['rho = 0.2'])} points at rho = 0.2",
        f"and {ahead(pairs['rho = 0.6'])} at 0.6;",
        f"mean of three is {ahead(kin['mean of 3'])} points behind",
        f"epsilon = 0.51 {ahead(kin['mean of 3, epsilon = 0.51'])} and",
        f"averaged {ahead(kin['additive'])};",
        f"they are {ahead(conflict['mean of 3'])}, {ahead(conflict['mean of 3, epsilon = 0.51'])} "
        f"and {ahead(conflict['additive'])} points behind",
        f"(no transfer {ahead(conflict['no transfer'])} behind, the maximum in eq. 2 "
        f"{ahead(conflict['maximum magnitude'])} ahead)",
        f'{ahead(conflict["rho = 1"])} at 1 in "fours"',
    ):
        assert words in text
    lending = [
        [accuracy(arms[name]) for arms in arms_of("ablation_similarity")]
        for name in ("mean of 3, aggregated", "mean of 3")
    ]
    assert 'gives {} % in "pairs" and {} in "fours"'.format(*lending[0]) in text
    assert "that of slots of different clients {} and {} (".format(*lending[1]) in text
    two, four = (arms["products folded"] for arms in arms_of("ablation_products"))
    words = (
        f'A and B gains {ahead(two)} points in "pairs" and {ahead(four)} in "fours" at six times'
    )
    assert words in text
    for arms in arms_of("ablation_products"):
        sent = [
            arms[name]["communication"]["uplink_bits_per_client_round"]
            for name in ("products folded", "folded")
        ]
        assert round(sent[0] / sent[1]) == 6


def test_what_is_said_of_shrinkage_was_measured():
    text = " ".join(README.split())
    pairs, kin, other_kin = arms_of("ablation8")
    other_pairs = arms_of("ablation_rules")[0]

    def over(arms, better, worse):
        means = [100 * arms[name]["accuracy"]["mean"] for name in (better, worse)]
        return f"{means[0] - means[1]:.1f}"

    def fixed(arms):
        names = [name for name in arms if name.startswith("transfer: mean")]
        return max(names, key=lambda name: arms[name]["accuracy"]["mean"])

    one, three = "transfer: mean of 1", "transfer: mean of 3"
    related = kin, other_kin
    gains = [over(arms, "matu", "no transfer") for arms in related]
    assert "it adds {} and {} points to no transfer".format(*gains) in text
    rules = [over(arms, fixed(arms), "no transfer") for arms in related]
    assert "the best fixed rule {} and {} (".format(*rules) in text
    assert f"it adds {over(pairs, 'matu', 'no transfer')} (there)" in text
    lost = over(pairs, "no transfer", three), over(other_pairs, "no transfer", "mean of 3")
    assert "a fixed mean of three takes {} and {} away".format(*lost) in text
    ahead = over(pairs, one, "matu"), over(other_pairs, "mean of 1", "matu")
    assert "is {} and {} points ahead of shrinkage".format(*ahead) in text
    behind = [over(arms, "matu", one) for arms in related]
    assert "and {} and {} behind it where tasks have relatives".format(*behind) in text


def test_the_table_of_costs_says_what_was_measured():
    folder = ROOT / "experiments" / "results" / "performance"

    def times(name, column, **which):
        (row,) = [
            row
            for row in json.loads((folder / f"{name}.json").read_text())["rows"]
            if all(row[key] == value for key, value in which.items())
        ]
        return row[column]

    large = {"T": 8, "d": 10_000_000}
    round_of = {"tasks": 30, "held": 4, "d": 3_000_000, "dtype": "float32"}
    expected = [
        [
            f"{times('unify', 'x torch loop', **large):.1f} "
            f"(one thread: {times('unify_one_thread', 'x torch loop', **large):.1f})"
        ],
        [f"{times('unify_shared', 'shared x torch loop', **large):.1f}"],
        [f"{times('aggregate', 'x torch loop', **round_of):.1f}"],
        [f"{times('aggregate', 'shared x torch loop', **round_of):.1f}"],
        [f"{times('clients', 'x rival', rival='peft'):.1f}"],
        [f"{times('clients_clip', 'x rival'):.2f}"],
        [f"{times('clients', 'x rival', rival='fedjax'):.2f}"],
        [f"{times('round', 'x flower', clients=30):.1f}"],
    ]
    assert [row[2:] for row in rows_under("| | against |")] == expected


@pytest.mark.parametrize(("number", "folder"), list(enumerate(["attacks4", "attacks4_large"])))
def test_the_tables_of_attacks_say_what_was_measured(number, folder):
    results = ROOT / "experiments" / "results"
    text = (results / "reliability.md").read_text()
    start = [found.start() for found in re.finditer(r"^\| \| matu \|", text, re.MULTILINE)][number]
    header, _, *rows = (
        [cell.strip() for cell in row.split("|")[1:-1]]
        for row in text[start : text.index("\n\n", start)].splitlines()
    )
    found = json.loads((results / folder / "comparison.json").read_text())["settings"]
    assert [row[0] for row in rows] == [setting["name"] for setting in found]
    for row, setting in zip(rows, found, strict=True):
        arms = {arm["label"]: arm for arm in setting["arms"]}
        for label, cell in zip(header[1:], row[1:], strict=True):
            if label in arms:
                assert_says((cell,), arms.pop(label))
            else:
                assert cell == "–"
        assert not arms


def test_nothing_is_concluded_from_fewer_seeds_than_reports_conclude_from():
    texts = [README, *(file.read_text() for file in (ROOT / "experiments/results").glob("*.md"))]
    for text in texts:
        assert not re.search(r"\bp [<=>] ?\d|\*\*(wins|loses|ties|Ties)\*\*|\bwins?\b", text)


def ruff(*words):
    done = subprocess.run([sys.executable, "-m", "ruff", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def half_step(tmp_path, monkeypatch):
    """README's example of an algorithm, in the table as a new user's would be."""
    package = tmp_path / "matu_jax"
    shutil.copytree(ROOT / "matu_jax", package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    folder = package / "algorithms"
    (folder / "half_step.py").write_text(PYTHON[1])
    imported = "from matu_jax.algorithms.half_step import half_step"
    entry = '"half_step": half_step,'
    assert imported in README
    assert entry in README
    table = Path(algorithms.__file__).read_text()
    above = "from matu_jax.algorithms.individual"
    table = table.replace(above, f"{imported}\n{above}", 1)
    table = table.replace('    "individual"', f'    {entry}\n    "individual"', 1)
    (folder / "__init__.py").write_text(table)
    # What a contributor's change is checked by.
    ruff("format", "--check", str(tmp_path))
    ruff("check", str(tmp_path))
    module = types.ModuleType("matu_jax.algorithms.half_step")
    exec(compile(PYTHON[1], "README.md", "exec"), vars(module))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    names: dict = {}
    exec(f"{imported}\nadded = {{{entry}}}", names)
    for name, function in names["added"].items():
        monkeypatch.setitem(ALGORITHMS, name, function)


def test_the_how_to_for_an_algorithm_keeps_the_contract(half_step):
    algorithm = build(dataclasses.replace(contract.OPEN, algorithm="half_step"))
    for check in contract.CHECKS:
        check(algorithm)
    contract.trained_heads_belong_to_tasks("half_step")


def test_the_how_to_for_an_algorithm_shows_it_in_the_report(half_step, tmp_path, monkeypatch):
    """In a copy of the comparison with one arm more, by the commands that README prints."""
    comparison = tmp_path / "experiments" / "compare8.py"
    tuned = "results/compare8/tuned.json"
    (comparison.parent / tuned).parent.mkdir(parents=True)
    shutil.copy(ROOT / "experiments" / tuned, comparison.parent / tuned)
    arm = '    "half_step": {"algorithm": "half_step"},'
    assert arm.strip() in " ".join(README.split())
    shipped = (ROOT / "experiments" / "compare8.py").read_text()
    comparison.write_text(shipped.replace("ARMS = {", "ARMS = {\n" + arm, 1))
    ruff("format", "--check", str(comparison))
    ruff("check", str(comparison))
    assert "trials=6," in shipped
    quick = comparison.read_text().replace("trials=6,", "trials=2,", 1)  # so many are enough here
    comparison.write_text(quick)
    checkpoint = tiny.write_checkpoint(tmp_path / "tiny.safetensors")
    fields = {
        "rounds": 2,
        "local.steps": 2,
        "data.examples_per_slot": 16,
        "model.checkpoint": checkpoint,
        "model.lora_targets": "('query',)",
        "evaluation.max_examples": 8,
    }
    small = [f"--config.{name}={value}" for name, value in fields.items()]
    printed = README[README.index("python -m matu_jax.compare", README.index("half_step.py`")) :]
    printed = printed[: printed.index("```")].replace("\\\n", " ").splitlines()
    assert [("--tune" in line, "--arms half_step" in line) for line in printed] == [
        (True, True),
        (False, True),
    ]
    monkeypatch.chdir(tmp_path)
    for line in printed:
        python, _, program, *words = shlex.split(line)
        assert (python, program) == ("python", "matu_jax.compare")
        assert compare.main([program, *words, *small]) == 0
    report = tmp_path / "runs" / "compare8"
    for file in ("report.md", "report.html"):
        assert all(arm in (report / file).read_text() for arm in ("half_step", "matu", "fedavg"))


def test_the_table_of_methods_has_every_algorithm(monkeypatch):
    def missing(readme):
        return {name for name in ALGORITHMS if f"`{name}`" not in readme}

    assert not missing(README)
    monkeypatch.setitem(ALGORITHMS, "mine", None)
    assert missing(README) == {"mine"}
    row = "| `mine` | FedAvg, half the way |\n| `fed_lora_b` |"
    assert not missing(README.replace("| `fed_lora_b` |", row, 1))


def test_what_the_readme_names_exists():
    for name in re.findall(r"`((?:matu_jax|experiments|tests)/[\w./]+)`", README):
        assert name == "matu_jax/algorithms/half_step.py" or (ROOT / name).exists(), name
    for name in re.findall(r"\]\((experiments/[\w./-]+)\)", README):
        assert (ROOT / name).exists(), name


def test_docstring_examples_run():
    assert doctest.testmod(fold).failed == 0
    assert doctest.testmod(fold).attempted > 0
