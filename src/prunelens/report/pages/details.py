"""Tables below the figures: the steps with the largest damage, and how the run was made."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from prunelens.report.figures.layers import kind_name
from prunelens.report.wording import DASH, number, percent, visible, word
from prunelens.study.compare.summary import texts_of
from prunelens.study.rows import column, rows_of
from prunelens.study.store import Run

NUM_DAMAGED = 10
NUM_RANKED = 15
CONTEXT = 70


@dataclass(frozen=True)
class DamagedStep:
    """A step with a large KL."""

    prompt: int
    prompt_id: str
    step: int
    before: str
    dense: tuple[str, str]
    compressed: tuple[str, str]
    kl: str


@dataclass(frozen=True)
class Damage:
    """The worst steps of one compressed model and the share of the whole KL they hold."""

    steps: list[DamagedStep]
    share: str
    total: int


def damage(run: Run, index: int) -> Damage:
    """The greedy steps with the largest KL of one compressed model."""
    label = run.info["compressed"][index]["label"]
    names = ("prompt_id", "step", "kl_dense_compressed")
    rows = rows_of(run.tables["steps"], names, compressed=label, trace="greedy")
    kl = np.nan_to_num(column(rows, "kl_dense_compressed"))
    worst = [int(row) for row in np.argsort(-kl, kind="stable")[:NUM_DAMAGED] if kl[row] > 0]
    ids, steps = rows["prompt_id"].to_pylist(), rows["step"].to_pylist()
    texts = texts_of(run.tables, "dense")
    order = run.tables["prompts"]["prompt_id"].to_pylist()
    found = [
        _damaged(run, label, order.index(ids[row]), steps[row], texts[ids[row]]["tokens"], kl[row]) for row in worst
    ]
    whole = len(worst) == np.count_nonzero(kl > 0)
    share = 1.0 if whole else float(kl[worst].sum() / kl.sum())
    return Damage(found, percent(share), len(kl))


def _damaged(run: Run, label: str, prompt: int, step: int, tokens: list[str], kl: float) -> DamagedStep:
    prompt_id = run.tables["prompts"]["prompt_id"][prompt].as_py()
    rows = rows_of(run.tables["alternatives"], compressed=label, prompt_id=prompt_id, step=step).to_pylist()
    tops = {
        side: _top(rows[0][f"{side}_tokens"], rows[0][f"{side}_probs"]) if rows else (DASH, "")
        for side in ("dense", "compressed")
    }
    before = "".join(tokens[: step - 1])
    shown = visible(before[-CONTEXT:]) if before else "(the answer begins)"
    cut = "…" if len(before) > CONTEXT else ""
    return DamagedStep(prompt, prompt_id, step, cut + shown, tops["dense"], tops["compressed"], number(kl))


def _top(tokens: list[str], probs: list[float]) -> tuple[str, str]:
    """The most likely token and its probability."""
    return (word(tokens[0]), percent(probs[0])) if tokens else (DASH, "")


def ranking(info: dict[str, Any]) -> list[dict[str, Any]]:
    """The most redundant parts, with scores and who drops them."""
    found = (info.get("ranking") or {}).get("order", [])[:NUM_RANKED]
    return [item | {"score": f"{item['score']:.5f}", "used": _dropped_by(info, item)} for item in found]


def _dropped_by(info: dict[str, Any], item: dict[str, Any]) -> list[int]:
    """Places of the compressed models that drop this part."""
    return [
        index
        for index, record in enumerate(info["compressed"])
        if item["layer_idx"] in record.get("dropped", {}).get(item["kind"], [])
    ]


def made(info: dict[str, Any]) -> list[dict[str, Any]]:
    """What each model is, the dense one first."""
    dense = {"label": "dense: " + info["dense"]["name"]} | info["dense"]
    return [_described(record) for record in (dense, *info["compressed"])]


def _described(record: dict[str, Any]) -> dict[str, Any]:
    dropped = record.get("dropped") or {}
    what = [f"{record['family']}, {record['dtype']} on {record['device']}"] if "family" in record else []
    if "num_layers" in record:
        what.append(
            f"{record['num_layers']} blocks, hidden size {record['hidden_size']}, vocabulary {record['vocab_size']:,}"
        )
    what += [_without(kind, layers) for kind, layers in dropped.items()]
    return {
        "label": record["label"],
        "recipe": record.get("recipe", ""),
        "what": "; ".join(what),
        "parameters": f"{record['parameters']:,}",
        "fingerprint": record.get("fingerprint", ""),
    }


def _without(kind: str, layers: list[int]) -> str:
    numbers = ", ".join(map(str, layers))
    blocks = f"block{'s' if len(layers) > 1 else ''} {numbers}"
    return f"without {blocks}" if kind == "block" else f"without the {kind_name(kind)} of {blocks}"
