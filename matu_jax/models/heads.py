"""Zero-shot heads: a task's class names, put into prompts and through CLIP's text tower.

Radford et al. 2021, arXiv 2103.00020, section 3.1.4 (prompts are averaged in embedding space).
"""

import reprlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Float32, Int32

from matu_jax.data import ImageTask

BATCH_PROMPTS = 64
_TOKEN_STEP = 8


def zero_shot_heads(
    embed: Callable[[Int32[np.ndarray, "prompts tokens"]], Float32[Array, "prompts features"]],
    tokenizer: Any,
    tasks: Sequence[ImageTask],
    *,
    context: int,
    end_token: int,
) -> list[Float32[np.ndarray, "_ features"]]:
    """Text features of every class: those of its prompts, normalised, averaged, normalised.

    Args:
      embed: int32 `[prompts, tokens]` to float32 `[prompts, features]`; always called with
        the same shape.
      tokenizer: a CLIPTokenizer: called with a list of texts, it yields "input_ids".
      tasks: their class names and templates.
      context: the most tokens a prompt may have, start and end included.
      end_token: what each prompt must end with, since the tower takes the feature there; 2 = the
        highest token of the prompt.

    Returns:
      For each task, float32 `[classes, features]` of unit length.

    Raises:
      ValueError: for a task without templates, a template without "{}", or a prompt that is too
        long or does not end with the end token.
    """
    prompts = [text for task in tasks for text in _prompts(task)]
    ids = tokenizer(prompts)["input_ids"]
    for text, row in zip(prompts, ids, strict=True):
        if len(row) > context:
            raise ValueError(
                f"prompt {text!r} has {len(row)} tokens, but the text tower takes {context}. "
                "Shorten the class name or the template."
            )
        if row[-1] != (max(row) if end_token == 2 else end_token):
            wanted = "the highest of them" if end_token == 2 else f"{end_token}"
            raise ValueError(
                f"prompt {text!r} becomes the tokens {reprlib.repr(row)}, ending with {row[-1]}, "
                f"but the text tower takes its feature at {wanted} (eos_token_id in the "
                "checkpoint's config.json; 49407 where it names none). Take config.json "
                "and the tokenizer's files from the same checkpoint, or set config.model.head = "
                "'trained'."
            )
    # What follows the end token changes nothing: padding only as far as the longest prompt needs.
    length = min(context, -(-max(map(len, ids)) // _TOKEN_STEP) * _TOKEN_STEP)
    padded = np.full((-(-len(ids) // BATCH_PROMPTS) * BATCH_PROMPTS, length), ids[0][-1], np.int32)
    for i, row in enumerate(ids):
        padded[i, : len(row)] = row

    batches = padded.reshape(-1, BATCH_PROMPTS, length)
    vectors = np.concatenate([np.asarray(embed(batch)) for batch in batches])
    vectors = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
    heads, start = [], 0
    for task in tasks:
        shape = (task.num_classes, len(task.templates))
        rows = vectors[start : (start := start + shape[0] * shape[1])]
        mean = rows.reshape(*shape, -1).mean(axis=1)
        heads.append(mean / np.linalg.norm(mean, axis=-1, keepdims=True))
    return heads


def _prompts(task: ImageTask) -> list[str]:
    """Prompts of a task, class by class."""
    if not task.templates:
        raise ValueError(
            f"task {task.name!r} has no templates, such as 'a photo of a {{}}.', to make a frozen "
            f"head from. Give it some, or config.model.task_heads = (({task.name!r}, 'trained'),)."
        )
    for template in task.templates:
        if "{}" not in template:
            raise ValueError(
                f"task {task.name!r}: template {template!r} has no {{}} for the class name to go."
            )
    return [
        template.replace("{}", name) for name in task.class_names for template in task.templates
    ]
