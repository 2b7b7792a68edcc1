"""Retrieval: the folder it reads, the embeddings of every family, and scores against an oracle and the library's."""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from tokenizers import processors

from conftest import shared_network, tiny_model, tiny_network, tiny_tokenizer, words
from prunelens.errors import PrunelensError
from prunelens.models.model import Model
from prunelens.models.opening.loading import wrap
from prunelens.models.surgery.drop import Drop
from prunelens.models.surgery.variant import Variant
from prunelens.tasks.corpora import Corpus, read_corpus
from prunelens.tasks.retrieval import (
    POOLINGS,
    Retrieved,
    embed,
    nearest,
    neighbour_correlation,
    overlap_at,
    retrieve,
    score,
    sentence_encoder,
)

TEXTS = [words(5, 9, 33), words(4, 90, 17, 60, 61, 8, 7, 6, 50), words(20), words(88, 12, 40, 41), words(30, 31)]
PASSAGES = [
    {"_id": "a", "title": "one", "text": "first"},
    {"_id": "b", "text": "second"},
    {"_id": "c", "text": "third"},
]
QUERIES = [{"_id": "q2", "text": "who"}, {"_id": "q1", "text": "what"}, {"_id": "q0", "text": "never"}]
QRELS = ["query-id\tcorpus-id\tscore", "q1\tb\t1", "q2\ta\t2", "q2\tc\t1", "q1\ta\t0", "q0\tc\t0"]


def written(folder: Path, passages: Any = PASSAGES, queries: Any = QUERIES, qrels: Any = QRELS) -> Path:
    """A data set in BEIR's format; lines are objects or written as they are."""
    (folder / "qrels").mkdir(parents=True)
    files = {"corpus.jsonl": passages, "queries.jsonl": queries, "qrels/test.tsv": qrels}
    for name, lines in files.items():
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        (folder / name).write_text("".join(text + "\n" for text in texts), encoding="utf-8")
    return folder


def tiny_corpus(num_passages: int = 30, num_queries: int = 6) -> Corpus:
    random = np.random.default_rng(0)
    texts = [words(*random.integers(3, 97, random.integers(1, 12))) for _ in range(num_passages + num_queries)]
    relevant = {
        f"q{row}": {f"p{index}": 1.0 for index in random.choice(num_passages, size=2 + row, replace=False)}
        for row in range(num_queries)
    }
    passages = {f"p{index}": texts[index] for index in range(num_passages)}
    return Corpus("tiny", passages, dict(zip(relevant, texts[num_passages:], strict=True)), relevant)


def retrieved(similarities: Any) -> Retrieved:
    values = np.array(similarities, np.float32)
    return Retrieved(np.zeros(len(values)), np.zeros(len(values)), values)


def alone(model: Model, text: str, pooling: str) -> np.ndarray:
    """The embedding of one text without padding, by the definition, in float64."""
    ids = torch.tensor([model.tokenizer(text)["input_ids"]])
    with torch.inference_mode():
        states = model.network.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0].double().numpy()
    vector = states.mean(axis=0) if pooling == "mean" else states[-1]
    return vector / np.sqrt((vector**2).sum())


# --- reading -----------------------------------------------------------------------------------------------


def test_a_folder_becomes_texts_and_grades(tmp_path: Path) -> None:
    found = read_corpus(written(tmp_path / "mine"))
    assert found == Corpus(
        "mine",
        {"a": "one first", "b": "second", "c": "third"},
        {"q2": "who", "q1": "what"},
        {"q2": {"a": 2.0, "c": 1.0}, "q1": {"b": 1.0}},
    )
    assert list(found.queries) == list(found.relevant) == ["q2", "q1"]


def test_header_blank_lines_and_empty_titles_change_nothing(tmp_path: Path) -> None:
    whole = read_corpus(written(tmp_path / "a" / "x"))
    passages = [
        PASSAGES[0],
        {"_id": "b", "title": "", "text": "second"},
        "",
        {"_id": "c", "title": None, "text": "third"},
    ]
    queries = [{**QUERIES[0], "title": "not read", "metadata": {}}, *QUERIES[1:]]
    assert read_corpus(written(tmp_path / "b" / "x", passages, queries, [*QRELS[1:3], " ", *QRELS[3:]])) == whole


def test_another_split_has_other_queries(tmp_path: Path) -> None:
    folder = written(tmp_path / "mine")
    (folder / "qrels" / "dev.tsv").write_bytes(b"\xef\xbb\xbfquery-id\tcorpus-id\tscore\r\nq0\tc\t1.5\r\n")
    assert read_corpus(folder, "dev").relevant == {"q0": {"c": 1.5}}


@pytest.mark.parametrize("name", ["corpus.jsonl", "queries.jsonl", "qrels/test.tsv"])
@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"])
def test_a_file_that_is_missing_or_no_text_is_named(tmp_path: Path, name: str, content: bytes | None) -> None:
    path = written(tmp_path / "mine") / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PrunelensError, match=rf"expected a UTF-8 file of a BEIR data set at .*{name}"):
        read_corpus(tmp_path / "mine")


BAD_TEXTS = [
    "{",
    "[]",
    "3",
    "null",
    '{"_id": "x"}',
    '{"text": "x"}',
    '{"_id": 3, "text": "x"}',
    '{"_id": "x", "text": 3}',
]
BAD_TEXTS += ['{"_id": "x", "text": "\\ud800"}', "[" * 100_000]


@pytest.mark.parametrize("line", [*BAD_TEXTS, '{"_id": "x", "title": 3, "text": "x"}'], ids=lambda line: line[:30])
def test_a_malformed_passage_is_named(tmp_path: Path, line: str) -> None:
    folder = written(tmp_path / "mine", passages=[*PASSAGES, "", line])
    with pytest.raises(PrunelensError, match=r'corpus\.jsonl:5: expected a JSON object with texts as "_id" and "text"'):
        read_corpus(folder)


@pytest.mark.parametrize("line", BAD_TEXTS, ids=lambda line: line[:30])
def test_a_malformed_query_is_named(tmp_path: Path, line: str) -> None:
    folder = written(tmp_path / "mine", queries=[line, *QUERIES])
    with pytest.raises(
        PrunelensError, match=r'queries\.jsonl:1: expected a JSON object with texts as "_id" and "text"'
    ):
        read_corpus(folder)


@pytest.mark.parametrize(
    "line",
    ["q1 b 1", "q1\tb", "q1\t0\tb\t1", "q1\tb\t", "q1\tb\tyes", "q1\tb\tnan", "q1\tb\tinf", "q1\tb\t1_0", "\tb\t1"],
)
@pytest.mark.parametrize("place", [0, 6])
def test_a_malformed_qrel_is_named(tmp_path: Path, line: str, place: int) -> None:
    qrels = [*QRELS[:place], line, *QRELS[place + 1 :]]
    folder = written(tmp_path / "mine", qrels=qrels)
    with pytest.raises(PrunelensError, match=rf"test\.tsv:{place + 1}: expected two ids and a number between tabs"):
        read_corpus(folder)


def test_an_id_given_twice_is_named(tmp_path: Path) -> None:
    with pytest.raises(PrunelensError, match=r"corpus\.jsonl:4: the id 'b' is given twice"):
        read_corpus(written(tmp_path / "a", passages=[*PASSAGES, PASSAGES[1]]))
    with pytest.raises(PrunelensError, match=r"queries\.jsonl:4: the id 'q2' is given twice"):
        read_corpus(written(tmp_path / "b", queries=[*QUERIES, QUERIES[0]]))
    with pytest.raises(PrunelensError, match=r"test\.tsv:7: the pair 'q1', 'a' is given twice"):
        read_corpus(written(tmp_path / "c", qrels=[*QRELS, "q1\ta\t1"]))


@pytest.mark.parametrize("qrels", [[], QRELS[:1], ["q1\tb\t0", "q2\ta\t-1"]])
def test_a_data_set_without_queries_is_refused(tmp_path: Path, qrels: list[str]) -> None:
    with pytest.raises(PrunelensError, match=r"expected a query with a relevant passage in .*test\.tsv, found none"):
        read_corpus(written(tmp_path / "mine", qrels=qrels))


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_passages_are_refused(tmp_path: Path, count: int) -> None:
    with pytest.raises(PrunelensError, match=rf"expected at least 2 passages in .*corpus\.jsonl, found {count}"):
        read_corpus(written(tmp_path / "mine", passages=PASSAGES[:count]))


# --- embeddings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", POOLINGS)
def test_padded_equals_unpadded_in_every_family(any_family: str, pooling: str) -> None:
    model = wrap(shared_network(any_family), tiny_tokenizer(), any_family)
    found = embed(model, TEXTS, pooling, batch_size=len(TEXTS))
    assert found.dtype == np.float32
    assert found.shape == (len(TEXTS), model.anatomy.hidden_size)
    expected = np.stack([alone(model, text, pooling) for text in TEXTS])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found.astype(np.float64), axis=1), 1, rtol=0, atol=1e-6)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "lfm2", "mamba", "bloom"])
def test_double_precision_is_kept_until_the_end(family: str, pooling: str) -> None:
    model = tiny_model(family, torch.float64)
    expected = np.stack([alone(model, text, pooling) for text in TEXTS])
    for batch_size in (1, 2, len(TEXTS)):
        np.testing.assert_allclose(embed(model, TEXTS, pooling, batch_size), expected, rtol=0, atol=1e-7)


def test_half_precision_is_pooled_in_single_precision() -> None:
    model = tiny_model("llama", torch.bfloat16)
    for pooling in POOLINGS:
        expected = np.stack([alone(model, text, pooling) for text in TEXTS])
        np.testing.assert_allclose(embed(model, TEXTS, pooling, batch_size=1), expected, rtol=0, atol=1e-6)


def test_the_poolings_differ_unless_there_is_one_token() -> None:
    model = tiny_model()
    mean, last = (embed(model, TEXTS, pooling) for pooling in POOLINGS)
    difference = np.abs(mean - last).max(axis=1)
    assert difference[2] < 1e-6
    assert (np.delete(difference, 2) > 1e-2).all()


@pytest.mark.parametrize("family", ["llama", "gpt2", "lfm2"])
@pytest.mark.parametrize("drop", [Drop(attention=frozenset([1])), Drop(mlp=frozenset([2])), Drop(block=frozenset([3]))])
def test_what_is_dropped_is_missing_only_inside(family: str, drop: Drop) -> None:
    model = tiny_model(family)
    before = embed(model, TEXTS)
    with Variant(model, drop).running() as running:
        inside = embed(running, TEXTS)
        expected = np.stack([alone(running, text, "mean") for text in TEXTS])
    np.testing.assert_allclose(inside, expected, rtol=0, atol=1e-5)
    assert (np.abs(inside - before).max(axis=1) > 1e-3).all()
    np.testing.assert_array_equal(embed(model, TEXTS), before)


def test_the_network_is_neither_moved_nor_owned() -> None:
    model = tiny_model("llama", torch.bfloat16)
    weights = {name: weight.data_ptr() for name, weight in model.network.named_parameters()}
    encoder = sentence_encoder(model)
    assert not list(encoder.parameters())
    assert encoder.get_embedding_dimension() == model.anatomy.hidden_size
    encoder.to(torch.float64)
    embed(model, TEXTS)
    assert {name: weight.data_ptr() for name, weight in model.network.named_parameters()} == weights
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_text_longer_than_the_context_is_cut(pooling: str) -> None:
    model = tiny_model()
    tokens = [3 + 7 * place % 90 for place in range(131)]
    found = embed(model, [words(*tokens), words(*tokens[:128]), words(*tokens[:127])], pooling)
    np.testing.assert_allclose(found[0], found[1], rtol=0, atol=1e-6)
    assert np.abs(found[1] - found[2]).max() > 1e-4
    assert len(model.tokenizer(words(*tokens))["input_ids"]) == 131


def test_without_a_limit_nothing_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    tokens = [3 + 7 * place % 90 for place in range(131)]
    expected = alone(model, words(*tokens), "mean")
    monkeypatch.setattr(Model, "context_length", property(lambda self: None))
    np.testing.assert_allclose(embed(model, [words(*tokens)])[0], expected, rtol=0, atol=1e-5)


def test_a_pad_token_is_not_needed() -> None:
    expected = embed(tiny_model(), TEXTS)
    model = tiny_model()
    model.tokenizer.pad_token = None
    assert model.tokenizer.pad_token_id is None
    np.testing.assert_array_equal(embed(model, TEXTS), expected)


def test_a_text_without_tokens_is_an_end_of_text_token() -> None:
    model = tiny_model()
    found = embed(model, ["", TEXTS[0], "<eos>"])
    np.testing.assert_allclose(found[0], found[2], rtol=0, atol=1e-6)
    np.testing.assert_allclose(found[0], alone(model, "<eos>", "mean"), rtol=0, atol=1e-5)


def test_progress_is_told_and_nothing_is_embedded_as_nothing() -> None:
    model = tiny_model()
    told: list[int] = []
    embed(model, TEXTS, batch_size=2, advance=told.append)
    assert told == [2, 2, 1]
    assert embed(model, []).shape == (0, 32)


def test_what_cannot_be_embedded_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PrunelensError, match="mute has no tokenizer; put its tokenizer files beside config"):
        embed(wrap(tiny_network("llama"), name="mute"), TEXTS)
    model = tiny_model()
    with pytest.raises(PrunelensError, match="expected a pooling of mean, lasttoken, found 'cls'"):
        embed(model, TEXTS, "cls")
    model.tokenizer.add_tokens(["more"])
    with pytest.raises(PrunelensError, match="tiny-llama knows 97 tokens, but a text has id 97"):
        embed(model, [*TEXTS, "w3 more"])
    model.layers[0].mlp.down_proj.weight.data.fill_(math.nan)
    with pytest.raises(PrunelensError, match="expected finite embeddings from tiny-llama, found NaN or infinity"):
        embed(model, TEXTS)
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(
        PrunelensError, match=r"retrieval needs sentence-transformers; pip install 'prunelens\[tasks\]'"
    ):
        embed(model, TEXTS)


# --- scores ------------------------------------------------------------------------------------------------


def oracle_order(row: list[float]) -> list[int]:
    return sorted(range(len(row)), key=lambda index: (-row[index], index))


def oracle_score(row: list[float], grades: dict[int, float], k: int) -> tuple[float, float]:
    near = oracle_order(row)[:k]
    gained = sum(grades.get(index, 0) / math.log2(rank + 1) for rank, index in enumerate(near, 1))
    best = sum(grade / math.log2(rank + 1) for rank, grade in enumerate(sorted(grades.values())[::-1][:k], 1))
    return gained / best, len(set(near) & set(grades)) / len(grades)


@pytest.mark.parametrize("k", [1, 3, 10, 25])
@pytest.mark.parametrize("num_passages", [2, 9, 10, 40])
@pytest.mark.parametrize("tied", [False, True])
def test_scores_and_overlap_equal_the_oracle(k: int, num_passages: int, tied: bool) -> None:
    random = np.random.default_rng(k)
    left, right = random.uniform(-1, 1, (2, 20, num_passages)).astype(np.float32)
    if tied:
        left, right = np.round(left, 1), np.round(right, 1)
    grades = [
        {int(index): float(random.integers(1, 4)) for index in random.permutation(num_passages)[: 1 + row]}
        for row in range(20)
    ]
    ndcg, recall = score(left, grades, k)
    expected = [oracle_score(row.tolist(), graded, k) for row, graded in zip(left, grades, strict=True)]
    np.testing.assert_allclose(np.stack([ndcg, recall], axis=1), expected, rtol=1e-13)
    shared = [
        len({*oracle_order(one.tolist())[:k]} & {*oracle_order(other.tolist())[:k]}) / min(k, num_passages)
        for one, other in zip(left, right, strict=True)
    ]
    np.testing.assert_allclose(overlap_at(retrieved(left), retrieved(right), k), shared, rtol=1e-13)


def test_scores_by_hand() -> None:
    similarities = np.array([[0.1, 0.9, 0.5, 0.5], [0.4, 0.3, 0.2, 0.1]], np.float32)
    assert nearest(similarities, 3).tolist() == [[1, 2, 3], [0, 1, 2]]
    ndcg, recall = score(similarities, [{2: 2.0, 0: 1.0}, {0: 3.0, 1: 1.0}], k=3)
    assert ndcg == pytest.approx([(2 / math.log2(3)) / (2 + 1 / math.log2(3)), 1])
    assert recall.tolist() == [0.5, 1]
    assert overlap_at(retrieved([[3, 2, 1, 0]]), retrieved([[0, 3, 2, 1]]), 2).tolist() == [0.5]
    assert overlap_at(retrieved([[3, 2, 1, 0]]), retrieved([[0, 1, 2, 3]]), 2).tolist() == [0]


def test_only_the_best_possible_order_scores_one() -> None:
    row = np.linspace(1, 0, 12, dtype=np.float32)[None]
    grades = {index: float(12 - index) for index in range(12)}
    ndcg, recall = score(row, [grades])
    assert (ndcg[0], recall[0]) == (1, 10 / 12)
    assert score(row[:, ::-1], [grades])[0][0] < 0.9


def test_correlation_is_of_ranks_and_of_each_query() -> None:
    dense = retrieved([[0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.3, 0.4]])
    other = retrieved([[0.1, 0.2, 0.3, 0.9], [4, 3, 2, 1], [2, 1, 4, 3], [1, 1, 1, 1]])
    found = neighbour_correlation(dense, other)
    assert found[:3] == pytest.approx([1, -1, 0.6], abs=1e-12)
    assert math.isnan(found[3])
    assert np.isnan(neighbour_correlation(retrieved([[1, 2]]), retrieved([[1, 2]]))).all()


# --- a query's own passage ---------------------------------------------------------------------------------


def own_corpus(num_passages: int, asked: Sequence[int]) -> Corpus:
    """Queries that are passages themselves, as in ArguAna, and one that is none."""
    random = np.random.default_rng(5)
    passages = {f"p{index}": words(*random.integers(3, 97, random.integers(2, 9))) for index in range(num_passages)}
    queries = {f"p{index}": passages[f"p{index}"] for index in asked} | {"q": words(5, 6, 7)}
    relevant = {
        query: {f"p{index}": float(random.integers(1, 4)) for index in random.permutation(num_passages)[:4]}
        for query in queries
    }
    return Corpus("own", passages, queries, relevant)


def oracle_own(corpus: Corpus, similarities: np.ndarray, k: int) -> list[tuple[float, float, list[str]]]:
    """nDCG, recall and the nearest passages, each query's own passage left out of what it finds."""
    found = []
    for query, row in zip(corpus.queries, similarities.astype(np.float64), strict=True):
        others = [(value, -place, name) for place, (name, value) in enumerate(zip(corpus.passages, row, strict=True))]
        near = [name for _, _, name in sorted((one for one in others if one[2] != query), reverse=True)[:k]]
        grades = corpus.relevant[query]
        gained = math.fsum(grades.get(name, 0) / math.log2(rank + 1) for rank, name in enumerate(near, 1))
        best = sorted(grades.values(), reverse=True)[:k]
        ideal = math.fsum(grade / math.log2(rank + 1) for rank, grade in enumerate(best, 1))
        found.append((gained / ideal, sum(name in grades for name in near) / len(grades), near))
    return found


@pytest.mark.parametrize("num_passages", [4, 10, 11, 30])
def test_a_query_does_not_find_its_own_passage(num_passages: int) -> None:
    corpus, model = own_corpus(num_passages, (3, 0, 2)), tiny_model()
    found, other = retrieve(model, corpus), retrieve(tiny_model(seed=1), corpus)
    cosines = [
        np.stack([alone(model, text, "mean") for text in texts.values()]) for texts in (corpus.queries, corpus.passages)
    ]
    whole = cosines[0] @ cosines[1].T
    assert whole[[0, 1, 2], [3, 0, 2]] == pytest.approx([1, 1, 1])  # it would be the nearest
    assert np.argwhere(np.isnan(found.similarities)).tolist() == [[0, 3], [1, 0], [2, 2]]
    known = ~np.isnan(found.similarities)
    np.testing.assert_allclose(found.similarities[known], whole[known], rtol=0, atol=1e-5)
    expected = oracle_own(corpus, found.similarities, 10)
    np.testing.assert_allclose(found.ndcg, [one[0] for one in expected], rtol=1e-13)
    np.testing.assert_allclose(found.recall, [one[1] for one in expected], rtol=1e-13)
    theirs = oracle_own(corpus, other.similarities, 10)
    shared = [len({*one[2]} & {*two[2]}) / len(one[2]) for one, two in zip(expected, theirs, strict=True)]
    np.testing.assert_allclose(overlap_at(found, other), shared, rtol=1e-13)
    ranks = [
        [scipy.stats.rankdata(row[keep]) for row, keep in zip(side.similarities, known, strict=True)]
        for side in (found, other)
    ]
    rho = [np.corrcoef(one, two)[0, 1] for one, two in zip(*ranks, strict=True)]
    np.testing.assert_allclose(neighbour_correlation(found, other), rho, atol=1e-12)


def test_what_cannot_be_found_stands_last_and_counts_nowhere() -> None:
    nan = math.nan
    assert nearest(np.array([[0.1, nan, 0.3], [nan, 0.2, 0.2]], np.float32), 3).tolist() == [[2, 0, -1], [1, 2, -1]]
    ndcg, recall = score(np.array([[0.1, nan, 0.3]], np.float32), [{1: 1.0, 2: 1.0}])
    assert ndcg == pytest.approx([1 / (1 + 1 / math.log2(3))])  # the grade of its own passage stays in the ideal
    assert recall.tolist() == [0.5]
    left, right = retrieved([[nan, 1, 2, 3]]), retrieved([[nan, 3, 2, 1]])
    assert overlap_at(left, right, 2).tolist() == [0.5]
    assert neighbour_correlation(left, right) == pytest.approx([-1])


# --- texts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", POOLINGS)
def test_what_a_tokenizer_puts_behind_a_text_is_not_embedded(pooling: str) -> None:
    plain, ended = tiny_model(), tiny_model()
    ended.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 2)]
    )
    long = words(*[3 + 7 * place % 90 for place in range(128)])
    assert ended.tokenizer(words(5))["input_ids"] == [5, 2]
    np.testing.assert_array_equal(embed(ended, [*TEXTS, long], pooling), embed(plain, [*TEXTS, long], pooling))
    assert plain.notes == []
    assert len(ended.notes) == 1
    assert "'<eos>' behind every text" in ended.notes[0]


def test_texts_that_are_cut_are_told_once() -> None:
    model = tiny_model()
    embed(model, [words(*[5] * 128)])
    assert model.notes == []
    embed(model, [words(*[5] * 129), words(*[5] * 200)], batch_size=1)
    assert model.notes == [
        "texts longer than the 128 tokens that tiny-llama can read were cut there for their embedding"
    ]


# --- whole -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "lfm2"])
def test_means_equal_those_of_the_library(family: str, pooling: str) -> None:
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

    model, corpus = tiny_model(family), tiny_corpus()
    found = retrieve(model, corpus, pooling, batch_size=4)
    relevant = {query: set(graded) for query, graded in corpus.relevant.items()}
    evaluator = InformationRetrievalEvaluator(corpus.queries, corpus.passages, relevant, name="it", write_csv=False)
    theirs = evaluator(sentence_encoder(model, pooling))
    assert found.ndcg.mean() == pytest.approx(theirs["it_cosine_ndcg@10"], abs=1e-12)
    assert found.recall.mean() == pytest.approx(theirs["it_cosine_recall@10"], abs=1e-12)
    assert 0 < found.ndcg.mean() < 1


def test_rows_follow_the_corpus_and_progress_counts_texts() -> None:
    model, corpus = tiny_model(), tiny_corpus()
    told: list[int] = []
    found = retrieve(model, corpus, "lasttoken", batch_size=7, advance=told.append)
    assert sum(told) == 36
    queries = np.stack([alone(model, text, "lasttoken") for text in corpus.queries.values()])
    passages = np.stack([alone(model, text, "lasttoken") for text in corpus.passages.values()])
    np.testing.assert_allclose(found.similarities, queries @ passages.T, rtol=0, atol=1e-5)
    names = list(corpus.passages)
    for row, query in enumerate(corpus.queries):
        grades = {names.index(name): grade for name, grade in corpus.relevant[query].items()}
        expected = oracle_score(found.similarities[row].tolist(), grades, 10)
        assert (found.ndcg[row], found.recall[row]) == pytest.approx(expected, rel=1e-13)


def test_grades_count(tmp_path: Path) -> None:
    passages = [{"_id": f"p{index}", "text": text} for index, text in enumerate(TEXTS)]
    queries = [{"_id": "q", "text": TEXTS[1]}]
    best, worst = (
        retrieve(tiny_model(), read_corpus(written(tmp_path / name, passages, queries, qrels)))
        for name, qrels in (("best", ["q\tp1\t5", "q\tp3\t1"]), ("worst", ["q\tp1\t1", "q\tp3\t5"]))
    )
    assert best.similarities[0, 1] == pytest.approx(1, abs=1e-6)
    assert best.ndcg[0] > worst.ndcg[0]
    assert best.recall.tolist() == worst.recall.tolist() == [1]


def test_identical_models_agree_and_others_do_not() -> None:
    dense, same, corpus = tiny_model(), tiny_model(), tiny_corpus()
    found, again = retrieve(dense, corpus), retrieve(same, corpus)
    np.testing.assert_array_equal(found.ndcg, again.ndcg)
    assert overlap_at(found, again).tolist() == [1] * 6
    np.testing.assert_allclose(neighbour_correlation(found, again), 1, rtol=0, atol=1e-12)
    with Variant(dense, Drop(block=frozenset([0, 1, 2, 3]))).running() as running:
        pruned = retrieve(running, corpus)
    assert overlap_at(found, pruned).mean() < 1
    assert (neighbour_correlation(found, pruned) < 0.999).all()
    assert overlap_at(found, pruned, k=30).tolist() == [1] * 6
