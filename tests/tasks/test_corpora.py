"""Data sets in BEIR's format as they are found: what is left out, and that it is told."""

import json
from pathlib import Path

import pytest

from prunelens.errors import PrunelensError
from prunelens.tasks.corpora import read_corpus

PASSAGES = [{"_id": name, "text": f"text of {name}"} for name in "abc"]
QUERIES = [{"_id": name, "text": f"query {name}"} for name in ("q1", "q2", "a")]
QRELS = ["q1\tb\t1", "q2\ta\t2", "q2\tc\t1"]
WHOLE = {"q1": {"b": 1.0}, "q2": {"a": 2.0, "c": 1.0}}


def folder(path: Path, qrels: list[str], passages: list[dict] = PASSAGES, end: str = "\n", start: bytes = b"") -> Path:
    (path / "qrels").mkdir(parents=True)
    rows = {
        "corpus.jsonl": [json.dumps(row) for row in passages],
        "queries.jsonl": [json.dumps(row) for row in QUERIES],
        "qrels/test.tsv": qrels,
    }
    for name, lines in rows.items():
        (path / name).write_bytes(start + "".join(line + end for line in lines).encode())
    return path


@pytest.mark.parametrize(
    ("line", "note"),
    [
        ("q9\ta\t1", "1 qrels name queries that are not in queries.jsonl (the first is 'q9') and were left out"),
        ("q1\tz\t1", "1 qrels name passages that are not in corpus.jsonl (the first is 'z') and were left out"),
        ("q1\tz\t0", "1 qrels name passages that are not in corpus.jsonl (the first is 'z') and were left out"),
        ("a\tb\t0", "1 judged queries have no relevant passage in corpus.jsonl and were left out"),
        ("a\tb\t-1", "1 judged queries have no relevant passage in corpus.jsonl and were left out"),
    ],
)
@pytest.mark.parametrize("place", [0, 3])
def test_a_qrel_that_cannot_count_is_left_out_and_told(tmp_path: Path, line: str, note: str, place: int) -> None:
    found = read_corpus(folder(tmp_path / "mine", [*QRELS[:place], line, *QRELS[place:]]))
    assert found.relevant == WHOLE
    assert found.notes == (f"mine: {note}",)


def test_several_are_counted_and_a_query_that_loses_its_last_passage_is_left_out(tmp_path: Path) -> None:
    found = read_corpus(folder(tmp_path / "mine", [*QRELS, "q1\ty\t1", "q1\tz\t1", "a\tz\t1", "q8\tx\t1", "q9\ta\t1"]))
    assert found.relevant == WHOLE
    assert list(found.queries) == ["q1", "q2"]
    assert found.notes == (
        "mine: 2 qrels name queries that are not in queries.jsonl (the first is 'q8') and were left out",
        "mine: 4 qrels name passages that are not in corpus.jsonl (the first is 'y') and were left out",
        "mine: 1 judged queries have no relevant passage in corpus.jsonl and were left out",
    )


def test_where_nothing_is_left_the_reason_is_told(tmp_path: Path) -> None:
    said = r"expected a query with a relevant passage in .*test\.tsv, found none; .*; mine: 2 qrels name passages .*'y'"
    with pytest.raises(PrunelensError, match=said):
        read_corpus(folder(tmp_path / "mine", ["q1\ty\t1", "q2\tz\t1"]))


def test_a_usual_data_set_has_no_remarks(tmp_path: Path) -> None:
    found = read_corpus(folder(tmp_path / "mine", QRELS))  # the query `a` is of another split
    assert found.relevant == WHOLE
    assert found.notes == ()


@pytest.mark.parametrize("header", [[], ["query-id\tcorpus-id\tscore"]])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
def test_header_line_ends_and_byte_order_marks_change_nothing(
    tmp_path: Path, header: list[str], end: str, start: bytes
) -> None:
    found = read_corpus(folder(tmp_path / "mine", [*header, *QRELS], end=end, start=start))
    assert (found.relevant, found.notes) == (WHOLE, ())
    assert found.passages == {name: f"text of {name}" for name in "abc"}


@pytest.mark.parametrize("line", ["q1\t0\tb\t1", "q1\tb\t1\tmore", "q1\tb\t1\t"])
def test_columns_beyond_the_three_are_refused_by_their_line(tmp_path: Path, line: str) -> None:
    path = folder(tmp_path / "mine", [*QRELS[1:], line])
    if line.endswith("\t"):  # a blank at the end
        assert read_corpus(path).relevant == WHOLE
        return
    with pytest.raises(PrunelensError, match=r"test\.tsv:3: expected two ids and a number between tabs"):
        read_corpus(path)


def test_a_query_whose_own_passage_is_relevant_is_told(tmp_path: Path) -> None:
    found = read_corpus(folder(tmp_path / "mine", [*QRELS, "a\ta\t1", "a\tb\t1"]))
    assert found.relevant == WHOLE | {"a": {"a": 1.0, "b": 1.0}}
    assert found.notes == (
        "mine: for 1 queries a passage with the query's own id is relevant, which is never counted as found",
    )
    assert [found.num_candidates(query) for query in ("q1", "q2", "a")] == [3, 3, 2]


def test_titles_and_empty_texts(tmp_path: Path) -> None:
    passages = [
        {"_id": "a", "title": "Title", "text": "text"},
        {"_id": "b", "title": "Title", "text": ""},
        {"_id": "c", "title": "", "text": ""},
        {"_id": "d", "title": None, "text": " text "},
    ]
    found = read_corpus(folder(tmp_path / "mine", QRELS, passages))
    assert found.passages == {"a": "Title text", "b": "Title", "c": "", "d": " text "}
    assert found.notes == ("mine: 1 passages have no text and are read as one end-of-text token",)
