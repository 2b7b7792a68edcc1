"""What the attribution says in words (D1): whether damages add up, and how the cosine ranking fared."""

from collections.abc import Mapping
from typing import Any

from prunelens.report.figures.layers import kind_name
from prunelens.report.wording import interval, number

REST = "rest"
ADDS_UP = (0.9, 1.1)
"""Additivity between these is called adding up."""
RHO_CLEAR, RHO_SOME = 0.7, 0.4
"""Spearman correlations from which the ranking is called good, and partly good."""


def sentences(record: Mapping[str, Any], parts: list[Mapping[str, Any]]) -> list[str]:
    """Whether the damages add up, what the rest does, and how the ranking fared."""
    found = [_additivity(record, parts)]
    found += [
        f"The rest (embedding, final norm and head) alone: {number(part['kl']['mean'])} nats {interval(part['kl'])}."
        for part in record["parts"]
        if part["sublayer"] == REST
    ]
    for kind, correlation in (record.get("rank_correlation") or {}).items():
        found.append(_correlation(kind, correlation, [part for part in parts if part["sublayer"] == kind]))
    return found


def _additivity(record: Mapping[str, Any], parts: list[Mapping[str, Any]]) -> str:
    ratio = record["additivity"]
    changed = sum(bool(part["changed"]) for part in record["parts"])
    if ratio is None:
        return "No change causes any damage alone, so there is nothing to add up."
    if changed == 1:
        return (
            f"Only one sublayer is changed, so its damage alone is the whole damage, {number(record['kl_all'])} nats."
        )
    low, high = ADDS_UP
    verdict = (
        "the damages about add up"
        if low <= ratio <= high
        else "together they do more damage than one by one"
        if ratio > high
        else "together they do less damage than the sum of each alone"
    )
    return (
        f"All {changed} changes together: KL {number(record['kl_all'])} nats; the sum of each alone: "
        f"{number(record['sum_alone'])} nats; ratio {number(ratio)}: {verdict}."
    )


def _correlation(kind: str, found: Mapping[str, Any], parts: list[Mapping[str, Any]]) -> str:
    rho = found["rho"]
    if rho is None:
        return f"Cosine ranking against damage, {kind_name(kind)}: no correlation can be told, the values are tied."
    return (
        f"Cosine ranking against damage, {found['n']} {kind_name(kind)} sublayers: Spearman ρ {number(rho, 2)}, "
        f"{_rho_words(rho)}.{_harmless(parts)}"
    )


def _rho_words(rho: float) -> str:
    if rho >= RHO_CLEAR:
        return "cosine orders them much as the damage does"
    if rho >= RHO_SOME:
        return "cosine orders them partly as the damage does"
    if rho > -RHO_SOME:
        return "cosine says little about which of them does damage"
    return "cosine orders them against the damage: what it calls redundant does more"


def _harmless(parts: list[Mapping[str, Any]]) -> str:
    """How many of the most redundant sublayers are among the least damaging ones."""
    scored = [part for part in parts if part["redundancy"] is not None]
    count = len(scored) // 4
    if count < 2:
        return ""
    by_cosine = sorted(range(len(scored)), key=lambda row: -scored[row]["redundancy"])[:count]
    by_damage = sorted(range(len(scored)), key=lambda row: scored[row]["kl"]["mean"])[:count]
    common = len(set(by_cosine) & set(by_damage))
    verb = "is" if common == 1 else "are"
    return f" Of the {count} most redundant by cosine, {common} {verb} among the {count} that do least damage."
