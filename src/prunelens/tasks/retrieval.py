"""Retrieval with a causal language model as encoder: what it finds, and whether a compressed one finds the same."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64

from prunelens.errors import PrunelensError
from prunelens.metrics.statistics import rank_correlation
from prunelens.models.anatomy.hooks import decoder_of, run_decoder
from prunelens.models.batches import pad_right
from prunelens.models.model import Model
from prunelens.models.texts import texts_ids
from prunelens.progress import Advance, unreported
from prunelens.tasks.corpora import Corpus

POOLINGS = ("mean", "lasttoken")
CUTOFF = 10
"""nDCG, recall and overlap look at so many of the nearest passages."""


@dataclass(frozen=True)
class Retrieved:
    """What one model retrieves, a row for each query in the order of `Corpus.queries`.

    Attributes:
        ndcg: (Q,) nDCG@10, the gain of a passage being its grade.
        recall: (Q,) share of the relevant passages among the 10 nearest.
        similarities: (Q, N) cosines of query and passage; NaN where the passage has the query's own id, which no
            number counts.
    """

    ndcg: Float64[np.ndarray, " Q"]
    recall: Float64[np.ndarray, " Q"]
    similarities: Float32[np.ndarray, "Q N"]


def embed(
    model: Model, texts: Sequence[str], pooling: str = "mean", batch_size: int = 32, advance: Advance = unreported
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
    if not model.anatomy.batching.reads_any_lengths:
        batch_size = 1  # others in the batch would change a text's states
    found = encoder.encode(
        list(texts), batch_size=batch_size, show_progress_bar=False, device=model.device, normalize_embeddings=True
    ).astype(np.float32)
    if not np.isfinite(found).all():
        raise PrunelensError(f"expected finite embeddings from {model.name}, found NaN or infinity; use float32")
    return found


def sentence_encoder(model: Model, pooling: str = "mean", advance: Advance = unreported) -> Any:
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
    rows = texts_ids(model, texts)
    if limit is not None and max(map(len, rows)) > limit:
        note = f"texts longer than the {limit} tokens that {model.name} can read were cut there for their embedding"
        if note not in model.notes:
            model.notes.append(note)
    ids = [row[:limit] or (model.eos_ids[:1] or [0]) for row in rows]
    largest, num_known = max(map(max, ids)), model.network.get_input_embeddings().weight.shape[0]
    if largest >= num_known:
        raise PrunelensError(f"{model.name} knows {num_known} tokens, but a text has id {largest}; fix its tokenizer")
    return ids


def retrieve(
    model: Model, corpus: Corpus, pooling: str = "mean", batch_size: int = 32, advance: Advance = unreported
) -> Retrieved:
    """Embed all queries and passages and score what is near; the arguments and errors are those of `embed`.

    As in BEIR, a query does not find the passage that has its own id (a data set that asks with its own passages).
    """
    queries = embed(model, list(corpus.queries.values()), pooling, batch_size, advance)
    passages = embed(model, list(corpus.passages.values()), pooling, batch_size, advance)
    similarities = queries @ passages.T
    places = {passage: index for index, passage in enumerate(corpus.passages)}
    for row, query in enumerate(corpus.queries):
        if query in places:
            similarities[row, places[query]] = np.nan
    grades = [{places[name]: grade for name, grade in corpus.relevant[query].items()} for query in corpus.queries]
    return Retrieved(*score(similarities, grades), similarities)


def score(
    similarities: Float32[np.ndarray, "Q N"], grades: Sequence[Mapping[int, float]], k: int = CUTOFF
) -> tuple[Float64[np.ndarray, " Q"], Float64[np.ndarray, " Q"]]:
    """nDCG@k (gain: the grade; discount: log2(rank + 1)) and recall@k of each query.

    Args:
        similarities: (Q, N) of query and passage; one that is NaN is not found.
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
    """(Q, min(k, N)) indices of the most similar passages, best first; of equal ones the lower index comes first.

    -1 where nothing is left to find: NaN is no similarity.
    """
    found = np.stack([np.argsort(-row, kind="stable")[:k] for row in similarities])  # NaN goes last
    found[np.isnan(np.take_along_axis(similarities, found, axis=1))] = -1
    return found


def overlap_at(dense: Retrieved, compressed: Retrieved, k: int = CUTOFF) -> Float64[np.ndarray, " Q"]:
    """Share of the dense model's k nearest passages that are among the compressed model's k nearest too."""
    pairs = zip(nearest(dense.similarities, k), nearest(compressed.similarities, k), strict=True)
    return np.array([np.isin(left[left >= 0], right).mean() for left, right in pairs])


def neighbour_correlation(dense: Retrieved, compressed: Retrieved) -> Float64[np.ndarray, " Q"]:
    """Spearman's ρ between the two models' similarities of all passages, for each query; NaN where undefined."""
    found = []
    for left, right in zip(dense.similarities, compressed.similarities, strict=True):
        kept = ~np.isnan(left)
        found.append(rank_correlation(left[kept], right[kept]))
    return np.array([np.nan if value is None else value for value in found])
