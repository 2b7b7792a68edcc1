"""The texts and their alternatives as compact JSON for the page's script: columns, and every string once."""

import json
from typing import Any

from prunelens.report.wording import is_special, shorten, visible
from prunelens.study.compare.summary import free_agreement, texts_of
from prunelens.study.rows import by_prompt, rows_of
from prunelens.study.store import Run

KL_EDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Borders of the colour classes of a token's KL, nats."""

_ESCAPED = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}


def script_json(value: Any) -> str:
    """JSON that can stand inside a script element."""
    text = (
        value
        if isinstance(value, str)
        else json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    )
    for character, escaped in _ESCAPED.items():
        text = text.replace(character, escaped)
    return text


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


class _Texts:
    """Collects the payload of one run."""

    def __init__(self, run: Run) -> None:
        self.tables = run.tables
        self.labels = [record["label"] for record in run.info["compressed"]]
        self.horizon = run.info["settings"]["max_new_tokens"]
        self.tokens = Interned()
        self.blocks = Interned()
        self.ids: list[str] = self.tables["prompts"]["prompt_id"].to_pylist()

    def payload(self) -> dict[str, Any]:
        dense = texts_of(self.tables, "dense")
        found = {
            "models": [shorten(label, 80) for label in self.labels],
            "prompts": self._prompts(),
            "dense": self._written(dense),
            "free": [self._free(label) for label in self.labels],
            "steps": [self._steps(label) for label in self.labels],
            "alternatives": [self._alternatives(label) for label in self.labels],
            "edges": KL_EDGES,
            "horizon": self.horizon,
        }
        found["blocks"] = self.blocks.values
        found["tokens"] = [visible(token) for token in self.tokens.values]
        found["special"] = [number for number, token in enumerate(self.tokens.values) if is_special(token)]
        return found

    def _prompts(self) -> dict[str, list[str]]:
        rows = {row["prompt_id"]: row for row in self.tables["prompts"].to_pylist()}
        return {
            "id": [shorten(key, 80) for key in self.ids],
            "kind": [shorten(rows[key]["kind"] or "", 40) for key in self.ids],
            "text": [visible(rows[key]["text"] or "").replace("↵\n", "\n") for key in self.ids],
        }

    def _token(self, token: str) -> int:
        return self.tokens.add(token, token)

    def _written(self, texts: dict[str, dict[str, Any]]) -> dict[str, Any]:
        rows = [texts[key] for key in self.ids]
        return {
            "tokens": [[self._token(token) for token in row["tokens"]] for row in rows],
            "ended": [int(row["ended"]) for row in rows],
        }

    def _free(self, label: str) -> dict[str, Any]:
        agreed = free_agreement(self.tables, label)
        own = texts_of(self.tables, label)
        return self._written(own) | {"agreed": [agreed[key] for key in self.ids]}

    def _steps(self, label: str) -> dict[str, list[list[Any]]]:
        rows = rows_of(self.tables["steps"], compressed=label, trace="greedy")
        names = ("kl_dense_compressed", "tv", "rank_of_dense_top1", "same_top1")
        found = {key: values for key, *values in by_prompt(rows, *names)}
        kinds = (_rounded, _rounded, _whole, _whole)
        return {
            name: [[kind(value) for value in found[key][index]] for key in self.ids]
            for index, (name, kind) in enumerate(zip(("kl", "tv", "rank", "same"), kinds, strict=True))
        }

    def _alternatives(self, label: str) -> dict[str, list[int]]:
        """The number of a block per prompt; the dense blocks are the same for every compressed model."""
        rows = rows_of(self.tables["alternatives"], compressed=label)
        by_id: dict[str, list[dict[str, Any]]] = {key: [] for key in self.ids}
        for row in rows.to_pylist():
            by_id.setdefault(row["prompt_id"], []).append(row)
        return {side: [self._block(by_id[key], side) for key in self.ids] for side in ("dense", "compressed")}

    def _block(self, rows: list[dict[str, Any]], side: str) -> int:
        tokens = [[self._token(token) for token in row[f"{side}_tokens"]] for row in rows]
        probs = [[_rounded(value) for value in row[f"{side}_probs"]] for row in rows]
        return self.blocks.add(str((tokens, probs)), [tokens, probs])


def texts_payload(run: Run) -> dict[str, Any]:
    """Everything the text view shows."""
    return _Texts(run).payload()


def _rounded(value: float) -> float | None:
    return None if value != value else float(f"{value:.4g}")


def _whole(value: float) -> int | None:
    return None if value != value else int(value)
