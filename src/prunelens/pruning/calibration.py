"""Calibration text given by the user: plain text, JSONL with a `text` field, or a .npy of token ids."""

from pathlib import Path

import numpy as np

from prunelens.documents import parse_json
from prunelens.errors import PrunelensError, check_keys, cut, shown
from prunelens.models.model import Model
from prunelens.models.texts import text_ids
from prunelens.reading import read_array, read_lines, read_text

MAX_LENGTH = 2048
KEYS = ("text", "prompt", "id", "kind", "options", "answer")
"""Of a line: its text, or a line of a prompt file."""
WHAT = "calibration text"


def read_calibration(path: Path, model: Model) -> list[list[int]]:
    """Token ids of the calibration texts, cut into pieces of at most 2048 tokens (or the model's context).

    A text file is one text; a JSONL file holds one text a line (`text`, or `prompt`); a .npy file holds
    integers of shape (samples, length).

    Raises:
        PrunelensError: nothing readable, more than 64 MiB, an unknown key, no tokens, or token ids outside the
            vocabulary.
    """
    if path.suffix == ".npy":
        return _read_tokens(path, model)
    if model.tokenizer is None:
        raise PrunelensError(f"{model.name} has no tokenizer, so text cannot be used; give a .npy of token ids")
    texts = _jsonl_texts(path) if path.suffix in (".jsonl", ".json") else [_whole_text(path)]
    length = min(MAX_LENGTH, model.context_length or MAX_LENGTH)
    pieces = []
    for text in texts:
        ids = text_ids(model, text) if text.strip() else []
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


def _whole_text(path: Path) -> str:
    text = read_text(path, WHAT)
    if "\0" in text:
        raise PrunelensError(f"expected {WHAT} at {path}, found NUL characters; save it as UTF-8 text")
    return text


def _jsonl_texts(path: Path) -> list[str]:
    texts = []
    for where, line in read_lines(path, WHAT):
        record = parse_json(line, where, "a JSON object with a text")
        if not isinstance(record, dict):
            raise PrunelensError(f"{where}: expected a JSON object with a text, found {shown(record)}")
        check_keys(record, KEYS, where)
        given = [record[key] for key in ("text", "prompt") if key in record]
        if len(given) != 1 or not isinstance(given[0], str):
            raise PrunelensError(f'{where}: expected either "text" or "prompt", and a text under it')
        texts += given
    return texts


def _read_tokens(path: Path, model: Model) -> list[list[int]]:
    tokens = read_array(path, "a .npy of token ids")
    if tokens.ndim != 2 or tokens.size == 0 or not np.issubdtype(tokens.dtype, np.integer):
        raise PrunelensError(
            f"expected integers of shape (samples, length) in {path}, found {cut(str(tokens.dtype), 60)} of shape "
            f"{cut(str(tokens.shape), 60)}"
        )
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= model.anatomy.vocab_size:
        raise PrunelensError(
            f"{path} holds token ids from {low} to {high}, but {model.name} has {model.anatomy.vocab_size} tokens"
        )
    limit = model.context_length
    if limit is not None and tokens.shape[1] > limit:
        raise PrunelensError(f"{path} holds sequences of {tokens.shape[1]} tokens, the context is {limit}")
    return tokens.tolist()
