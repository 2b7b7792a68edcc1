"""The scores of retrieval: what a model finds beside what the dense one finds, and what a random order would."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64

from prunelens.tasks.corpora import Corpus
from prunelens.tasks.retrieval import Retrieved, neighbour_correlation, overlap_at
from prunelens.tasks.suite import Metric, MetricScores

NEIGHBOURS = 10


def retrieval_scores(
    name: str, corpus: Corpus, dense: Retrieved, found: Retrieved, queries: Sequence[int]
) -> list[MetricScores]:
    """Every metric of a retrieval task.

    Args:
        name: the task.
        corpus: its passages and queries.
        dense: what the dense model retrieves.
        found: what the model retrieves; `dense` for the dense model itself.
        queries: places of the queries that are scored.
    """
    values = {
        Metric(name, "ndcg_at_10", "retrieval", _guessed_ndcg(corpus), decides="kept"): found.ndcg,
        Metric(name, "recall_at_10", "retrieval", _guessed_recall(corpus)): found.recall,
        _overlap(name, corpus): overlap_at(dense, found, NEIGHBOURS),
        Metric(name, "neighbour_correlation", "retrieval"): neighbour_correlation(dense, found),
    }
    keys = list(corpus.queries)
    return [
        MetricScores(metric, {keys[at]: float(numbers[at]) for at in queries if np.isfinite(numbers[at])})
        for metric, numbers in values.items()
    ]


def _guessed_recall(corpus: Corpus) -> float:
    """Mean recall@10 of a random order; a query's own passage may be relevant, but is never found."""
    shares = [1 - (query in grades) / len(grades) for query, grades in corpus.relevant.items()]
    return float(np.mean(np.array(shares) * _near_shares(corpus)))


def _near_shares(corpus: Corpus) -> Float64[np.ndarray, " Q"]:
    """What share of the passages that a query can find is among its 10 nearest: overlap@10 of two random orders."""
    counts = np.array([corpus.num_candidates(query) for query in corpus.queries])
    return np.minimum(1.0, NEIGHBOURS / counts)


def _overlap(name: str, corpus: Corpus) -> Metric:
    """Decides nothing where all passages are among the 10 nearest."""
    decides = None if has_no_order(corpus) else "agreement"
    return Metric(name, "overlap_at_10", "retrieval", float(_near_shares(corpus).mean()), decides=decides)


def has_no_order(corpus: Corpus) -> bool:
    """Whether a query has so few passages to find that all of them are its nearest."""
    return any(corpus.num_candidates(query) <= NEIGHBOURS for query in corpus.queries)


def _guessed_ndcg(corpus: Corpus) -> float:
    """Mean nDCG@10 of a random order: every rank holds the mean grade of what can be found."""
    discounts = 1 / np.log2(np.arange(2, NEIGHBOURS + 2))
    shares = []
    for query, grades in corpus.relevant.items():
        count = corpus.num_candidates(query)
        ideal = np.array(sorted(grades.values(), reverse=True)[:NEIGHBOURS], dtype=float)
        mean = sum(grade for passage, grade in grades.items() if passage != query) / count
        shares.append(mean * float(discounts[:count].sum()) / float(ideal @ discounts[: len(ideal)]))
    return min(1.0, float(np.mean(shares)))
