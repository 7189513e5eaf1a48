"""Checkpoints: a round's state on disk and back, on any number of devices, or a clear refusal.

Orbax writes and reads the arrays. What is added here: a checkpoint counts only once the checksums
of its files are written, and is read only if they still hold, so that a damaged one is noticed
before anything is made of it; and the leaves are compared by name before they are read.
"""

import contextlib
import errno
import glob
import hashlib
import json
import logging
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import AfterValidator, BaseModel, Field

from matu_jax.json_files import checked, name_inside, read_json, regular_file
from matu_jax.trees import PyTree, leaf_items

_CHECKSUMS = "checksums.json"
_FORMAT = 2  # 1: mask bits in the order of parameters; 2: as `matu_jax.Unified` has them


_Checksums = dict[Annotated[str, AfterValidator(name_inside)], str]


_log = logging.getLogger(__name__)


class _Notes(BaseModel):
    leaves: list[Annotated[list[str], Field(min_length=2, max_length=2)]]  # path and kind
    meta: dict[str, Any]
    format: int = 1


class Checkpoints:
    """The checkpoints of one run, one folder per round in `directory`; a context manager.

    For one process (its devices may be many): of several that make one run, one keeps them. Orbax,
    which is slow to import, is imported with the first instance.

    Attributes:
      directory: where they are; made if missing.
      keep: how many stay on disk; with 1 there is none to fall back to.

    Raises:
      ValueError: if `keep` is not positive.
      FileExistsError: if a pipe or a device is in it, at which Orbax would wait for ever.
    """

    def __init__(self, directory: str | os.PathLike[str], *, keep: int):
        if keep < 1:
            raise ValueError(f"Checkpoints: found keep={keep}; expected at least 1.")
        self.directory: Path = Path(directory).absolute()
        self.keep: int = keep
        self.directory.mkdir(parents=True, exist_ok=True)
        for path in self.directory.rglob("*"):
            if path.exists() and not path.is_file() and not path.is_dir():
                raise FileExistsError(errno.EEXIST, "not a regular file", str(path))
        with _quiet() as ocp:
            own = jax.process_index()  # Orbax would else wait for the other processes
            alone = ocp.options.MultiprocessingOptions(
                primary_host=own, active_processes={own}, barrier_sync_key_prefix=str(own)
            )
            options = ocp.CheckpointManagerOptions(
                enable_async_checkpointing=False, create=False, multiprocessing_options=alone
            )
            self._manager = ocp.CheckpointManager(self._known_as(), options=options)

    def _known_as(self) -> Path:
        """The directory by a name that Orbax reads right: it takes `[a]` in a path for a pattern.

        Where there is such a thing in it, a link to it from a directory for temporary files. (What
        Orbax has put down it would else not put together, and say nothing.)
        """
        self._alias = None
        if not glob.has_magic(str(self.directory)):
            return self.directory
        self._alias = tempfile.TemporaryDirectory(prefix="matu_jax-")
        link = Path(self._alias.name) / "checkpoints"
        if glob.has_magic(str(link)):
            raise ValueError(
                f"{self.directory}: Orbax takes *, ? and [ in a path for a pattern, and the "
                f"directory for temporary files, {tempfile.gettempdir()}, has one too. Set TMPDIR "
                "to one without, or give another directory."
            )
        link.symlink_to(self.directory, target_is_directory=True)
        return link

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Ends Orbax's threads. Whatever was saved is on disk already."""
        self._manager.close()
        if self._alias:
            self._alias.cleanup()

    def save(
        self,
        round_index: int,
        state: PyTree,
        meta: dict[str, Any],
        *,
        spare: int | None = None,
    ) -> None:
        """Saves a round; durable when this returns, and then the oldest make room.

        Checkpoints of this round or later, which `restore` has passed over, are removed first.

        Args:
          round_index: rounds completed.
          state: any pytree of numpy or JAX arrays; it may have no leaves.
          meta: what JSON can hold (tuples come back as lists, keys as strings).
          spare: a round whose checkpoint stays besides the newest, however old it is.

        Raises:
          ValueError: if two leaves have the same path.
          TypeError: if `meta` cannot be written as JSON.
        """
        leaves = _by_path(state)
        notes = {"leaves": list(_kinds(leaves).items()), "meta": meta, "format": _FORMAT}
        json.dumps(notes)  # raises before anything is removed
        arrays = {f"{i:05d}": leaf for i, leaf in enumerate(leaves.values()) if leaf.size}
        if jax.process_count() > 1:
            arrays = jax.device_get(arrays)  # JAX arrays Orbax would have written by all processes
        self._remove([other for other in self._folders() if other >= round_index])
        with _quiet() as ocp:
            items = {"meta": ocp.args.JsonSave(notes)}
            if arrays:  # Orbax refuses trees without leaves, and leaves of size 0
                items["state"] = ocp.args.StandardSave(arrays)
            self._manager.save(round_index, args=ocp.args.Composite(**items), force=True)
        _write_checksums(self._folder(round_index))
        kept = self.complete()[-self.keep :]
        self._remove([n for n in self._folders() if n < kept[0] and n != spare])

    def latest(self) -> int | None:
        """The newest round with a complete checkpoint (its files are not checked), or None."""
        return max(self.complete(), default=None)

    def whole(self) -> tuple[int | None, dict[int, str]]:
        """The newest checkpoint whose files are as they were written.

        Returns:
          Its round, or None if there is none; and what is wrong with those newer than it, by round,
          the newest first.
        """
        damaged: dict[int, str] = {}
        for round_index in reversed(self.complete()):
            damage = _damage(self._folder(round_index))
            if damage is None:
                return round_index, damaged
            damaged[round_index] = damage
        return None, damaged

    def restore_round(
        self, round_index: int, target_state: PyTree
    ) -> tuple[PyTree, dict[str, Any]]:
        """Reads the checkpoint of one round: its state and its meta, as `restore` does.

        Raises:
          ValueError: if it is not there or damaged, or has other leaves than the target.
        """
        if round_index not in self.complete():
            raise ValueError(f"{self.directory}: there is no checkpoint of round {round_index}.")
        damage = _damage(self._folder(round_index))
        if damage is not None:
            raise ValueError(f"{self._folder(round_index)} is damaged ({damage}).")
        return self._read(round_index, target_state)

    def restore(self, target_state: PyTree) -> tuple[int, PyTree, dict[str, Any]] | None:
        """Reads the newest checkpoint that is whole.

        Damaged newer ones are passed over, each with a logged warning; those that were cut short
        by the end of their run do not count at all.

        Args:
          target_state: a tree like the one saved, of arrays or `jax.ShapeDtypeStruct`. Leaves come
            back placed as in this tree: numpy as numpy, the others as JAX arrays with the sharding
            given, or on the default device where none is.

        Returns:
          The round, its state and its meta; None if there is no checkpoint.

        Raises:
          ValueError: if every checkpoint is damaged, or the state saved has other leaves than the
            target, naming them.
        """
        round_index, damaged = self.whole()
        for number, damage in damaged.items():
            _log.warning("%s is damaged (%s); it is left out.", self._folder(number), damage)
        if round_index is not None:
            return round_index, *self._read(round_index, target_state)
        if damaged:
            raise ValueError(unreadable(self.directory, damaged))
        return None

    def meta(self, round_index: int) -> dict[str, Any]:
        """What was saved with a round besides its state."""
        return self._notes(round_index)["meta"]

    def _notes(self, round_index: int) -> dict[str, Any]:
        with _quiet() as ocp:
            args = ocp.args.Composite(meta=ocp.args.JsonRestore())
            notes = self._manager.restore(round_index, args=args)["meta"]
        return checked(_Notes, notes, f"{self._folder(round_index)}: damaged").model_dump()

    def _read(self, round_index: int, target_state: PyTree) -> tuple[PyTree, dict[str, Any]]:
        target = _by_path(target_state)
        notes = self._notes(round_index)
        found = dict(notes["leaves"])
        _check_leaves(found, _kinds(target), self._folder(round_index))
        if notes["format"] != _FORMAT and any(kind.startswith("uint8") for kind in found.values()):
            raise ValueError(
                f"{self._folder(round_index)}: found format {notes['format']}, expected {_FORMAT}: "
                "it was saved by another version of matu_jax, which orders the bits of masks "
                "otherwise. Go on with the version that saved it, or choose another folder."
            )
        number = {path: f"{i:05d}" for i, (path, _) in enumerate(notes["leaves"])}
        wanted = {number[path]: _placement(leaf) for path, leaf in target.items() if leaf.size}
        arrays = {}
        if wanted:
            with _quiet() as ocp:
                args = ocp.args.Composite(state=ocp.args.StandardRestore(wanted))
                try:
                    arrays = self._manager.restore(round_index, args=args)["state"]
                except KeyError:  # the files are as they are listed, and the list is short
                    folder = self._folder(round_index)
                    raise ValueError(f"{folder}: damaged: it has no state. Remove it.") from None
        leaves = [
            _like(leaf, arrays[number[path]] if leaf.size else np.zeros(leaf.shape, leaf.dtype))
            for path, leaf in target.items()
        ]
        return jax.tree.unflatten(jax.tree.structure(target_state), leaves), notes["meta"]

    def _folder(self, round_index: int) -> Path:
        return self.directory / str(round_index)

    def _folders(self) -> list[int]:
        names = [path.name for path in self.directory.iterdir() if path.is_dir()]
        return sorted(int(name) for name in names if name.isdecimal() and name == str(int(name)))

    def complete(self) -> list[int]:
        """The rounds that have a complete checkpoint, in order; their files are not checked."""
        return [n for n in self._folders() if (self._folder(n) / _CHECKSUMS).exists()]

    def _remove(self, rounds: list[int]) -> None:
        for number in rounds:
            if (self._folder(number) / _CHECKSUMS).is_file():
                (self._folder(number) / _CHECKSUMS).unlink()  # no longer complete
            shutil.rmtree(self._folder(number))
        if rounds:
            self._manager.reload()


def unreadable(directory: Path, damaged: dict[int, str]) -> str:
    """What to say where no checkpoint is whole; damages by round."""
    found = "; ".join(f"round {number}: {damage}" for number, damage in damaged.items())
    return (
        f"{directory}: no checkpoint can be read ({found}). Bring the files back from a copy, or "
        "remove this folder to start from round 0."
    )


@contextlib.contextmanager
def _quiet() -> Iterator[Any]:
    """Imports Orbax and holds its chatter (not its errors) back from the terminal meanwhile."""
    from absl import logging as absl_logging

    before, hook = absl_logging.get_verbosity(), sys.unraisablehook

    def heard(unraisable):
        if str(unraisable.exc_value) != _LATE:
            hook(unraisable)

    absl_logging.set_verbosity(absl_logging.ERROR)
    loggers = [logging.getLogger(name) for name in ("asyncio", "concurrent.futures")]
    for logger in (absl_logging.get_absl_logger(), *loggers):
        logger.addFilter(_no_tracebacks_of_orbax)  # which counts once
    sys.unraisablehook = heard
    try:
        import orbax.checkpoint as ocp

        yield ocp
        sys.unraisablehook = hook  # after an error it stays: threads are late
    finally:
        absl_logging.set_verbosity(before)


_LATE = "Event loop is closed"  # what threads meet that report after an error has ended their loop


def _no_tracebacks_of_orbax(record: logging.LogRecord) -> bool:
    """Leaves out what is logged, at times later, of errors in Orbax's threads.

    It raises them as well, or where several writes fail, one of them. Its files are etils'.
    """
    if not record.exc_info:
        return True
    modules = (sys.modules.get(name) for name in ("orbax.checkpoint", "etils.epath"))
    folders = tuple(str(Path(m.__file__).parent) for m in modules if m and m.__file__)
    _, error, trace = record.exc_info
    frames = (frame.f_code.co_filename for frame, _ in traceback.walk_tb(trace))
    of_orbax = any(file.startswith(folders) for file in (record.pathname, *frames))
    return not (of_orbax or "orbax" in record.getMessage() or str(error) == _LATE)


def _by_path(tree: PyTree) -> dict[str, Any]:
    """Leaves by path, in order; what is neither an array nor the shape of one becomes an array."""
    leaves: dict[str, Any] = {}
    for path, leaf in leaf_items(tree):
        if path in leaves:
            raise ValueError(f"checkpoint: two leaves are called {path}; rename one.")
        leaves[path] = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    return leaves


def _kinds(leaves: dict[str, Any]) -> dict[str, str]:
    return {path: f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves.items()}


def _check_leaves(found: dict[str, str], expected: dict[str, str], folder: Path) -> None:
    wrong = [
        f"  {path}: found {found.get(path, 'nothing')}, expected {expected.get(path, 'nothing')}"
        for path in (found | expected)
        if found.get(path) != expected.get(path)
    ]
    if wrong:
        raise ValueError(
            f"{folder}: the state saved differs from the run's own\n"
            + "\n".join(wrong)
            + "\nResume with the config and the version that saved it, or choose another folder."
        )


def _placement(leaf: Any) -> Any:
    """How Orbax is asked for a leaf: with a sharding, or else as a numpy array."""
    sharding = getattr(leaf, "sharding", None)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    elif sharding is None or (isinstance(leaf, jax.Array) and not leaf.committed):
        return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _like(leaf: Any, found: Any) -> Any:
    """Numpy stays numpy where the target is; elsewhere it becomes an uncommitted JAX array."""
    if isinstance(leaf, (np.ndarray, np.generic)) or isinstance(found, jax.Array):
        return found
    return jnp.asarray(found)


def _checksum(file: Path) -> str:
    with regular_file(file).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _write_checksums(folder: Path) -> None:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    sums = {file.relative_to(folder).as_posix(): _checksum(file) for file in files}
    temporary = folder / f"{_CHECKSUMS}.tmp"
    with temporary.open("w", encoding="utf-8") as stream:
        json.dump(sums, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, folder / _CHECKSUMS)


def _damage(folder: Path) -> str | None:
    """What is wrong with the files of a checkpoint, or None."""
    try:
        sums = checked(_Checksums, read_json(folder / _CHECKSUMS), _CHECKSUMS)
        if not sums:
            return f"{_CHECKSUMS} lists no file"
        for name, checksum in sums.items():
            if _checksum(folder / name) != checksum:
                return f"{name} has changed since it was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).relative_to(folder)} is missing"
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    except ValueError:
        return f"{_CHECKSUMS} is not readable"
    return None
