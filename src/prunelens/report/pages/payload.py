"""The texts and their alternatives for the page's script: a list of the prompts, and pieces that are read on demand."""

import base64
import json
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from prunelens.report.wording import is_special, shorten, visible
from prunelens.study.compare.summary import free_agreement
from prunelens.study.rows import by_prompt, prompt_runs, rows_of
from prunelens.study.store import Run

KL_EDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Borders of the colour classes of a token's KL, nats."""
PIECE_TOKENS = 2048
"""Tokens of dense texts after which a piece ends."""
PROBABILITY_UNIT = 1000
"""A probability is a whole number of parts, as it is shown; what is above 0 and rounds to 0 is `TRACE` of a part."""
TRACE = 0.4
MANY_ROWS, FEWER_ALTERNATIVES = 100_000, 3
"""Rows of `alternatives` above which so many tokens of each step are put into the page; the table has all."""
LISTED = 160
"""Characters of a prompt that the list shows and that can be searched."""

_ESCAPED = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}


def script_json(value: Any) -> str:
    """JSON that can stand inside a script element."""
    text = value if isinstance(value, str) else _json(value)
    for character, escaped in _ESCAPED.items():
        text = text.replace(character, escaped)
    return text


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def packed(value: Any) -> str:
    """JSON, deflated (raw) and in base64, which can stand anywhere in a page."""
    packer = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    return base64.b64encode(packer.compress(_json(value).encode()) + packer.flush()).decode()


class Interned:
    """Values by number, each kept once."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self._numbers: dict[Any, int] = {}

    def add(self, key: Any, value: Any) -> int:
        """The number of `key`, new with `value` if it was not seen before."""
        if key not in self._numbers:
            self._numbers[key] = len(self.values)
            self.values.append(value)
        return self._numbers[key]


class _Rows:
    """Rows of a table, found by prompt; only what is asked for becomes Python values."""

    def __init__(self, table: pa.Table, *names: str) -> None:
        self._table = table.select(["prompt_id", *names])
        self._places = {key: (low, high) for key, low, high in prompt_runs(self._table)}

    def of(self, prompt_id: str) -> dict[str, list[Any]]:
        """The columns of one prompt; empty where it has no rows."""
        low, high = self._places.get(prompt_id, (0, 0))
        return self._table.slice(low, high - low).to_pydict()


class Texts:
    """Everything the text view shows, from the tables of one run."""

    def __init__(self, run: Run) -> None:
        tables = run.tables
        self.labels = [record["label"] for record in run.info["compressed"]]
        self.ids: list[str] = tables["prompts"]["prompt_id"].to_pylist()
        self._prompts = _Rows(tables["prompts"], "kind", "text")
        written, names = tables["continuations"], ("tokens", "ended")
        self._dense = _Rows(rows_of(written, model="dense", trace="greedy"), *names)
        self._own = [_Rows(rows_of(written, model=label, trace="greedy"), *names) for label in self.labels]
        self._agreed = [free_agreement(tables, label) for label in self.labels]
        kinds = ("kl_dense_compressed", "tv", "rank_of_dense_top1", "same_top1")
        steps = tables["steps"]
        greedy = [rows_of(steps, ("prompt_id", *kinds), compressed=label, trace="greedy") for label in self.labels]
        self._steps = [{key: values for key, *values in by_prompt(rows, *kinds)} for rows in greedy]
        sides = [f"{side}_{what}" for side in ("dense", "compressed") for what in ("tokens", "probs")]
        self._alternatives = [_Rows(rows_of(tables["alternatives"], compressed=label), *sides) for label in self.labels]
        self._horizon = run.info["settings"]["max_new_tokens"]
        self.alternatives = FEWER_ALTERNATIVES if tables["alternatives"].num_rows > MANY_ROWS else None
        self._starts = self._cut()

    def _cut(self) -> list[int]:
        """The first prompt of each piece."""
        starts, tokens = [], PIECE_TOKENS
        for place, key in enumerate(self.ids):
            if tokens >= PIECE_TOKENS:
                starts.append(place)
                tokens = 0
            tokens += len(self._steps[0][key][0]) if key in self._steps[0] else 0
        return starts

    def index(self) -> dict[str, Any]:
        """The list of prompts with what they are searched and sorted by, and where each piece begins."""
        rows = [self._prompts.of(key) for key in self.ids]
        return {
            "models": [shorten(label, 80) for label in self.labels],
            "prompts": {
                "id": [shorten(key, 80) for key in self.ids],
                "kind": [shorten(row["kind"][0] or "", 40) for row in rows],
                "start": [shorten((row["text"][0] or "").replace("\n", " "), LISTED) for row in rows],
            },
            "worst": [[_rounded(_largest(steps[key][0])) for key in self.ids] for steps in self._steps],
            "agreed": [[agreed[key] for key in self.ids] for agreed in self._agreed],
            "edges": KL_EDGES,
            "horizon": self._horizon,
            "unit": PROBABILITY_UNIT,
            "fewer": self.alternatives,
            "starts": self._starts,
        }

    def pieces(self) -> Iterator[str]:
        """The texts of consecutive prompts, packed, one piece after the other."""
        for low, high in zip(self._starts, [*self._starts[1:], len(self.ids)], strict=True):
            yield packed(_Piece(self, self.ids[low:high]).payload())


class _Piece:
    """Collects the texts of a few prompts: columns, and every string once."""

    def __init__(self, texts: Texts, ids: list[str]) -> None:
        self.texts, self.ids = texts, ids
        self.tokens, self.blocks = Interned(), Interned()

    def payload(self) -> dict[str, Any]:
        texts = self.texts
        found: dict[str, Any] = {
            "text": [visible(texts._prompts.of(key)["text"][0] or "").replace("↵\n", "\n") for key in self.ids],
            "dense": self._written(texts._dense),
            "free": [self._written(own) for own in texts._own],
            "steps": [self._steps(steps) for steps in texts._steps],
            "alternatives": [self._alternatives(rows) for rows in texts._alternatives],
        }
        found["blocks"] = self.blocks.values
        found["tokens"] = [visible(token) for token in self.tokens.values]
        found["special"] = [number for number, token in enumerate(self.tokens.values) if is_special(token)]
        return found

    def _token(self, token: str) -> int:
        return self.tokens.add(token, token)

    def _written(self, texts: _Rows) -> dict[str, Any]:
        rows = [texts.of(key) for key in self.ids]
        return {
            "tokens": [[self._token(token) for token in row["tokens"][0]] for row in rows],
            "ended": [int(row["ended"][0]) for row in rows],
        }

    def _steps(self, found: dict[str, list[np.ndarray]]) -> dict[str, list[list[Any]]]:
        kinds = (_rounded, _rounded, _whole, _whole)
        return {
            name: [[kind(value) for value in found[key][place].tolist()] for key in self.ids]
            for place, (name, kind) in enumerate(zip(("kl", "tv", "rank", "same"), kinds, strict=True))
        }

    def _alternatives(self, rows: _Rows) -> dict[str, list[int]]:
        """The number of a block per prompt; the dense blocks are the same for every compressed model."""
        found = [rows.of(key) for key in self.ids]
        return {side: [self._block(row, side) for row in found] for side in ("dense", "compressed")}

    def _block(self, row: dict[str, list[Any]], side: str) -> int:
        most = self.texts.alternatives
        tokens = [[self._token(token) for token in step[:most]] for step in row[f"{side}_tokens"]]
        probs = [[_parts(value) for value in step[:most]] for step in row[f"{side}_probs"]]
        return self.blocks.add(str((tokens, probs)), [tokens, probs])


def _largest(values: np.ndarray) -> float:
    return float(np.max(np.nan_to_num(values), initial=0.0))


def _rounded(value: float) -> float | None:
    return None if value != value else float(f"{value:.3g}")


def _whole(value: float) -> int | None:
    return None if value != value else int(value)


def _parts(value: float) -> int | float | None:
    if value != value:
        return None
    return round(value * PROBABILITY_UNIT) or (TRACE if value > 0 else 0)
