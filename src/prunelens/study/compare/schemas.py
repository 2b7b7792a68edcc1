"""What a comparison is on disk: its tables with their columns, types and units."""

from pathlib import Path

import pyarrow as pa

from prunelens.errors import PrunelensError
from prunelens.study.compare.record import RunInfo
from prunelens.study.store import Kind, Run, reason_of, write_run

STAT_COLUMNS = {
    "hidden_cosine": "1",
    "hidden_alpha": "1",
    "hidden_rho": "1",
    "logit_cosine": "1",
    "logit_cosine_centered": "1",
    "logit_alpha": "1",
    "logit_rho": "1",
    "logit_rms_delta": "logit",
    "logit_var_uniform": "logit²",
    "prob_cosine": "1",
    "kl_dense_compressed": "nat",
    "kl_compressed_dense": "nat",
    "js": "nat",
    "tv": "1",
    "same_top1": "bool",
    "rank_of_dense_top1": "rank",
    "topk_overlap": "1",
    "delta_p_top1": "probability",
    "delta_p_token": "probability",
    "entropy_dense": "nat",
    "entropy_compressed": "nat",
    "acceptance": "probability",
    "prob_deviation_estimate": "1",
    "kl_estimate": "nat",
    "kl_estimate_third": "nat",
    "trust": "1",
    "amplification": "1",
    "amplification_estimate": "1",
}
"""Columns of row statistics and their units."""

STAT_FIELDS = [
    (name, {"bool": pa.bool_(), "rank": pa.int32()}.get(unit, pa.float64())) for name, unit in STAT_COLUMNS.items()
]
TOKEN_FIELDS = [("step", pa.int32()), ("position", pa.int32()), ("token_id", pa.int32())]
"""Where a row stands in a text: step from 1, index of the predicted token from 0, and that token."""

CURVES = ("survival_sampled", "survival_bound", "survival_greedy", "survival_coupled", "survival_free")

SCHEMAS = {
    "prompts": pa.schema(
        [
            ("prompt_id", pa.string()),
            ("kind", pa.string()),
            ("text", pa.string()),
            ("token_ids", pa.list_(pa.int32())),
            ("options", pa.list_(pa.string())),
            ("option_ids", pa.list_(pa.int32())),
            ("answer", pa.string()),
        ]
    ),
    "steps": pa.schema(
        [
            ("compressed", pa.string()),
            ("prompt_id", pa.string()),
            ("trace", pa.string()),
            *TOKEN_FIELDS,
            ("contexts_differ", pa.bool_()),
            *STAT_FIELDS,
        ]
    ),
    "layers": pa.schema(
        [
            ("compressed", pa.string()),
            ("prompt_id", pa.string()),
            ("trace", pa.string()),
            *TOKEN_FIELDS,
            ("layer_idx", pa.int32()),
            ("sublayer", pa.string()),
            ("lens", pa.string()),
            *STAT_FIELDS,
        ]
    ),
    "attribution": pa.schema(
        [
            ("compressed", pa.string()),
            ("prompt_id", pa.string()),
            ("layer_idx", pa.int32()),
            ("sublayer", pa.string()),
            ("changed", pa.bool_()),
            ("num_steps", pa.int32()),
            ("kl_alone", pa.float64()),
            ("tv_alone", pa.float64()),
            ("kl_all_but", pa.float64()),
            ("tv_all_but", pa.float64()),
        ]
    ),
    "noise": pa.schema(
        [
            ("against", pa.string()),
            ("prompt_id", pa.string()),
            ("trace", pa.string()),
            *TOKEN_FIELDS,
            *STAT_FIELDS,
        ]
    ),
    "anchors": pa.schema(
        [
            ("anchor", pa.string()),
            ("prompt_id", pa.string()),
            ("trace", pa.string()),
            *TOKEN_FIELDS,
            *STAT_FIELDS,
        ]
    ),
    "prompt_end": pa.schema(
        [
            ("compressed", pa.string()),
            ("prompt_id", pa.string()),
            ("space", pa.string()),
            ("position", pa.int32()),
            ("token_id", pa.int32()),
            ("margin", pa.float64()),
            ("margin_compressed", pa.float64()),
            *STAT_FIELDS,
        ]
    ),
    "survival": pa.schema(
        [
            ("compressed", pa.string()),
            ("n", pa.int32()),
            *[(f"{curve}{end}", pa.float64()) for curve in CURVES for end in ("", "_low", "_high")],
        ]
    ),
    "continuations": pa.schema(
        [
            ("model", pa.string()),
            ("prompt_id", pa.string()),
            ("trace", pa.string()),
            ("token_ids", pa.list_(pa.int32())),
            ("tokens", pa.list_(pa.string())),
            ("text", pa.string()),
            ("ended", pa.bool_()),
            ("agreed", pa.list_(pa.int32())),
        ]
    ),
    "alternatives": pa.schema(
        [
            ("compressed", pa.string()),
            ("prompt_id", pa.string()),
            ("step", pa.int32()),
            ("dense_tokens", pa.list_(pa.string())),
            ("dense_probs", pa.list_(pa.float32())),
            ("compressed_tokens", pa.list_(pa.string())),
            ("compressed_probs", pa.list_(pa.float32())),
        ]
    ),
}
"""Every table of a run. `steps`, `prompts`, `prompt_end` and `survival` are a contract with other people's scripts."""

RUN = Kind(
    "prunelens-run",
    4,
    SCHEMAS,
    (
        "dense",
        "compressed",
        "ranking",
        "settings",
        "nulls",
        "notes",
        "seconds",
        "versions",
        "summary",
        "created",
        "lens",
        "noise",
    ),
    "run",
    "compare",
    RunInfo,
    ("prompts", "steps", "survival", "continuations"),
    later=("anchors",),
)
"""What `compare` writes."""


class UnsummarisedError(PrunelensError):
    """Everything was measured, but what is said of it could not be made; `tables` holds what was measured."""

    def __init__(self, tables: dict[str, pa.Table], fault: Exception) -> None:
        self.tables = tables
        self._begins = f"the summary could not be made ({reason_of(fault)})"
        super().__init__(f"{self._begins}; the tables are kept as `tables` of this error")

    def kept_in(self, folder: Path) -> PrunelensError:
        """Write the tables alone into a folder, which the next run may replace; returns what a user is told."""
        with RUN.new_folder(folder) as temporary:
            write_run(Run(self.tables, {"format": RUN.format, "format_version": RUN.version}), temporary)
        return PrunelensError(f"{self._begins}; the tables (Parquet) are in {folder}, without summary and page")
