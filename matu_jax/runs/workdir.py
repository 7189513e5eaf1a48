"""A run's directory: made, locked, checked to be this run's, and read when the run is done."""

import contextlib
import dataclasses
import errno
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from matu_jax.config import Config, upgraded
from matu_jax.errors import UserError
from matu_jax.json_files import checked, is_unfinished, read_json, replace_file, write_json
from matu_jax.runs.checkpoints import Checkpoints, unreadable
from matu_jax.runs.log import MetricsLog, read_summary, selected, selection

LOCK = ".lock"


CONFIG = "config.json"


EXPERIMENT = "experiment.py"


_BEGUN = ("summary.json", "checkpoints/*", "runs/*/*/*/summary.json")  # of a run or a comparison


_MOVE_AWAY = "Move it away; then the same command with the same --workdir goes on."


_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES)


@contextlib.contextmanager
def opened(workdir: Path, config: Config) -> Iterator[None]:
    """Makes the workdir, or checks that it holds a run of this very config, and locks it.

    The lock is the operating system's, on the file `.lock`; it ends with the process, however that
    ends.

    Raises:
      UserError: if it cannot be written, holds something else, or another process is at work in it.
    """
    lock = FileLock(workdir / LOCK)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        check(workdir, config)  # before the lock, which is a file: none in a stranger's directory
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"--workdir {workdir}: another process is at work in it. Wait for its end, or give "
            "another directory."
        ) from None
    except OSError as error:
        if _file(error) == str(workdir / LOCK) and error.errno not in _DISK:
            raise UserError(f"{workdir / LOCK}: {error.strerror}. {_MOVE_AWAY}") from None
        raise UserError(
            f"--workdir {workdir} cannot be written: {_where(error)}{error.strerror}. Give a "
            "directory that can."
        ) from None
    try:
        check(workdir, config)  # again, since another process may have ended meanwhile
        with disk_errors(workdir):
            for path in filter(is_unfinished, workdir.iterdir()):  # of a run that was killed
                if not path.is_dir():
                    path.unlink()
            write_json(workdir / CONFIG, dataclasses.asdict(config))
            yield
    finally:
        lock.release()


def keep_experiment(workdir: Path, file: Path) -> str | None:
    """Keeps a copy of the experiment's file in the workdir, as it is when the work begins.

    The work has begun with the first round that is saved; older versions kept no copy.

    Returns:
      What to say if the file has changed since then; a model's or a source's code is in it, by
      which no run is told from another.
    """
    kept, text = workdir / EXPERIMENT, file.read_bytes()
    if not any(any(workdir.glob(pattern)) for pattern in _BEGUN):
        workdir.mkdir(parents=True, exist_ok=True)
        replace_file(kept, text)
    if not kept.exists() or kept.read_bytes() == text:
        return None
    return (
        f"{file} has changed since the work in {workdir} began; it was then as {kept} is. Configs, "
        "data, bases and metrics are compared, the code of models is not: if that has changed, "
        "give another --workdir."
    )


@contextlib.contextmanager
def disk_errors(workdir: Path) -> Iterator[None]:
    """Turns a full or failing disk, and files of another kind, into a message; other errors pass.

    Raises:
      UserError: says what to do.
    """
    try:
        yield
    except Exception as error:
        file = _file(error)
        if file and not _is_inside(file, workdir):
            raise
        if file and isinstance(error, OSError) and _is_in_the_way(error, file):
            above = [path for path in Path(file).parents if path.exists() and not path.is_dir()]
            file = above[0] if above else file
            raise UserError(f"{file}: {error.strerror}. {_MOVE_AWAY}") from error
        # Orbax's writers wrap the system's error into others, so that its words are all there is.
        known = [os.strerror(number) for number in _DISK]
        number = getattr(error, "errno", None)
        words = [w for w in known if w in str(error)]
        if isinstance(error, UserError) or not (words or number in _DISK):
            raise
        reason = words[0] if words else os.strerror(number or 0)
        raise UserError(
            f"{workdir} cannot be written: {reason}. Make room, or mend the disk; then the same "
            "command with the same --workdir goes on from the last checkpoint."
        ) from error


def _file(error: Exception) -> str | None:
    """The file that an error is about; of two, as in moving one, the one that is kept."""
    file = getattr(error, "filename2", None) or getattr(error, "filename", None)
    return os.fspath(file) if isinstance(file, (str, os.PathLike)) else None


def _is_inside(file: str, workdir: Path) -> bool:
    """Whether a file's own name stands in a directory, wherever a link of that name leads."""
    folder = os.path.realpath(os.path.dirname(os.path.abspath(file)))
    root = os.path.realpath(workdir)
    return os.path.commonpath((folder, root)) == root


def _is_in_the_way(error: OSError, file: str) -> bool:
    """Whether something of another kind, or a link to nowhere, stands in a file's place."""
    kinds = (IsADirectoryError, NotADirectoryError, FileExistsError)
    dead = error.errno in (errno.ENOENT, errno.ELOOP) and os.path.islink(file)
    return dead or isinstance(error, kinds)


def _where(error: OSError) -> str:
    return f"{file}: " if (file := _file(error)) else ""


def check(workdir: Path, config: Config) -> None:
    """Checks that a directory is empty, or holds a run of this very config, and can be written.

    Raises:
      UserError: if it holds something else.
      OSError: if it cannot be read or written.
    """
    kept = workdir / CONFIG
    if not os.access(workdir, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(workdir))
    if os.path.lexists(kept):
        try:
            found = read_json(kept)
        except OSError as error:
            raise UserError(f"{kept}: {error.strerror}. {_MOVE_AWAY}") from None
        except ValueError as error:
            raise UserError(f"{error}. {_MOVE_AWAY}") from None
    elif _has_run(workdir):
        found = _config_kept(workdir)
    else:
        found = None
    if _has_run(workdir):
        lines = [] if found is None else differences(found, config)
        if lines:
            raise UserError(
                f"--workdir {workdir} holds a run of another config:\n  "
                + "\n  ".join(lines)
                + "\nGive another --workdir, or the same config to go on with that run."
            )
    elif found is None or not _is_config(found):
        others = [path.name for path in workdir.iterdir() if not is_unfinished(path)]
        if set(others) - {LOCK}:
            what = f"its {CONFIG} is another's" if found is not None else f"no {CONFIG}"
            raise UserError(
                f"--workdir {workdir} is not empty and holds no run of this program ({what}). "
                "Give another directory."
            )


def _is_config(found: Any) -> bool:
    """Whether JSON is a config of this program or of an older version, and not a model's."""
    return isinstance(found, dict) and {"algorithm", "data"} <= found.keys()


def _config_kept(workdir: Path) -> Any:
    """The config of a run whose config.json is lost, as its results or its checkpoints hold it.

    Returns:
      It; None if no checkpoint was saved yet, or by an older version, which put no config there.

    Raises:
      UserError: if none of them can be read.
    """
    if (workdir / "summary.json").exists():
        with contextlib.suppress(ValueError):
            return read_summary(workdir / "summary.json")["config"]
    if (workdir / "checkpoints").is_dir():
        with Checkpoints(workdir / "checkpoints", keep=1) as checkpoints:
            last, damaged = checkpoints.whole()
            if last is not None:
                return checkpoints.meta(last).get("config")
            if not damaged:
                return None
            raise UserError(unreadable(checkpoints.directory, damaged))
    raise UserError(
        f"--workdir {workdir}: its {CONFIG} is missing, and there are no checkpoints that "
        "say what the run's config was. Bring it back from a copy, or give another --workdir."
    )


def config_of(workdir: Path) -> Config:
    """The config of a run that is there.

    Raises:
      UserError: if there is none, or it is damaged.
    """
    file = workdir / CONFIG
    try:
        return Config.from_json(checked(dict[str, Any], read_json(file), str(file)))
    except OSError as error:
        raise UserError(
            f"--workdir {workdir}: {file} cannot be read ({error.strerror}); expected the workdir "
            "of a run of matu_jax.train. If it is one, move away what is in the file's place: the "
            "command that made the run, given once more, writes the file anew."
        ) from None
    except ValueError as error:
        raise UserError(
            f"--workdir {workdir}: {error}\n{file} is damaged, or was written by another version "
            "of matu_jax."
        ) from None


def records_of(workdir: Path, checkpoints: Checkpoints, config: Config) -> list[dict[str, Any]]:
    """The records of the rounds up to the newest whole checkpoint, as they were written.

    Raises:
      ValueError: if one is missing, or was changed later.
    """
    newest, _ = checkpoints.whole()
    if newest is None:
        return []
    meta = checkpoints.meta(newest)
    check_origin(checkpoints.directory, meta, config)
    log = MetricsLog(workdir / "metrics.jsonl")
    try:
        log.check(newest, meta.get("metrics"))
    except ValueError as error:
        raise ValueError(
            f"{error}. They say which round and which client is exported, and what it reached. "
            "Bring the file back from a copy."
        ) from None
    return log.first(newest)


def chosen_round(
    workdir: Path, checkpoints: Checkpoints, records: Sequence[dict[str, Any]], given: int | None
) -> tuple[int, str]:
    """The round whose checkpoint is taken, and why.

    Args:
      workdir: of the run.
      checkpoints: its.
      records: its, from `records_of`.
      given: the round asked for; None = the one that the run's results speak of.

    Raises:
      UserError: if it has no checkpoint, or the run's results speak of another.
    """
    there = checkpoints.complete()
    if not there:
        raise UserError(f"--workdir {workdir}: has no checkpoint yet; train for a round first.")
    choices = f"There are checkpoints of rounds {', '.join(map(str, there))}"
    if given is not None:
        if given not in there:
            raise UserError(f"--round {given}: has no checkpoint. {choices}.")
        return given, "as asked for"
    best = selected(records)
    if best is None:
        return there[-1], "the last one saved; nothing was measured"
    how = selection(best)
    if best["round"] not in there:
        raise UserError(
            f"--workdir {workdir}: round {best['round']}, {how}, has no checkpoint, as in "
            f"runs of older versions. {choices}; take one with --round {there[-1]}."
        )
    if os.path.lexists(workdir / "summary.json"):
        told = read_summary(workdir / "summary.json")["selected_round"]
        if told != best["round"]:
            raise UserError(
                f"--workdir {workdir}: summary.json speaks of round {told}, and of the rounds up "
                f"to the newest checkpoint, {best['round']} is {how}: a checkpoint is "
                f"missing or damaged. Bring it back, or take another, such as --round {there[-1]}."
            )
    return best["round"], how


def is_locked(workdir: Path) -> bool:
    """Whether a process is at work in a workdir; OSError if that cannot be told."""
    if not os.path.lexists(workdir / LOCK):
        return False
    lock = FileLock(workdir / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False


def _has_run(workdir: Path) -> bool:
    """Whether a run got so far as to write anything but its config."""
    return any(
        os.path.lexists(workdir / name) for name in ("metrics.jsonl", "checkpoints", "summary.json")
    )


def check_identity(
    directory: Path, meta: dict[str, Any], config: Config, identity: dict[str, Any]
) -> None:
    """Refuses checkpoints of another config, other data or another base than a run has now.

    Args:
      directory: where they are.
      meta: what was saved with the checkpoint.
      config: of the run.
      identity: of the run, from `federation.identity`.

    Raises:
      UserError: with what differs.
    """
    check_origin(directory, meta, config)
    changed = changes(meta, identity)
    if "data" in changed:
        raise UserError(
            f"{directory}: the data of this run has changed since it began, or this version of "
            f"matu_jax divides it otherwise: task {', '.join(changed_tasks(*changed['data']))}. "
            "Bring it back as it was, go on with the version that began the run, or remove that "
            "folder to start from round 0 with the data of now."
        )
    if "base" in changed:
        raise UserError(
            f"{directory}: config.model.checkpoint, or a model of your own, holds other tensors "
            "than when this run began, and task vectors are differences from those. Bring them "
            "back as they were, or remove that folder to start from round 0 with those of now."
        )
    if "held" in changed:
        raise UserError(
            f"{directory}: tasks stand in another order, or slots or sites hold other examples, "
            "than when this run began, so that its task vectors would be taken for others'. Bring "
            "the source back as it was, such as with sorted names, or remove that folder to start "
            "from round 0."
        )
    if "measured_by" in changed:
        before, now = (", ".join(names) for names in changed["measured_by"])
        raise UserError(
            f"{directory}: this run was measured by {before}, and the model is now by {now} (the "
            "main metric first): rounds could not be compared. Bring model.metrics and the tasks' "
            "metrics back as they were, or remove that folder to start from round 0."
        )
    if "lower_is_better" in changed:
        before, now = changed["lower_is_better"]
        raise UserError(
            f"{directory}: when this run began lower values were better of "
            f"{', '.join(before) or 'no metric'}, and now of {', '.join(now) or 'none'}: rounds "
            "could not be compared. Bring model.metrics back as they were, or remove that folder "
            "to start from round 0."
        )


def changes(meta: Mapping[str, Any], identity: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What a run is of that is no longer as a checkpoint has noted it: then and now, by name.

    Args:
      meta: what was saved with the checkpoint; what older versions left out counts as it is now.
      identity: of the run, from `federation.identity`, whose config `differences` compares.
    """
    return {
        name: (meta[name], now)
        for name, now in identity.items()
        if name != "config" and meta.get(name, now) != now
    }


def changed_tasks(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The names, in quotes, of the tasks whose data's fingerprints differ."""
    return [repr(name) for name in {**now, **before} if before.get(name) != now.get(name)]


def check_origin(directory: Path, meta: dict[str, Any], config: Config) -> None:
    """Refuses checkpoints that a run of another config has saved, as after copying folders.

    Args:
      directory: where they are.
      meta: what was saved with the checkpoint; older versions put no config there.
      config: of the run.

    Raises:
      UserError: with the fields that differ.
    """
    lines = differences(meta["config"], config) if "config" in meta else []
    if lines:
        raise UserError(
            f"{directory} holds checkpoints of another config:\n  "
            + "\n  ".join(lines)
            + "\nBring this run's own back, or remove that folder to start from round 0."
        )


def differences(found: Any, config: Config) -> list[str]:
    """Where a config that was written as JSON differs from the one here, a line for each field."""
    wanted = json.loads(json.dumps(dataclasses.asdict(config)))
    return _differences(upgraded(found) if isinstance(found, dict) else {}, wanted, "config")


def _differences(found: dict, wanted: dict, path: str) -> list[str]:
    lines = []
    for key in sorted(found.keys() | wanted.keys()):
        a, b, where = found.get(key), wanted.get(key), f"{path}.{key}"
        if isinstance(a, dict) and isinstance(b, dict):
            lines += _differences(a, b, where)
        elif a != b:
            lines.append(f"{where}: there {a!r}, here {b!r}")
    return lines
