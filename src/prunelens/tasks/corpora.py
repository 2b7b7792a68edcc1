"""Retrieval data sets on disk, in BEIR's format."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from prunelens.documents import parse_json
from prunelens.errors import PrunelensError, shown
from prunelens.reading import MIB, read_lines

QREL = re.compile(r"([^\t]+)\t([^\t]+)\t([+-]?\d+(?:\.\d+)?)\s*")
MAX_CORPUS = 4096 * MIB
"""Bytes of a file of passages."""
WHAT = 'a JSON object with texts as "_id" and "text"'
Grades = dict[tuple[str, str], float]


@dataclass(frozen=True)
class Corpus:
    """A retrieval data set in memory: texts by id, and the relevant passages of each query with their grade.

    `notes` tell what of the files was left out.
    """

    name: str
    passages: dict[str, str]  # title and text, joined by one blank where there is a title
    queries: dict[str, str]
    relevant: dict[str, dict[str, float]]
    notes: tuple[str, ...] = field(default=(), compare=False)

    def num_candidates(self, query: str) -> int:
        """How many passages a query can find: all but one that has its own id."""
        return len(self.passages) - (query in self.passages)


def read_corpus(folder: Path, split: str = "test") -> Corpus:
    """Read a folder in BEIR's format: corpus.jsonl, queries.jsonl and qrels/<split>.tsv.

    Queries without a relevant passage (a grade above 0), and qrels that name an unknown query or passage, are left out.

    Raises:
        PrunelensError: a missing file, a malformed line, an id or a pair given twice, a score that is not a number,
            no query left, or fewer than 2 passages.
    """
    paths = folder / "corpus.jsonl", folder / "queries.jsonl", folder / "qrels" / f"{split}.tsv"
    passages, queries = _read_texts(paths[0], with_title=True), _read_texts(paths[1], with_title=False)
    if len(passages) < 2:
        raise PrunelensError(f"expected at least 2 passages in {paths[0]}, found {len(passages)}; add some")
    graded = _read_qrels(paths[2])
    relevant: dict[str, dict[str, float]] = {}
    for (query, passage), value in graded.items():
        if value > 0 and query in queries and passage in passages:
            relevant.setdefault(query, {})[passage] = value
    asked = {query: text for query, text in queries.items() if query in relevant}
    name = folder.resolve().name
    notes = [f"{name}: {note}" for note in _notes(graded, relevant, passages, queries)]
    if not asked:
        why = "".join(f"; {note}" for note in notes)
        raise PrunelensError(
            f"expected a query with a relevant passage in {paths[2]}, found none; add a grade above 0{why}"
        )
    return Corpus(name, passages, asked, {query: relevant[query] for query in asked}, tuple(notes))


def _notes(
    graded: Grades, relevant: dict[str, dict[str, float]], passages: dict[str, str], queries: dict[str, str]
) -> list[str]:
    """What was left out of the files, and what a score cannot reach."""
    notes = []
    for kind, file, named, known in (
        ("queries", "queries.jsonl", [query for query, _ in graded], queries),
        ("passages", "corpus.jsonl", [passage for _, passage in graded], passages),
    ):
        unknown = [name for name in named if name not in known]
        if unknown:
            first = f"the first is {unknown[0]!r}"
            notes.append(f"{len(unknown)} qrels name {kind} that are not in {file} ({first}) and were left out")
    judged = {query for query, _ in graded if query in queries} - set(relevant)
    if judged:
        notes.append(f"{len(judged)} judged queries have no relevant passage in corpus.jsonl and were left out")
    own = sum(query in found for query, found in relevant.items())
    if own:
        notes.append(
            f"for {own} queries a passage with the query's own id is relevant, which is never counted as found"
        )
    empty = sum(not text.strip() for text in passages.values())
    if empty:
        notes.append(f"{empty} passages have no text and are read as one end-of-text token")
    return notes


def _read_texts(path: Path, with_title: bool) -> dict[str, str]:
    found: dict[str, str] = {}
    for where, line in _lines(path):
        try:
            record = parse_json(line, where, WHAT)
            name, text, title = record["_id"], record["text"], record.get("title") or "" if with_title else ""
            valid = all(isinstance(value, str) for value in (name, text, title))
        except (KeyError, TypeError, AttributeError):
            valid = False
        if not valid:
            raise PrunelensError(f"{where}: expected {WHAT}, found {shown(line, 60)}")
        if name in found:
            raise PrunelensError(f"{where}: the id {name!r} is given twice; keep one of them")
        found[name] = f"{title} {text}".strip() if title else text
    return found


def _read_qrels(path: Path) -> Grades:
    graded: Grades = {}
    for number, (where, line) in enumerate(_lines(path)):
        if number == 0 and line.split() == ["query-id", "corpus-id", "score"]:
            continue
        match = QREL.fullmatch(line)
        if match is None:
            raise PrunelensError(f"{where}: expected two ids and a number between tabs, found {shown(line, 60)}")
        query, passage, grade = match.groups()
        if (query, passage) in graded:
            raise PrunelensError(f"{where}: the pair {query!r}, {passage!r} is given twice; keep one of them")
        graded[query, passage] = float(grade)
    return graded


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """(file:number, line) of the lines that are not blank."""
    return read_lines(path, "a UTF-8 file of a BEIR data set", MAX_CORPUS)
