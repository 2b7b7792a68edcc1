"""Functions that the task files of the core suite name: reading items, and scoring a short answer."""

import json
import re
import string
from pathlib import Path
from typing import Any

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def load_items(file: str, **metadata: Any) -> dict[str, Any]:
    """The items of one JSONL file beside this one, as a split named `test`."""
    from datasets import Dataset

    lines = (Path(__file__).parent / file).read_text(encoding="utf-8").splitlines()
    return {"test": Dataset.from_list([json.loads(line) for line in lines])}


def normalise(text: str) -> str:
    """Lower case, without punctuation, articles and surplus blanks."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def first_line(text: str) -> str:
    """What stands before the first line end, without blanks around it."""
    return text.strip().split("\n")[0].strip()


def score_answer(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether the answer's first line is one of the expected ones after normalisation."""
    found = normalise(first_line(results[0]))
    return {"exact_match": float(found in {normalise(answer) for answer in doc["answers"]})}


def score_number(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether the last number of the answer's first line is the expected one."""
    numbers = re.findall(r"-?\d+", first_line(results[0]).replace(",", ""))
    return {"exact_match": float(bool(numbers) and int(numbers[-1]) == int(doc["answer"]))}


def score_copy(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether the answer's first line is the expected text, blanks aside."""
    return {"exact_match": float(" ".join(first_line(results[0]).split()) == " ".join(doc["answer"].split()))}
