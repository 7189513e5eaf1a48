"""Safetensors files in pieces: models read and written without ever standing in memory whole.

The safetensors library checks a file and names its mistakes; bytes are then read and written at
their places in the file, since the library itself writes only what is in memory at once.
"""

import collections
import contextlib
import errno
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, BinaryIO, ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np
from pydantic import AfterValidator, BaseModel, Field
from safetensors import SafetensorError, safe_open

from matu_jax.json_files import check_readable, checked, name_inside, parse_json, read_json

FLOATING: dict[str, np.dtype[Any]] = {  # what has task vectors, by its name in the file
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}
READABLE: dict[str, np.dtype[Any]] = FLOATING | {"U8": np.dtype(np.uint8)}
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_PIECE_BYTES = 1 << 22
_MOST_OPEN = 16  # files at once, of all models: systems allow 256 or 1024, and some 64


class TensorFileError(ValueError):
    """Files of tensors that cannot be read, written or used, and what to do about it."""


class Tensor(NamedTuple):
    """What a header says of a tensor.

    Attributes:
      dtype: as safetensors writes it, such as "F32" or "BF16".
      shape: of the tensor.
      nbytes: its bytes in the file, row-major.
    """

    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @property
    def size(self) -> int:
        """The number of its entries."""
        return math.prod(self.shape)

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


def floating_tensor(dtype: str, shape: tuple[int, ...]) -> Tensor:
    """A `Tensor` of a dtype in `READABLE`, with its bytes counted."""
    return Tensor(dtype, shape, math.prod(shape) * READABLE[dtype].itemsize)


class TensorFiles:
    """A safetensors file, or a folder with model.safetensors or its shards, open for reading.

    Use it in a `with` statement. Only headers are held in memory.

    Attributes:
      path: the file or folder.
      tensors: what is in it, by name, in the order of the file or files.
      metadata: the strings that the headers hold besides tensors.

    Raises:
      TensorFileError: if there is no such file or folder, or a file is damaged, naming it.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path: Path = Path(path)
        self.tensors: dict[str, Tensor] = {}
        self.metadata: dict[str, str] = {}
        self._places: dict[str, tuple[_File, int]] = {}
        self._files: list[_File] = []
        try:
            for file, expected in _shards(self.path).items():
                self._open(file, expected)
        except OSError as error:
            self.close()
            raise TensorFileError(f"{error.filename or path}: {system_reason(error)}") from None
        except TensorFileError:
            self.close()
            raise

    def _open(self, path: Path, expected: set[str] | None) -> None:
        file = _File(path)
        self._files.append(file)
        check_readable(path)
        try:
            with safe_open(path, "np") as whole:  # checks offsets, shapes and the length
                names = set(whole.keys())
        except SafetensorError as error:
            raise TensorFileError(
                f"{path}: not a safetensors file, or cut short ({error}). Download or save it "
                "again."
            ) from None
        if expected is not None and names != expected:
            raise TensorFileError(
                f"{path}: differs from {INDEX}: {some_of(expected - names)} missing, "
                f"{some_of(names - expected)} not in the index. Shards of two checkpoints may be "
                "mixed; download or save the folder again."
            )
        stream = file.stream()
        length = int.from_bytes(stream.read(8), "little")
        header = parse_json(stream.read(length))
        self.metadata |= header.pop("__metadata__", None) or {}
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            start, stop = entry["data_offsets"]
            self.tensors[name] = Tensor(entry["dtype"], tuple(entry["shape"]), stop - start)
            self._places[name] = (file, 8 + length + start)

    def __enter__(self) -> "TensorFiles":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the files."""
        for file in self._files:
            file.close()

    def read_bytes(self, name: str, start: int, count: int) -> bytes:
        """Reads `count` bytes of a tensor from byte `start` on.

        Raises:
          TensorFileError: if the file ends before, for it has changed since it was opened.
        """
        file, offset = self._places[name]
        try:
            stream = file.stream()
            stream.seek(offset + start)
            data = stream.read(count)
        except OSError as error:
            raise TensorFileError(f"{file.path}: tensor {name}: {system_reason(error)}") from None
        if len(data) != count:
            raise TensorFileError(
                f"{file.path}: tensor {name}: the file ended while it was read. Let nothing write "
                "to it, and start again."
            )
        return data

    def read(self, name: str, start: int, size: int) -> np.ndarray:
        """Reads entries of a tensor in row-major order.

        Args:
          name: a tensor whose dtype is in `READABLE`.
          start: the first entry.
          size: how many.

        Returns:
          `[size]` in the storage dtype.
        """
        dtype = READABLE[self.tensors[name].dtype]
        data = self.read_bytes(name, start * dtype.itemsize, size * dtype.itemsize)
        return np.frombuffer(data, dtype)

    def pieces(self, name: str) -> Iterator[tuple[int, bytes]]:
        """Yields `(first byte, bytes)` of a tensor, a few MiB at a time."""
        total = self.tensors[name].nbytes
        for start in range(0, total, _PIECE_BYTES):
            yield start, self.read_bytes(name, start, min(_PIECE_BYTES, total - start))


class _File:
    """A file that is open while it is among the `_MOST_OPEN` that were read last."""

    _open: ClassVar[collections.OrderedDict["_File", BinaryIO]] = collections.OrderedDict()

    def __init__(self, path: Path):
        self.path = path
        self._found: tuple[int, ...] | None = None

    def stream(self) -> BinaryIO:
        """The open file, wherever it was left.

        Raises:
          OSError: if it cannot be opened.
          TensorFileError: if it is another file than the one that was opened first.
        """
        if self not in self._open:
            while len(self._open) >= _MOST_OPEN:
                self._open.popitem(last=False)[1].close()
            self._open[self] = stream = self.path.open("rb")
            state = os.fstat(stream.fileno())
            found = (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns)
            if self._found not in (None, found):
                raise TensorFileError(
                    f"{self.path}: the file has changed since it was opened. Let nothing write to "
                    "it, and start again."
                )
            self._found = found
        self._open.move_to_end(self)
        return self._open[self]

    def close(self) -> None:
        if self in self._open:
            self._open.pop(self).close()


def system_reason(error: OSError) -> str:
    """Why the system refuses, and for too many open files what to do."""
    reason = error.strerror or str(error)
    if error.errno not in (errno.EMFILE, errno.ENFILE):
        return f"{reason}."
    return f"{reason}. Allow more and start again: ulimit -n 1024"


def fingerprint(*parts: TensorFiles) -> str:
    """SHA-256 of all names, dtypes, shapes and bytes, whatever the shards, as hexadecimal.

    Args:
      *parts: the files of one model; of tensors of one name the last one counts.
    """
    whose = {name: part for part in parts for name in part.tensors}
    digest = hashlib.sha256()
    for name in sorted(whose):
        tensor = whose[name].tensors[name]
        digest.update(json.dumps([name, tensor.dtype, tensor.shape]).encode())
        for _, data in whose[name].pieces(name):
            digest.update(data)
    return digest.hexdigest()


def _shards(path: Path) -> dict[Path, set[str] | None]:
    """The files of a model, each with the names that an index says it holds."""
    if not path.exists():
        raise TensorFileError(
            f"{path}: no such file or folder; expected a safetensors file, or a folder with {WHOLE}"
            f" or {INDEX}. (A model of the Hugging Face Hub has to be downloaded first.)"
        )
    if not path.is_dir():
        return {path: None}
    if (path / WHOLE).exists():
        return {path / WHOLE: None}
    if not (path / INDEX).exists():
        found = sorted(file.name for file in path.iterdir())
        hint = f"Give the file itself: {path}/NAME.safetensors."
        if any(name.startswith("adapter_model") for name in found):
            hint = "It holds an adapter: merge that into its model first (PEFT's merge_and_unload)."
        elif not any(name.endswith(".safetensors") for name in found):
            hint = "Save the model there with save_pretrained (safe_serialization=True)."
        raise TensorFileError(
            f"{path}: found neither {WHOLE} nor {INDEX}, but {some_of(found)}. {hint}"
        )
    by_file: dict[Path, set[str] | None] = {}
    places = shard_names(path / INDEX)
    for file in sorted(set(places.values())):
        by_file[path / file] = {name for name, place in places.items() if place == file}
    return by_file


class _Index(BaseModel):
    """The index of a model in shards."""

    weight_map: Annotated[
        dict[str, Annotated[str, AfterValidator(name_inside)]], Field(min_length=1)
    ]


def shard_names(index: Path) -> dict[str, str]:
    """The file of each tensor, from the index of a model in shards.

    Raises:
      TensorFileError: if it cannot be read, is damaged, or names files outside its folder.
    """
    advice = "Download or save the folder again."
    try:
        return checked(_Index, read_json(index), f"{index}: damaged").weight_map
    except OSError as error:
        raise TensorFileError(f"{index}: {system_reason(error)} {advice}") from None
    except ValueError as error:
        raise TensorFileError(f"{error}\n{advice}") from None


def some_of(names: Iterable[str]) -> str:
    """At most five names, sorted, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return (", ".join(names[:5]) or "nothing") + more


class Writer:
    """Writes a safetensors file piece by piece, in any order; it gets its name when complete.

    Until then the file is called `.NAME.partial`; an error or Ctrl-C inside the `with` statement
    removes it.

    Args:
      path: the file to be.
      tensors: what it will hold, by name.
      metadata: strings for the header.

    Raises:
      TensorFileError: if the file cannot be written.
      ValueError: for bytes outside a tensor, or, at the end, bytes that were never written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, str] | None = None,
    ):
        self.path: Path = Path(path)
        self._tensors, self._metadata = dict(tensors), dict(metadata or {})
        self._left = {name: tensor.nbytes for name, tensor in tensors.items()}
        self._temporary = self.path.with_name(f".{self.path.name}.partial")

    def __enter__(self) -> "Writer":
        header: dict[str, Any] = {"__metadata__": self._metadata} if self._metadata else {}
        self._starts, end = {}, 0

        def order(name):  # as the library does: wide entries first, so that all are aligned
            tensor = self._tensors[name]
            return tensor.size > 0, -(tensor.nbytes // max(tensor.size, 1)), name

        for name in sorted(self._tensors, key=order):
            dtype, shape, nbytes = self._tensors[name]
            self._starts[name] = end
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + nbytes]}
            end += nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._data, self._header = 8 + len(text), header
        try:
            self._file = self._temporary.open("wb")
        except OSError as error:
            raise self._failed(error) from None
        try:
            self._file.write(len(text).to_bytes(8, "little") + text)
            self._file.truncate(self._data + end)
        except OSError as error:
            self._discard()
            raise self._failed(error) from None
        return self

    def write(self, name: str, data: bytes | np.ndarray, start: int = 0) -> None:
        """Writes bytes, or the bytes of an array, into a tensor from byte `start` on."""
        if isinstance(data, np.ndarray):
            data = data.tobytes()
        if start < 0 or start + len(data) > self._tensors[name].nbytes:
            raise ValueError(
                f"{self.path}: tensor {name} {self._tensors[name]}: bytes {start} to "
                f"{start + len(data)} are outside its {self._tensors[name].nbytes} bytes."
            )
        self._left[name] -= len(data)
        try:
            self._file.seek(self._data + self._starts[name] + start)
            self._file.write(data)
        except OSError as error:
            raise self._failed(error) from None

    def replace_metadata(self, name: str, value: str) -> None:
        """Writes another value, of as many bytes, in the place of one that the header holds.

        Raises:
          ValueError: if its length differs.
        """
        before = json.dumps(self._header, separators=(",", ":"))
        self._header["__metadata__"] = self._metadata = self._metadata | {name: value}
        text = json.dumps(self._header, separators=(",", ":"))
        if len(text) != len(before):
            raise ValueError(f"{self.path}: metadata {name}: another length than before.")
        try:
            self._file.seek(8)
            self._file.write(text.encode())
        except OSError as error:
            raise self._failed(error) from None

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is not None:
                return
            wrong = [name for name, left in self._left.items() if left]
            if wrong:
                raise ValueError(
                    f"{self.path}: not every byte was written once of: {some_of(wrong)}"
                )
            try:
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
                os.replace(self._temporary, self.path)
            except OSError as error:
                raise self._failed(error) from None
        finally:
            self._discard()

    def _discard(self) -> None:
        with contextlib.suppress(OSError):  # a full disk refuses once more what is buffered
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _failed(self, error: OSError) -> TensorFileError:
        return TensorFileError(
            f"{self.path} cannot be written: {system_reason(error)} Make room, or write elsewhere."
        )
