"""What is compared: arms in settings, over seeds; and which runs that makes."""

import dataclasses
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel

from matu_jax.config import Config, renamed
from matu_jax.errors import did_you_mean
from matu_jax.json_files import checked, plain, read_json
from matu_jax.runs import commandline
from matu_jax.runs.commandline import Source
from matu_jax.runs.log import MeasureSchema

Fields = Mapping[str, Any]
"""Fields of an experiment and their values, such as {"algorithm": "fedavg", "local.steps": 10}."""

_SEEDED = frozenset({"seed", "data.seed"})
_LONGEST = 200  # bytes of a folder's name; file systems take 255


@dataclasses.dataclass(frozen=True)
class Setting:
    """A federation in which all arms are run.

    Attributes:
      description: one sentence for the report's reader.
      fields: what differs from the comparison's experiment.
      seconds: what one run took on two CPU cores, to say from the start how long it will take; 0 =
        not known.
      arms: labels of the arms that are run here; empty = all.
    """

    description: str
    fields: Fields
    seconds: float = 0.0
    arms: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A comparison; what `get_config()` of its file returns.

    Attributes:
      title: of the report.
      experiment: what all runs have in common, a `matu_jax.config.Config`.
      settings: by name.
      arms: fields by label. An arm is an algorithm with its choices.
      seeds: each is `seed` and `data.seed` of its runs.
      reference: the arm that the others are measured by.
      ours: the arm that the others are tested against.
      search: fields tried for every arm by `--tune`, with their values in the order of trial.
      own_search: by label, fields that only this arm has, tried after these.
      trials: how many runs the search spends on every arm.
      tuning_setting: where the search is made; "" = the first setting.
      tuning_seed: its seed, none of `seeds`.
      tuned: file with the search's result, beside the comparison's own; "" = none.
    """

    title: str
    experiment: Config
    settings: Mapping[str, Setting]
    arms: Mapping[str, Fields]
    seeds: Sequence[int] = (0, 1, 2)
    reference: str = "per_task"
    ours: str = "matu"
    search: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
    own_search: Mapping[str, Mapping[str, Sequence[Any]]] = dataclasses.field(default_factory=dict)
    trials: int = 5
    tuning_setting: str = ""
    tuning_seed: int = 1000
    tuned: str = ""


class Run(NamedTuple):
    """One run: an arm in a setting with a seed."""

    setting: str
    arm: str
    seed: int

    def folder(self, workdir: Path) -> Path:
        """Where the run's results are."""
        return workdir / "runs" / folder_name(self.setting) / folder_name(self.arm) / str(self.seed)


def folder_name(label: str) -> str:
    """A label as the name of a folder: letters, digits and the signs that every system takes."""
    return "".join(c if c.isalnum() or c in "-_.,=+" else "_" for c in label)


def arms_of(comparison: Comparison, setting: str) -> list[str]:
    """The labels of the arms that are run in a setting."""
    own = comparison.settings[setting].arms
    return [label for label in comparison.arms if not own or label in own]


def runs(comparison: Comparison) -> Iterator[Run]:
    """All runs, setting by setting and seed by seed, so that a part of them is a comparison."""
    for setting in comparison.settings:
        for seed in comparison.seeds:
            for arm in arms_of(comparison, setting):
                yield Run(setting, arm, seed)


def run_config(comparison: Comparison, run: Run, *more: Fields) -> Config:
    """The config of a run; later fields win: experiment, setting, arm, then `more`.

    Raises:
      ValueError: names the setting or the arm, and the field that is wrong.
    """
    config = comparison.experiment
    layers = [
        (f"settings[{run.setting!r}]", comparison.settings[run.setting].fields),
        (f"arms[{run.arm!r}]", comparison.arms[run.arm]),
        *[("search", fields) for fields in more],
        ("seeds", {"seed": run.seed, "data.seed": run.seed}),
    ]
    for where, fields in layers:
        try:
            config = config.with_fields(fields)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    try:
        return config.check()
    except ValueError as error:
        raise ValueError(f"settings[{run.setting!r}], arms[{run.arm!r}]: {error}") from None


def overridden(comparison: Comparison, changes: Mapping[str, str]) -> Comparison:
    """A comparison whose experiment has the fields of a command line.

    Raises:
      ValueError: for an unknown field (with "did you mean"), or a value of the wrong type, of the
        comparison's own as well; and for a seed, which `seeds` gives.
    """
    _check_types(comparison)
    if given := _SEEDED & changes.keys():
        raise ValueError(
            f"--config.{min(given)}: each of `seeds` is both `seed` and `data.seed` of its runs. "
            "Give --seeds in its place."
        )
    experiment = commandline.overridden(comparison.experiment, changes)
    return dataclasses.replace(comparison, experiment=experiment)


def _check_types(comparison: Comparison) -> None:
    if not isinstance(comparison.experiment, Config):
        raise ValueError(
            f"experiment: found {type(comparison.experiment).__name__}, expected a "
            "matu_jax.config.Config, such as Config(rounds=10)."
        )

    def check_fields(found: Any, where: str) -> None:
        for name, kind in typing.get_type_hints(type(found)).items():
            if name != "experiment":
                checked(kind, getattr(found, name), where + name)

    check_fields(comparison, "")
    for name, setting in comparison.settings.items():
        check_fields(setting, f"settings[{name!r}].")


def check(comparison: Comparison) -> None:
    """Checks a comparison as a whole.

    Raises:
      ValueError: one message with everything that is wrong.
    """
    _check_types(comparison)
    problems = []
    for name in ("settings", "arms", "seeds"):
        if not getattr(comparison, name):
            problems.append(f"{name}: found none, expected at least one.")
    for name in ("reference", "ours"):
        if getattr(comparison, name) not in comparison.arms:
            label = getattr(comparison, name)
            hint = did_you_mean(label, comparison.arms)
            problems.append(f"{name}: found {label!r}, no such arm.{hint}")
    for label in comparison.own_search:
        if label not in comparison.arms:
            hint = did_you_mean(label, comparison.arms)
            problems.append(f"own_search: found {label!r}, no such arm.{hint}")
    for name, setting in comparison.settings.items():
        for label in setting.arms:
            if label not in comparison.arms:
                hint = did_you_mean(label, comparison.arms)
                problems.append(f"settings[{name!r}].arms: found {label!r}, no such arm.{hint}")
    if comparison.tuning_setting not in ("", *comparison.settings):
        problems.append(f"tuning_setting: found {comparison.tuning_setting!r}, no such setting.")
    if len(set(comparison.seeds)) < len(comparison.seeds):
        problems.append(f"seeds: found {comparison.seeds}, expected each one once.")
    if comparison.tuning_seed in comparison.seeds:
        problems.append(
            f"tuning_seed: found {comparison.tuning_seed}, which is one of seeds; the search has "
            "to be made on another."
        )
    for what, labels in (("settings", comparison.settings), ("arms", comparison.arms)):
        folders = [folder_name(label) for label in labels]
        for label, folder in zip(labels, folders, strict=True):
            if folders.count(folder) > 1:
                problems.append(f"{what}: {label!r}: another one has the same folder, {folder!r}.")
            if len(folder.encode()) > _LONGEST:
                problems.append(
                    f"{what}: {label!r}: its folder's name has {len(folder.encode())} bytes, "
                    f"expected {_LONGEST} at most. Give it a shorter name."
                )
    problems += _overwritten(comparison)
    if not problems:
        for setting in comparison.settings:
            for arm in arms_of(comparison, setting):
                try:
                    run_config(comparison, Run(setting, arm, comparison.seeds[0]))
                except ValueError as error:
                    problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))


def _overwritten(comparison: Comparison) -> Iterator[str]:
    """Names the fields whose values would be replaced by seeds, or by what a search chooses."""
    places = {f"settings[{name!r}]": each.fields for name, each in comparison.settings.items()}
    places |= {f"arms[{label!r}]": fields for label, fields in comparison.arms.items()}
    for where, fields in places.items():
        for name in sorted(_SEEDED & fields.keys()):
            yield (
                f"{where}: found {name!r}, and each of `seeds` is both `seed` and `data.seed` of "
                "its runs. Remove it, and give `seeds` the values to run with."
            )
    for label, fields in comparison.arms.items() if comparison.tuned else ():
        searched = {**comparison.search, **comparison.own_search.get(label, {})}
        for name in fields.keys() & searched.keys():
            if fields[name] not in searched[name][:1]:  # the one to start from
                yield (
                    f"arms[{label!r}]: found {name!r}, which is searched as well, so that the "
                    "arm's own value would not be used. Remove it from the arm, or from `search` "
                    "and `own_search`, or make it the first value there."
                )


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _names(text: str, known: Iterable[str]) -> list[str]:
    """Reads names with commas between; a name may hold commas itself, the longest is taken."""
    if text in known:
        return [text]
    by_words = {_words(name): name for name in known}
    words, names = _words(text), []
    while words:
        ends = range(len(words), 0, -1)
        end = next((end for end in ends if words[:end] in by_words), 1)
        names.append(by_words.get(words[:end], words[0]))
        words = words[end:]
    return names


def part(comparison: Comparison, **chosen: str) -> Comparison:
    """A comparison of some settings, arms or seeds only, each given as names with commas between.

    Raises:
      ValueError: for a name that is none of the comparison's.
    """
    names: dict[str, Any] = {}
    for what, text in chosen.items():
        if what == "seeds":
            words = _words(text)
            if not words or not all(word.isdecimal() for word in words):
                raise ValueError(f"--seeds: found {text!r}, expected numbers such as 0,1,2.")
            names["seeds"] = tuple(map(int, words))
            continue
        there = getattr(comparison, what)
        names[what] = _names(text, there)
        for name in names[what]:
            if name not in there:
                raise ValueError(f"--{what}: found {name!r}.{did_you_mean(name, there)}")
    return only(comparison, **names)


def option(what: str, names: Sequence[str], known: Iterable[str]) -> dict[str, str]:
    """The option of a command line that chooses names, such as {"arms": "matu,fedavg"}.

    Nothing where names with commas in them would be read as others.
    """
    text = ",".join(names)
    return {what: text} if _names(text, known) == list(names) else {}


def only(
    comparison: Comparison,
    *,
    settings: Collection[str] | None = None,
    arms: Collection[str] | None = None,
    seeds: Sequence[int] | None = None,
) -> Comparison:
    """A comparison of some settings, arms or seeds only, all of them where None is given."""
    changes: dict[str, Any] = {} if seeds is None else {"seeds": tuple(seeds)}
    for what, names in (("settings", settings), ("arms", arms)):
        if names is not None:
            there = getattr(comparison, what)
            changes[what] = {name: value for name, value in there.items() if name in names}
    for name in ("reference", "ours"):
        left = changes.get("arms", comparison.arms)
        if getattr(comparison, name) not in left and left:
            changes[name] = next(iter(left))
    if "arms" in changes:
        kept = {}
        for name, setting in changes.get("settings", comparison.settings).items():
            own = tuple(label for label in setting.arms if label in changes["arms"])
            if own or not setting.arms:
                kept[name] = dataclasses.replace(setting, arms=own)
        changes["settings"] = kept
        changes["own_search"] = {
            label: fields
            for label, fields in comparison.own_search.items()
            if label in changes["arms"]
        }
    if comparison.tuning_setting not in ("", *changes.get("settings", comparison.settings)):
        changes["tuning_setting"] = ""
    return dataclasses.replace(comparison, **changes)


_UNSEARCHED = (
    "Bring it back, or give the comparison what --tune shall try, `search`, or set tuned = ''."
)


class _Trial(BaseModel):
    fields: dict[str, Any]
    validation: float | None


class _TunedArm(BaseModel):
    chosen: dict[str, Any]
    validation: float | None = None
    measure: MeasureSchema | None = None  # older versions lack it, and the next
    fields: dict[str, Any] | None = None
    trials: list[_Trial] = []


class _Tuned(BaseModel):
    """What a comparison needs of a search's result."""

    arms: dict[str, _TunedArm]


def read_tuned(path: Path) -> dict[str, Any]:
    """Reads what a search has written: "arms" by label, and how it was made.

    An arm has "chosen", and "fields", its own beside which these were chosen.

    Fields that an earlier version wrote have the names of now.

    Raises:
      FileNotFoundError: if it is not there.
      ValueError: names the file, and what is damaged or missing in it, or why it cannot be read.
    """
    try:
        found = read_json(path)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    checked(_Tuned, found, f"{path}: damaged")
    for arm in found["arms"].values():
        arm["chosen"] = renamed(arm["chosen"])
        if arm.get("fields") is not None:
            arm["fields"] = renamed(arm["fields"])
        for trial in arm.get("trials", []):
            trial["fields"] = renamed(trial["fields"])
    return found


def with_tuned(comparison: Comparison, source: Source) -> tuple[Comparison, dict[str, Any] | None]:
    """Puts the fields that a search has chosen into the arms.

    Args:
      comparison: as its file has it.
      source: where it is from: the file that `tuned` stands beside.

    Returns:
      The comparison, and what the search's file holds (None if `tuned` is "").

    Raises:
      ValueError: if the search's file is missing or damaged, or lacks an arm, or an arm's own
        fields are no longer those beside which it was searched.
    """
    if not comparison.tuned:
        return comparison, None
    path = source.file.parent / comparison.tuned

    def advice(what: str, labels: Sequence[str] = ()) -> str:
        given = option("arms", labels, comparison.arms) if labels else {}
        if not comparison.search:
            return _UNSEARCHED
        return f"{what} with: {source.command('compare', ['--tune'], **given)}"

    try:
        found = read_tuned(path)
    except FileNotFoundError:
        raise ValueError(f"tuned: {path} is not there. {advice('Make it')}") from None
    except ValueError as error:
        raise ValueError(f"tuned: {error}. {advice('Make it')}") from None
    searched = found["arms"]
    if lacking := [label for label in comparison.arms if label not in searched]:
        names = ", ".join(map(repr, lacking))
        raise ValueError(f"tuned: {path} lacks {names}. {advice('Add them', lacking)}")
    changed, was = [], ""
    for label, fields in comparison.arms.items():
        before, now = searched[label].get("fields"), as_json(fields)
        if before is not None and before != now:
            changed.append(label)
            was += f"\n  {label}: searched with {before or 'none'}, has {now or 'none'}"
    if changed:
        raise ValueError(
            f"tuned: in {path} are choices for arms whose own fields have changed since:{was}\n"
            "Bring these back, or move the folders of these arms in the workdir's folder tuning "
            f"away and search them again. {advice('Search them', changed)}"
        )
    arms = {
        label: {**fields, **searched[label]["chosen"]} for label, fields in comparison.arms.items()
    }
    return dataclasses.replace(comparison, arms=arms), found


def as_json(fields: Fields) -> dict[str, Any]:
    """Fields as JSON holds them, to be compared with what was kept of them."""
    blocks = {
        name: dataclasses.asdict(value)
        for name, value in fields.items()
        if dataclasses.is_dataclass(value) and not isinstance(value, type)
    }
    return plain({**fields, **blocks})
