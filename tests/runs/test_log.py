import hashlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from records import a_round
from sklearn.metrics import roc_auc_score

from matu_jax.json_files import plain, write_json
from matu_jax.runs.log import MetricsLog, selected, selection
from matu_jax.runs.provenance import versions
from matu_jax.simulation.relatedness import relatedness_auc


def symmetric(values, tasks):
    matrix = np.eye(tasks)
    for (i, j), value in zip(itertools.combinations(range(tasks), 2), values, strict=True):
        matrix[i, j] = matrix[j, i] = value
    return matrix


@pytest.mark.parametrize(
    ("means", "chosen", "words"),
    [
        ([0.3, 0.5, 0.5, 0.4], 2, "the best mean validation accuracy, the first of equals"),
        ([None, 0.1, None], 2, "the best mean validation accuracy"),
        ([None, None, None], 3, "the last round measured, since none has a finite mean validation"),
    ],
)
def test_without_a_number_on_validation_the_last_round_is_chosen(means, chosen, words):
    records = [
        a_round(i + 1, accuracy=a_round(0)["accuracy"] | {"validation_mean": mean})
        for i, mean in enumerate(means)
    ]
    best = selected(records)
    assert best is not None
    assert best["round"] == chosen
    assert words in selection(best)


@given(st.data(), st.integers(3, 7))
def test_auc_is_the_share_of_ordered_pairs_and_that_of_scikit_learn(data, tasks):
    pairs = tasks * (tasks - 1) // 2
    scores = data.draw(st.lists(st.integers(0, 5), min_size=pairs, max_size=pairs))  # many ties
    labels = data.draw(st.lists(st.booleans(), min_size=pairs, max_size=pairs))
    found = relatedness_auc(symmetric(scores, tasks), symmetric(labels, tasks).astype(bool))
    if len(set(labels)) < 2:
        assert found is None
        return
    wins = total = 0.0
    for a, related in zip(scores, labels, strict=True):
        for b, other in zip(scores, labels, strict=True):
            if related and not other:
                wins += 1.0 if a > b else 0.5 if a == b else 0.0
                total += 1
    assert found == pytest.approx(wins / total)
    assert found == pytest.approx(float(roc_auc_score(labels, scores)))


def test_auc_of_perfect_reversed_and_constant_similarity():
    related = np.kron(np.eye(2), np.ones((3, 3))).astype(bool)
    assert relatedness_auc(0.5 + 0.1 * related, related) == 1.0
    assert relatedness_auc(0.5 - 0.1 * related, related) == 0.0
    assert relatedness_auc(np.full((6, 6), 0.5), related) == 0.5
    assert relatedness_auc(jnp.full((6, 6), 0.5), related) == 0.5


def test_auc_ignores_the_diagonal():
    similarity, related = symmetric([0.1, 0.2, 0.3], 3), symmetric([0, 0, 1], 3).astype(bool)
    before = relatedness_auc(similarity, related)
    np.fill_diagonal(similarity, np.nan)
    np.fill_diagonal(related, False)
    assert relatedness_auc(similarity, related) == before == 1.0


@pytest.mark.parametrize(
    ("similarity", "related", "message"),
    [
        (np.zeros((2, 3)), np.zeros((2, 3), bool), r"\(2, 3\)"),
        (np.zeros((3, 3)), np.zeros((2, 2), bool), r"\(3, 3\).*\(2, 2\)"),
        (np.zeros((2, 2)), np.zeros((2, 2)), "expected bool"),
        (symmetric([0.1, np.nan, 0.3], 3), np.eye(3, dtype=bool), "tasks 0 and 2 is nan"),
        (np.triu(np.ones((3, 3))), np.eye(3, dtype=bool), "not symmetric"),
        (np.ones((3, 3)), np.triu(np.ones((3, 3), bool)), "not symmetric"),
    ],
)
def test_auc_refuses(similarity, related, message):
    with pytest.raises(ValueError, match=message):
        relatedness_auc(similarity, related)


def test_records_come_back_in_order_as_plain_values(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    assert log.records() == []
    log.append(
        {
            "round": np.int32(1),
            "loss": jnp.float32(0.5),
            "bad": float("nan"),
            "worse": np.float32("inf"),
            "matrix": jnp.array([[1.0, jnp.nan]]),
            "half": jnp.ones(2, jnp.bfloat16),
            "mask": np.array([True, False]),
            "accuracy": None,
            "name": "naïve\u2028line",
            "path": Path("a/b"),
            "pair": (1, 2),
        }
    )
    log.append({"round": 2})
    first, second = log.records()
    assert first == {
        "round": 1,
        "loss": 0.5,
        "bad": None,
        "worse": None,
        "matrix": [[1.0, None]],
        "half": [1.0, 1.0],
        "mask": [True, False],
        "accuracy": None,
        "name": "naïve\u2028line",
        "path": "a/b",
        "pair": [1, 2],
    }
    assert second == {"round": 2}
    for token in ("NaN", "Infinity"):
        assert token not in log.path.read_text("utf-8")


def test_a_line_is_on_disk_when_the_process_dies_right_after(tmp_path):
    path = tmp_path / "metrics.jsonl"
    program = (
        "import os, sys; from matu_jax.runs.log import MetricsLog\n"
        "MetricsLog(sys.argv[1]).append({'round': 1}); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", program, path], check=False).returncode == 9
    assert MetricsLog(path).records() == [{"round": 1}]


def written(tmp_path, rounds=3):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for number in range(1, rounds + 1):
        log.append(a_round(number))
    return log


@pytest.mark.parametrize("half", ["", '{"round": 3, "lo', '{"round": 1}', "\ufffd\x00"])
@pytest.mark.parametrize("keep", [0, 2, 3])
def test_truncate_drops_later_rounds_and_a_half_written_line(tmp_path, keep, half):
    log = written(tmp_path)
    before = log.path.read_text("utf-8")
    with log.path.open("a", encoding="utf-8") as file:
        file.write(half)
    assert [record["round"] for record in log.records()] == [1, 2, 3]
    log.truncate_after(keep)
    kept = before.splitlines(keepends=True)[:keep]
    assert log.path.read_text("utf-8") == "".join(kept)  # byte for byte
    log.append(a_round(keep + 1))
    assert [record["round"] for record in log.first(keep + 1)] == [*range(1, keep + 2)]
    assert log.fingerprint == hashlib.sha256(log.path.read_bytes()).hexdigest()
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_truncate_survives_a_half_written_character(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append(a_round(1))
    log.path.write_bytes(log.path.read_bytes() + '{"name": "é'.encode()[:-1])
    log.truncate_after(1)
    assert log.records() == [a_round(1)]


def test_truncate_of_nothing_makes_nothing(tmp_path):
    MetricsLog(tmp_path / "metrics.jsonl").truncate_after(0)
    assert not os.listdir(tmp_path)


BROKEN = [b"{broken", b"[1]", b'{"loss": 1}', b"", b'{"round": null}', b"\xff", b"[" * 10**5]


@pytest.mark.parametrize("line", BROKEN)
def test_a_broken_line_is_named_and_left_unless_it_would_go_anyway(tmp_path, line):
    log = written(tmp_path)
    first, _, third = log.path.read_bytes().splitlines(keepends=True)
    text = first + line + b"\n" + third
    log.path.write_bytes(text)
    for act in (log.records, lambda: log.truncate_after(2)):
        with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
            act()
    assert log.path.read_bytes() == text
    log.truncate_after(1)
    assert log.path.read_bytes() == first


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([2, 3], "line 1: found round 2, expected round 1: each round from 1 to 3 once"),
        ([1, 2], "found rounds 1 to 2, expected rounds 1 to 3"),
        ([], "found no round, expected rounds 1 to 3"),
        ([1, 2, 2, 3], "line 3: found round 2, expected round 3"),
        ([1, 3, 2], "line 2: found round 3, expected round 2"),
    ],
)
def test_rounds_that_are_missing_doubled_or_mixed_up_are_named(tmp_path, lines, words):
    log = written(tmp_path)
    text = log.path.read_bytes().splitlines(keepends=True)
    log.path.write_bytes(b"".join(text[number - 1] for number in lines))
    for act in (log.first, log.truncate_after, lambda count: log.check(count, None)):
        with pytest.raises(ValueError, match=words):
            act(3)


FIELDS = {
    "uplink_bits": -1,
    "downlink_bits": 0.5,
    "clients": [0, "1"],
    "aggregated": 1,
    "similarity_auc": 1.5,
    "seconds": {"compile": -1.0},
    "loss": "0.5",
    "accuracy": {"test_mean": 0.5},
}


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_that_is_missing_or_wrong_is_named(tmp_path, field):
    log = written(tmp_path, rounds=1)
    lines = log.path.read_bytes()
    log.append(a_round(2, **{field: FIELDS[field]}))
    with pytest.raises(ValueError, match=rf"line 2:\n  {field}"):
        log.first(2)
    lacking = {key: value for key, value in a_round(2).items() if key != field}
    log.path.write_bytes(lines + json.dumps(lacking).encode() + b"\n")
    with pytest.raises(ValueError, match=rf"line 2:\n  {field}: missing"):
        log.first(2)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_numbers_that_are_not_finite_are_no_results(tmp_path, number):
    log = written(tmp_path, rounds=1)
    log.path.write_text(log.path.read_text("utf-8").replace('"loss": 0.1', f'"loss": {number}'))
    with pytest.raises(ValueError, match="line 1:\n  loss: found"):
        log.first(1)


def test_a_number_that_was_changed_is_noticed_where_the_fingerprint_is_known(tmp_path):
    log = written(tmp_path)
    known = log.fingerprint
    log.check(3, known)
    log.append(a_round(4))
    log.check(3, known)  # what follows is no part of it
    log.path.write_text(log.path.read_text("utf-8").replace('bits": 100', 'bits": 1', 1))
    log.check(3, None)
    with pytest.raises(ValueError, match="rounds 1 to 3 was changed later"):
        log.truncate_after(3, known)


@pytest.mark.parametrize("record", [{}, {"round": None}, {"round": 1.5}, {"round": True}])
def test_a_record_needs_its_round(tmp_path, record):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match="round"):
        log.append(record)
    assert not log.path.exists()


@pytest.mark.parametrize("value", [{1, 2}, object(), np.array([object()])])
def test_what_json_cannot_hold_is_named_by_its_place(value):
    with pytest.raises(ValueError, match=r"value\.a\[1\]\.b"):
        plain({"a": [0, {"b": value}]})


def test_write_json_replaces_the_file_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_json(path, {"mean": np.float64(0.25), "worst": float("-inf"), "rounds": {1: 2}})
    assert json.loads(path.read_text("utf-8")) == {"mean": 0.25, "worst": None, "rounds": {"1": 2}}
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"summary\.json\.bad"):
        write_json(path, {"bad": object()})

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_json(path, {"mean": 0.5})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["summary.json"]


def test_versions_are_those_of_the_modules():
    import flax
    import jax
    import optax

    found = versions()
    assert found["jax"] == jax.__version__
    assert found["flax"] == flax.__version__
    assert found["optax"] == optax.__version__
    assert found["numpy"] == np.__version__
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["matu_jax"]
    assert found["orbax-checkpoint"]
    assert found["jaxlib"]
