"""What run.json says: what was compared and how, so that every number can be traced to what made it."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import pyarrow as pa

from prunelens.models.model import Model
from prunelens.pruning.pruned import Pruned
from prunelens.pruning.redundancy import Ranking
from prunelens.study.candidates import Candidate
from prunelens.study.compare.schemas import RUN, STAT_COLUMNS
from prunelens.study.compare.settings import Settings
from prunelens.study.rows import column, rows_of
from prunelens.tasks.encoding import prompt_notes
from prunelens.tasks.prompts import Prompt

ENOUGH_PROMPTS = 48
"""From so many on, intervals of KL per token are as sure as they say."""


@dataclass(frozen=True)
class Described:
    """What run.json says of a compressed model, which outlives its weights.

    Attributes:
        record: its entry under `compressed`.
        model_notes: remarks on a model from files or in memory.
        recipe_notes: remarks on what a recipe has made.
    """

    record: dict[str, Any]
    model_notes: list[str]
    recipe_notes: list[str]


def described(candidate: Candidate, dense: Model) -> Described:
    """What is to be said of a compressed model, while its weights are there."""
    label = candidate.label
    made = candidate.pruned.notes if candidate.pruned else ()
    return Described(
        describe_candidate(candidate, dense),
        list(candidate.model.notes) if candidate.model else [],
        [note if label in note else f"{label}: {note}" for note in made],
    )


def describe_run(
    dense: Model,
    compressed: Sequence[Described],
    prompts: Sequence[Prompt],
    settings: Settings,
    ranking: Ranking | None,
    tables: dict[str, pa.Table],
    seconds: dict[str, float],
) -> dict[str, Any]:
    """The content of run.json, but for the summary."""
    return {
        "format": RUN.format,
        "format_version": RUN.version,
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "dense": describe_model(dense) | describe_size(Candidate("dense"), dense),
        "compressed": [one.record for one in compressed],
        "ranking": _describe_ranking(ranking, settings.calibration),
        "settings": asdict(settings) | {"anchors": list(settings.anchors)},
        "units": STAT_COLUMNS,
        "nulls": _nulls(tables, prompts),
        "notes": [*dense.notes, *(note for one in compressed for note in one.model_notes)]
        + prompt_notes(prompts)
        + few_prompts(len(prompts))
        + [note for one in compressed for note in one.recipe_notes],
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "versions": {name: version(name) for name in ("prunelens", "torch", "transformers", "numpy")},
    }


def few_prompts(count: int) -> list[str]:
    """What a reader should know of intervals over few prompts (docs/coverage.md)."""
    if count >= ENOUGH_PROMPTS:
        return []
    return [f"{count} prompts: below {ENOUGH_PROMPTS}, 95 % intervals of KL hold the truth in 90 to 96 % of samples"]


def describe_model(model: Model) -> dict[str, Any]:
    """Name, fingerprint and shape of a model."""
    return {
        "name": model.name,
        "fingerprint": model.fingerprint,
        "family": model.network.config.model_type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "num_layers": len(model.anatomy.blocks),
        "hidden_size": model.anatomy.hidden_size,
        "vocab_size": model.anatomy.vocab_size,
    }


def describe_candidate(candidate: Candidate, dense: Model) -> dict[str, Any]:
    """What a compressed model is and how it was made."""
    found: dict[str, Any] = {"label": candidate.label} | describe_size(candidate, dense)
    if candidate.pruned is not None:
        assert candidate.recipe is not None
        found |= {"recipe": str(candidate.recipe)} | candidate.recipe.made_with
        return found | describe_pruned(candidate.pruned)
    assert candidate.model is not None
    return found | describe_model(candidate.model)


def describe_size(candidate: Candidate, dense: Model) -> dict[str, Any]:
    """Parameters, bytes of the weights, and the share of zeros in the blocks' matrices."""
    return {
        "parameters": candidate.num_parameters(dense),
        "bytes": candidate.num_bytes(dense),
        "zeros": candidate.zero_share(dense),
    }


def describe_pruned(pruned: Pruned) -> dict[str, Any]:
    """What a recipe did to the model."""
    found: dict[str, Any] = {
        "dropped": {kind: sorted(layers) for kind, layers in vars(pruned.drop).items() if layers},
    }
    if pruned.experts:
        found["dropped"]["experts"] = {str(layer): list(experts) for layer, experts in pruned.experts.items()}
    if pruned.masked is not None:
        found["masked"] = {"zeros": pruned.masked.zeros, "total": pruned.masked.total}
    if pruned.repaired:
        found["repaired"] = [
            {
                "kind": one.gap.kind,
                "layers": list(range(one.gap.first, one.gap.last + 1)),
                "strength": one.strength,
                "explained": one.explained,
            }
            for one in pruned.repaired
        ]
    if pruned.quantized is not None:
        found["quantized"] = pruned.quantized
    return found | {"notes": list(pruned.notes)}


def _describe_ranking(ranking: Ranking | None, calibration: str | None) -> dict[str, Any] | None:
    if ranking is None:
        return None
    return {
        "score": "mean cosine of the residual stream before and after, highest first",
        "calibration": calibration or "the dense model's greedy texts on the prompts",
        "num_tokens": ranking.num_tokens,
        "order": [
            {"kind": kind, "layer_idx": layer_idx, "score": ranking.scores[kind, layer_idx]}
            for kind, layer_idx in ranking.ordered("attention", "mlp", "block")
        ],
    }


def _nulls(tables: dict[str, pa.Table], prompts: Sequence[Prompt]) -> dict[str, str]:
    """Why a column holds nulls, and why a prompt has no row of options."""
    found = {}
    for name in ("steps", "prompt_end", "noise"):
        for ratio in ("amplification", "amplification_estimate"):
            if tables[name][ratio].null_count:
                found[f"{name}.{ratio}"] = "the logits did not turn (0/0)"
    layers = tables["layers"]
    if layers["kl_dense_compressed"].null_count:
        found["layers.logit_*, layers.prob_* and what follows from them"] = (
            "trace cumulative, lens raw: h alone is measured there"
        )
    if layers["amplification"].null_count > layers["kl_dense_compressed"].null_count:
        found["layers.amplification"] = "the logits did not turn (0/0)"
    cosines = [name for name in ("hidden_cosine", "logit_cosine", "prob_cosine") if _undefined(tables["steps"], name)]
    if cosines:
        found["means of " + ", ".join(f"steps.{name}" for name in cosines)] = (
            "steps at which a vector is zero or its length overflows have no cosine; means leave them out, and are "
            "null where no step is left"
        )
    for against in tables["noise"]["against"].unique().to_pylist():
        rows = rows_of(tables["noise"], against=against)
        for space, name in (("hidden", "hidden_cosine"), ("logit", "logit_cosine"), ("prob", "prob_cosine")):
            if _undefined(rows, name) == rows.num_rows > 0:
                found[f"noise.{against}.{space}_deviation"] = "a vector is zero or its length overflows at every step"
    if tables["attribution"]["kl_all_but"].null_count:
        found["attribution.kl_all_but, attribution.tv_all_but"] = "the compressed model does not change this sublayer"
    if tables["attribution"]["layer_idx"].null_count:
        found["attribution.layer_idx"] = "the rest (embedding, shared norms, final norm, head) lies in no block"
    for prompt in prompts:
        if prompt.options_problem:
            found[f"prompt_end.options.{prompt.prompt_id}"] = prompt.options_problem
    return found


def _undefined(table: pa.Table, name: str) -> int:
    """How many values of a column are no finite numbers."""
    return int((~np.isfinite(column(table, name))).sum())
