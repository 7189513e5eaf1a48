"""The folder that a merge writes."""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from matu_jax.json_files import is_own
from matu_jax.models.tensors import INDEX, TensorFileError

UNIFIED, RECORD = "unified.safetensors", "merge.json"
_COPIED = (".json", ".txt", ".model", ".jinja", ".spm", ".bpe", ".py")  # config, tokenizer, code
_NOT_COPIED = (RECORD, INDEX, "trainer_state.json")


@contextlib.contextmanager
def output_folder(path: Path) -> Iterator[Callable[[str], Path]]:
    """A new folder; yields what names files in it, and removes these if an error comes.

    Raises:
      TensorFileError: if it is not empty, or cannot be made.
    """
    made: list[Path] = []

    def file(name: str) -> Path:
        made.append(path / name)
        return made[-1]

    existed = path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
        found = sorted(entry.name for entry in path.iterdir())
    except OSError as error:
        raise TensorFileError(f"--out {path} cannot be used: {error.strerror}.") from None
    if found:
        raise TensorFileError(
            f"--out {path} is not empty (it holds {found[0]}). Give a new folder."
        )
    try:
        yield file
    except BaseException:
        for written in made:
            written.unlink(missing_ok=True)
        if not existed:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


def copy_files(base: Path, file: Callable[[str], Path]) -> dict[str, list[str]]:
    """Copies configuration and tokenizer of a base folder.

    Links out of the folder are not followed: a base that others made could else put any file of
    this machine into the result.

    Returns:
      What merge.json says of it: the names "copied_files", and of "links_left_out".
    """
    names = sorted(
        entry.name
        for entry in (base.iterdir() if base.is_dir() else ())
        if entry.is_file() and entry.suffix in _COPIED and entry.name not in _NOT_COPIED
    )
    own = [name for name in names if is_own(base / name)]
    for name in own:
        shutil.copyfile(base / name, file(name))
    return {"copied_files": own, "links_left_out": [name for name in names if name not in own]}
