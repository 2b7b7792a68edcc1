"""Retrieval with a causal language model as encoder: what it finds, and whether a compressed one finds the same."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64

from prunelens.errors import PrunelensError, shown
from prunelens.models.batches import pad_right
from prunelens.models.loading import Model
from prunelens.models.taps import decoder_of, run_decoder
from prunelens.reading import MIB, parse_json, read_lines
from prunelens.spaces.ranks import rank_correlation

QREL = re.compile(r"([^\t]+)\t([^\t]+)\t([+-]?\d+(?:\.\d+)?)\s*")
Advance = Callable[[int], None]
POOLINGS = ("mean", "lasttoken")
CUTOFF = 10
MAX_CORPUS = 4096 * MIB
"""Bytes of a file of passages."""
WHAT = 'a JSON object with texts as "_id" and "text"'
"""nDCG, recall and overlap look at so many of the nearest passages."""


@dataclass(frozen=True)
class Corpus:
    """A retrieval data set in memory: texts by id, and the relevant passages of each query with their grade."""

    name: str
    passages: dict[str, str]  # title and text, joined by one blank where there is a title
    queries: dict[str, str]
    relevant: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Retrieved:
    """What one model retrieves, a row for each query in the order of `Corpus.queries`.

    Attributes:
        ndcg: (Q,) nDCG@10, the gain of a passage being its grade.
        recall: (Q,) share of the relevant passages among the 10 nearest.
        similarities: (Q, N) cosines of query and passage.
    """

    ndcg: Float64[np.ndarray, " Q"]
    recall: Float64[np.ndarray, " Q"]
    similarities: Float32[np.ndarray, "Q N"]


def read_corpus(folder: Path, split: str = "test") -> Corpus:
    """Read a folder in BEIR's format: corpus.jsonl, queries.jsonl and qrels/<split>.tsv.

    Queries without a relevant passage (a grade above 0) are left out.

    Raises:
        PrunelensError: a missing file, a malformed line, an id given twice, a qrel that names an unknown query
            or passage, a score that is not a number, no query left, or fewer than 2 passages.
    """
    paths = folder / "corpus.jsonl", folder / "queries.jsonl", folder / "qrels" / f"{split}.tsv"
    passages, queries = _read_texts(paths[0], with_title=True), _read_texts(paths[1], with_title=False)
    if len(passages) < 2:
        raise PrunelensError(f"expected at least 2 passages in {paths[0]}, found {len(passages)}; add some")
    relevant = _read_qrels(paths[2], queries, passages)
    asked = {query: text for query, text in queries.items() if query in relevant}
    if not asked:
        raise PrunelensError(f"expected a query with a relevant passage in {paths[2]}, found none; add a grade above 0")
    return Corpus(folder.resolve().name, passages, asked, {query: relevant[query] for query in asked})


def embed(
    model: Model, texts: Sequence[str], pooling: str = "mean", batch_size: int = 32, advance: Advance = lambda n: None
) -> Float32[np.ndarray, "N d"]:
    """One vector of length 1 for each text, from the states that enter the head.

    Texts longer than the context are cut; a text without tokens is read as one end-of-text token.

    Args:
        model: the encoder; sublayers taken out around this call stay out in it.
        texts: what is embedded, `batch_size` of them together.
        pooling: `mean` of the states of a text's tokens, or `lasttoken` for the last one's.
        advance: called with the number of texts embedded in a finished batch.

    Raises:
        PrunelensError: no sentence-transformers, no tokenizer or another model's, or states that are not finite.
    """
    encoder = sentence_encoder(model, pooling, advance)
    if not texts:
        return np.zeros((0, model.anatomy.hidden_size), np.float32)
    found = encoder.encode(
        list(texts), batch_size=batch_size, show_progress_bar=False, device=model.device, normalize_embeddings=True
    ).astype(np.float32)
    if not np.isfinite(found).all():
        raise PrunelensError(f"expected finite embeddings from {model.name}, found NaN or infinity; use float32")
    return found


def sentence_encoder(model: Model, pooling: str = "mean", advance: Advance = lambda n: None) -> Any:
    """The model, as it is in memory, as a SentenceTransformer.

    Raises:
        PrunelensError: no sentence-transformers, no tokenizer, or an unknown pooling.
    """
    if pooling not in POOLINGS:
        raise PrunelensError(f"expected a pooling of {', '.join(POOLINGS)}, found {pooling!r}; choose one of them")
    if model.tokenizer is None:
        raise PrunelensError(f"{model.name} has no tokenizer; put its tokenizer files beside config.json")
    try:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import Pooling
    except ImportError as error:
        raise PrunelensError("retrieval needs sentence-transformers; pip install 'prunelens[tasks]'") from error
    modules = [_states_module(model, advance), Pooling(model.anatomy.hidden_size, pooling_mode=pooling)]
    return SentenceTransformer(modules=modules, device=str(model.device))


def _states_module(model: Model, advance: Advance) -> Any:
    """The first module of a SentenceTransformer; the network is no part of it, so that nothing moves or casts it."""
    from sentence_transformers.base.modules import InputModule

    class States(InputModule):
        def preprocess(self, inputs: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
            ids, lengths = pad_right(_token_ids(model, inputs), torch.device("cpu"))
            mask = torch.arange(ids.shape[1])[None, :] < lengths[:, None]
            return {"input_ids": ids, "attention_mask": mask.long()}

        def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
            states = run_decoder(decoder_of(model.network), features["input_ids"])
            features["token_embeddings"] = states.to(torch.promote_types(states.dtype, torch.float32))
            advance(len(states))
            return features

        def get_embedding_dimension(self) -> int:
            return model.anatomy.hidden_size

        def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
            raise NotImplementedError

    return States()


def _token_ids(model: Model, texts: list[str]) -> list[list[int]]:
    limit = model.context_length
    rows = model.tokenizer(texts, truncation=limit is not None, max_length=limit)["input_ids"]
    ids = [list(row) or (model.eos_ids[:1] or [0]) for row in rows]
    largest, num_known = max(map(max, ids)), model.network.get_input_embeddings().weight.shape[0]
    if largest >= num_known:
        raise PrunelensError(f"{model.name} knows {num_known} tokens, but a text has id {largest}; mend its tokenizer")
    return ids


def retrieve(
    model: Model, corpus: Corpus, pooling: str = "mean", batch_size: int = 32, advance: Advance = lambda n: None
) -> Retrieved:
    """Embed all queries and passages and score what is near; the arguments and errors are those of `embed`."""
    queries = embed(model, list(corpus.queries.values()), pooling, batch_size, advance)
    passages = embed(model, list(corpus.passages.values()), pooling, batch_size, advance)
    similarities = queries @ passages.T
    places = {passage: index for index, passage in enumerate(corpus.passages)}
    grades = [{places[name]: grade for name, grade in corpus.relevant[query].items()} for query in corpus.queries]
    return Retrieved(*score(similarities, grades), similarities)


def score(
    similarities: Float32[np.ndarray, "Q N"], grades: Sequence[Mapping[int, float]], k: int = CUTOFF
) -> tuple[Float64[np.ndarray, " Q"], Float64[np.ndarray, " Q"]]:
    """nDCG@k (gain: the grade; discount: log2(rank + 1)) and recall@k of each query.

    Args:
        similarities: (Q, N) of query and passage.
        grades: for each query the indices of its relevant passages, at least one, with grades above 0.
        k: so many of the nearest passages count.
    """
    discounts = np.log2(np.arange(2, k + 2))
    found = np.zeros((2, len(grades)))
    for row, (near, graded) in enumerate(zip(nearest(similarities, k), grades, strict=True)):
        gains, ideal = np.zeros(k), np.zeros(k)
        gains[: len(near)] = [graded.get(index, 0.0) for index in near.tolist()]
        best = sorted(graded.values(), reverse=True)[:k]
        ideal[: len(best)] = best
        found[:, row] = np.sum(gains / discounts) / np.sum(ideal / discounts), np.sum(gains > 0) / len(graded)
    return found[0], found[1]


def nearest(similarities: Float32[np.ndarray, "Q N"], k: int) -> Int64[np.ndarray, "Q K"]:
    """(Q, min(k, N)) indices of the most similar passages, best first; of equal ones the lower index comes first."""
    return np.stack([np.argsort(-row, kind="stable")[:k] for row in similarities])


def overlap_at(dense: Retrieved, compressed: Retrieved, k: int = CUTOFF) -> Float64[np.ndarray, " Q"]:
    """Share of the dense model's k nearest passages that are among the compressed model's k nearest too."""
    pairs = zip(nearest(dense.similarities, k), nearest(compressed.similarities, k), strict=True)
    return np.array([np.isin(left, right).mean() for left, right in pairs])


def neighbour_correlation(dense: Retrieved, compressed: Retrieved) -> Float64[np.ndarray, " Q"]:
    """Spearman's ρ between the two models' similarities of all passages, for each query; NaN where undefined."""
    found = map(rank_correlation, dense.similarities, compressed.similarities)
    return np.array([np.nan if value is None else value for value in found])


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
        found[name] = f"{title} {text}" if title else text
    return found


def _read_qrels(path: Path, queries: dict[str, str], passages: dict[str, str]) -> dict[str, dict[str, float]]:
    graded: dict[tuple[str, str], float] = {}
    for number, (where, line) in enumerate(_lines(path)):
        if number == 0 and line.split() == ["query-id", "corpus-id", "score"]:
            continue
        match = QREL.fullmatch(line)
        if match is None:
            raise PrunelensError(f"{where}: expected two ids and a number between tabs, found {shown(line, 60)}")
        query, passage, grade = match.groups()
        for kind, name, known in (("query", query, queries), ("passage", passage, passages)):
            if name not in known:
                raise PrunelensError(f"{where}: expected a known {kind}, found {name!r}; add it or drop the line")
        if (query, passage) in graded:
            raise PrunelensError(f"{where}: the pair {query!r}, {passage!r} is given twice; keep one of them")
        graded[query, passage] = float(grade)
    found: dict[str, dict[str, float]] = {}
    for (query, passage), value in graded.items():
        if value > 0:
            found.setdefault(query, {})[passage] = value
    return found


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """(file:number, line) of the lines that are not blank."""
    return read_lines(path, "a UTF-8 file of a BEIR data set", MAX_CORPUS)
