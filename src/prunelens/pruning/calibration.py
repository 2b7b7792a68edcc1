"""Calibration text given by the user: plain text, JSONL with a `text` field, or a .npy of token ids."""

import json
from pathlib import Path

import numpy as np

from prunelens.errors import PrunelensError, has_half_pair
from prunelens.models.loading import Model
from prunelens.models.texts import read_text

MAX_LENGTH = 2048


def read_calibration(path: Path, model: Model) -> list[list[int]]:
    """Token ids of the calibration texts, cut into pieces of at most 2048 tokens (or the model's context).

    A text file is one text; a JSONL file holds one text a line (`text`, or `prompt`); a .npy file holds
    integers of shape (samples, length).

    Raises:
        PrunelensError: nothing readable, no tokens, or token ids outside the vocabulary.
    """
    if path.suffix == ".npy":
        return _read_tokens(path, model)
    if model.tokenizer is None:
        raise PrunelensError(f"{model.name} has no tokenizer, so text cannot be used; give a .npy of token ids")
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise PrunelensError(f"expected calibration text at {path}: {error}") from error
    texts = _jsonl_texts(content, path) if path.suffix in (".jsonl", ".json") else [content]
    length = min(MAX_LENGTH, model.context_length or MAX_LENGTH)
    pieces = []
    for text in texts:
        ids = read_text(model, text) if text.strip() else []
        pieces += [ids[start : start + length] for start in range(0, len(ids), length)]
    num_known = model.network.get_input_embeddings().weight.shape[0]
    if any(token >= num_known for piece in pieces for token in piece):
        raise PrunelensError(
            f"{path} has tokens that {model.name} does not know (it knows {num_known}); its tokenizer "
            "belongs to another model"
        )
    if not pieces:
        raise PrunelensError(f"expected calibration text with at least one token in {path}, found none")
    return pieces


def _jsonl_texts(content: str, path: Path) -> list[str]:
    texts = []
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            text = record.get("text", record.get("prompt"))
        except (ValueError, AttributeError, RecursionError) as error:
            raise PrunelensError(f"{path}:{number}: expected a JSON object with a text") from error
        if not isinstance(text, str) or has_half_pair(text):
            raise PrunelensError(f'{path}:{number}: expected "text" (or "prompt") to be a text')
        texts.append(text)
    return texts


def _read_tokens(path: Path, model: Model) -> list[list[int]]:
    try:
        tokens = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise PrunelensError(f"expected a .npy of token ids at {path}: {error}") from error
    if not isinstance(tokens, np.ndarray):
        raise PrunelensError(f"expected one array of token ids in {path}, found an archive; save it with numpy.save")
    if tokens.ndim != 2 or tokens.size == 0 or not np.issubdtype(tokens.dtype, np.integer):
        raise PrunelensError(
            f"expected integers of shape (samples, length) in {path}, found {tokens.dtype} of shape {tokens.shape}"
        )
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= model.anatomy.vocab_size:
        raise PrunelensError(
            f"{path} holds token ids from {low} to {high}, but {model.name} has {model.anatomy.vocab_size} tokens"
        )
    limit = model.context_length
    if limit is not None and tokens.shape[1] > limit:
        raise PrunelensError(f"{path} holds sequences of {tokens.shape[1]} tokens, the context is {limit}")
    return [[int(token) for token in row] for row in tokens]
