"""Hugging Face checkpoints: finding the folder, its tensors, and its tokenizer.

Nothing here needs torch. huggingface_hub and transformers are imported where they are used, so that
experiments with local folders, or without prompts, do without them.
"""

import contextlib
import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from matu_jax import json_files
from matu_jax.models import tensors
from matu_jax.models.architectures import ARCHITECTURES, FAMILIES
from matu_jax.models.choices import ModelConfig
from matu_jax.models.tensor_names import full_names
from matu_jax.models.tensors import INDEX, WHOLE, shard_names, system_reason

WEIGHTS = WHOLE

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
)
IMAGE_FILES = ("preprocessor_config.json", "processor_config.json")
"""What says how images are prepared: alone, or (transformers 5) as part of a whole processor."""
WANTED_FILES = (
    "config.json",
    *IMAGE_FILES,
    *TOKENIZER_FILES,
    WEIGHTS,
    INDEX,
    "model-*.safetensors",
)
_CONVERTER, _CONVERSION = "SFconvertbot", "Adding `safetensors` variant of this model"
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(@\S+)?")


def folder_of(config: ModelConfig) -> Path | None:
    """The folder of a config's checkpoint; None for "random". See `checkpoint_folder`."""
    if config.checkpoint == "random":
        return None
    return checkpoint_folder(config.checkpoint, config.architecture)


def checkpoint_folder(checkpoint: str, architecture: str) -> Path:
    """The local folder of a checkpoint, downloaded if it has to be and can be.

    How long to wait for the hub, which hub, and through which proxy is huggingface_hub's to say,
    and its environment variables' (HF_HUB_ETAG_TIMEOUT, HF_HUB_DOWNLOAD_TIMEOUT, HF_ENDPOINT).

    Args:
      checkpoint: a local folder, or a hub name such as "openai/clip-vit-base-patch32", with
        "@revision" behind it for another revision than the main one. The cache is looked into
        first.
      architecture: the name of what it is wanted for, so that errors can suggest a checkpoint.

    Returns:
      A folder with config.json and model.safetensors, or its shards and their index.

    Raises:
      ValueError: if there is no such folder, it lacks files, or the hub cannot be reached or
        refuses.
    """
    where = f"config.model.checkpoint {checkpoint!r}"
    folder = Path(checkpoint).expanduser()
    if folder.is_dir():
        return _complete(folder, where)
    looks_local = checkpoint.startswith((".", "/", "~")) or folder.exists()
    if looks_local or checkpoint == "embedded" or not _HUB_NAME.fullmatch(checkpoint):
        known = ARCHITECTURES.get(architecture)
        example = known.hub_name if known else FAMILIES[architecture]
        raise ValueError(
            f"{where}: no such folder. With config.model.architecture = {architecture!r} give "
            f"a folder with a Hugging Face checkpoint{', ' if known else ' or '}a hub name such as "
            f"{example!r}{', or ' + repr('random') if known else ''}; 'embedded' belongs to "
            "config.model.architecture = 'embedded'."
        )

    import huggingface_hub

    repository, _, revision = checkpoint.partition("@")

    def snapshot(revision: str | None, **options: Any) -> Path:
        patterns: list[str] = [*WANTED_FILES]
        return Path(
            huggingface_hub.snapshot_download(
                repository, revision=revision, allow_patterns=patterns, **options
            )
        )

    for known in [revision or None] if revision else [None, *_cached_conversions(repository)]:
        try:
            cached = snapshot(known, local_files_only=True)
        except OSError:
            continue  # not in the cache: the ordinary case, which the download below answers
        if not _missing_files(cached):
            return cached
    try:
        # Asked for once, with a timeout: what follows waits for ever, or tries for half a minute.
        huggingface_hub.HfApi().model_info(
            repository,
            revision=revision or None,
            timeout=huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT,
        )
        fetched = snapshot(revision or None)
        if not revision and _missing_files(fetched) == [WEIGHTS]:
            converted = _conversion(huggingface_hub, repository)
            fetched = snapshot(converted) if converted else fetched
    except Exception as error:  # of the HTTP library underneath, too, which is not always the same
        obstacle = f"{type(error).__name__}: {error}"
    else:
        return _complete(fetched, where)
    raise ValueError(
        f"{where}: is not in the local cache, and cannot be downloaded from "
        f"{huggingface_hub.constants.ENDPOINT}: {obstacle}\n"
        "If the hub is only slow, set HF_HUB_ETAG_TIMEOUT, in seconds. Else download it where "
        "there is a network, and give the folder:\n"
        f"  hf download {checkpoint.replace('@', ' --revision ')} --local-dir FOLDER\n"
        f"  --config.model.checkpoint=FOLDER\n"
        f"Needed are config.json, {WEIGHTS} (or its shards), {IMAGE_FILES[0]} and the "
        f"tokenizer's files ({', '.join(TOKENIZER_FILES)}). HTTPS_PROXY and HF_ENDPOINT are obeyed."
    )


def _conversion(hub: Any, repository: str) -> str | None:
    """The revision with the hub's own safetensors conversion of an older checkpoint, if any.

    The hub's conversion service proposes it as a pull request, which some repositories, OpenAI's
    CLIP ViT-B/32 among them, have never merged. transformers looks for it by the same title.
    """
    proposals = hub.HfApi().get_repo_discussions(
        repository, author=_CONVERTER, discussion_type="pull_request"
    )
    for proposal in proposals:
        if proposal.title == _CONVERSION and proposal.author == _CONVERTER:
            revision = f"refs/pr/{proposal.num}"
            logging.getLogger(__name__).warning(
                "%s has no %s; its conversion %s@%s is taken.",
                repository,
                WEIGHTS,
                repository,
                revision,
            )
            return revision
    return None


def _cached_conversions(repository: str) -> list[str]:
    """Pull requests of which the cache holds a snapshot."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / ("models--" + repository.replace("/", "--"))
    return [f"refs/pr/{path.name}" for path in sorted((folder / "refs" / "refs" / "pr").glob("*"))]


def _missing_files(folder: Path) -> list[str]:
    missing = [] if (folder / "config.json").is_file() else ["config.json"]
    if not any((folder / name).is_file() for name in (WEIGHTS, INDEX)):
        missing.append(WEIGHTS)
    elif not (folder / WEIGHTS).is_file():
        shards = sorted(set(shard_names(folder / INDEX).values()))
        missing += [name for name in shards if not (folder / name).is_file()]
    return missing


def _complete(folder: Path, where: str) -> Path:
    missing = _missing_files(folder)
    if missing == [WEIGHTS]:
        raise ValueError(
            f"{where}: {folder} holds no {WEIGHTS}, perhaps only the older pytorch_model.bin. "
            'Convert it where torch is installed:\n  python -c "from transformers import '
            "AutoModel, AutoTokenizer; AutoModel.from_pretrained('NAME').save_pretrained('FOLDER');"
            " AutoTokenizer.from_pretrained('NAME').save_pretrained('FOLDER')\"\nand give the "
            "folder: --config.model.checkpoint=FOLDER. If the hub keeps a conversion under another "
            "revision, give NAME@REVISION, such as NAME@refs/pr/1."
        )
    if missing:
        raise ValueError(
            f"{where}: {folder} lacks {', '.join(missing)}. Expected the files of a Hugging Face "
            "checkpoint, as save_pretrained writes them."
        )
    return folder


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
      ValueError: if the file cannot be read or holds something else.
    """
    advice = "Fetch the checkpoint again."
    try:
        value = json_files.read_json(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise ValueError(f"{error}. {advice}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: found {type(value).__name__}, expected a JSON object. {advice}")
    return value


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file, open for reading; what goes wrong with it is a ValueError."""
    try:
        json_files.check_readable(path)
        with safe_open(path, framework="numpy") as file:
            yield file
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {system_reason(error)}") from None
    except SafetensorError as error:
        raise ValueError(
            f"{path} cannot be read as safetensors ({error}). It is damaged or cut off; fetch it "
            "again."
        ) from None


def tensor_files(folder: Path) -> dict[str, tuple[Path, str]]:
    """Where every tensor of a checkpoint is, sharded or not.

    Returns:
      The file, and the name there, of each tensor, by its name with the tower's prefix.

    Raises:
      ValueError: if a file is missing, cut off or not safetensors.
    """
    paths = [folder / WEIGHTS]
    if not paths[0].is_file():
        paths = [folder / name for name in sorted(set(shard_names(folder / INDEX).values()))]
    found: dict[str, Path] = {}
    for path in paths:
        with _opened(path) as file:
            found.update(dict.fromkeys(file.keys(), path))
    return {full: (found[name], name) for full, name in full_names(found).items()}


def fingerprint(folder: Path) -> str:
    """SHA-256 of all tensors of a checkpoint, as `matu_jax.models.tensors.fingerprint` has it.

    Raises:
      ValueError: if a file is missing, cut off or not safetensors.
    """
    # Shard by shard, since nothing but names that the index lacks may be more than it lists.
    shards = sorted({path for path, _ in tensor_files(folder).values()})
    with contextlib.ExitStack() as stack:
        return tensors.fingerprint(*[stack.enter_context(tensors.TensorFiles(s)) for s in shards])


def read_tensors(files: dict[str, tuple[Path, str]], names: Iterable[str]) -> dict[str, np.ndarray]:
    """Reads tensors as float32; names that are not there are left out.

    Args:
      files: from `tensor_files`.
      names: which ones.

    Raises:
      ValueError: for a tensor that is not float32, float16 or bfloat16.
    """
    by_file: dict[Path, list[str]] = {}
    for name in names:
        if name in files:
            by_file.setdefault(files[name][0], []).append(name)
    tensors = {}
    for path, members in by_file.items():
        with _opened(path) as file:
            for name in members:
                tensor = file.get_tensor(files[name][1])
                if str(tensor.dtype) not in ("float32", "float16", "bfloat16"):
                    raise ValueError(
                        f"{path}: tensor {name} is {tensor.dtype}, expected float32, float16 or "
                        "bfloat16. Quantised checkpoints are not supported."
                    )
                tensors[name] = tensor.astype(np.float32)
    return tensors


def _needed(record: logging.LogRecord) -> bool:
    """Whether to print what transformers says: its tokenizers need no PyTorch."""
    return "PyTorch was not found" not in record.getMessage()


def tokenizer(folder: Path, vocabulary: int) -> Any:
    """The checkpoint's CLIPTokenizer.

    Args:
      folder: of the checkpoint.
      vocabulary: number of tokens that the text tower knows.

    Raises:
      ValueError: if the files are not there. transformers then hands out a tokenizer with a handful
        of tokens and says nothing, which would make every prompt the same.
    """
    logger = logging.getLogger("transformers")
    logger.addFilter(_needed)
    try:
        from transformers import CLIPTokenizer
    finally:
        logger.removeFilter(_needed)

    wanted = "tokenizer.json, or vocab.json and merges.txt,"
    try:
        found = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder}: the tokenizer cannot be read ({error}). Put {wanted} of the checkpoint "
            "into the folder."
        ) from None
    if len(found) != vocabulary:
        raise ValueError(
            f"{folder}: the tokenizer has {len(found)} tokens, the text tower {vocabulary}. Put "
            f"{wanted} of the checkpoint into the folder."
        )
    return found
