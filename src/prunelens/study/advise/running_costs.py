"""What a found drop saves while it runs, with and without its repair: decoding speed and KV cache, in one run."""

from dataclasses import asdict
from typing import Any

from prunelens.models.surgery.drop import Drop
from prunelens.models.surgery.variant import Variant
from prunelens.study.advise.search import Search, recipe_of, repair_of
from prunelens.study.benchmark.record import SpeedSettings
from prunelens.study.benchmark.speed import measure_speeds

CONTEXT, NEW_TOKENS = 256, 32


def running_costs(search: Search, drop: Drop) -> list[dict[str, Any]]:
    """One record each of the dense model, the drop, and the drop repaired; measured once and kept in the ledger."""
    plain = recipe_of(drop)
    recipes = [plain, f"{plain}+{repair_of(search.dense)}"]

    def answer() -> list[dict[str, Any]]:
        limit = search.dense.context_length or CONTEXT + NEW_TOKENS
        settings = SpeedSettings(context=max(1, min(CONTEXT, limit - NEW_TOKENS)), new_tokens=NEW_TOKENS)
        made = {recipe: search.pruned(recipe).variant for recipe in reversed(recipes)}  # the last one made may be it
        variants = {"dense": Variant(search.dense)} | {recipe: made[recipe] for recipe in recipes}
        advance = search.reporter("measuring speed", settings.num_runs(len(variants)))
        return [
            {
                "recipe": speed.label,
                "decode_ratio": asdict(speed.decode_ratio) if speed.decode_ratio else None,
                "decode_tokens_per_second": speed.decode_tokens_per_second.median,
                "kv_bytes_per_token": speed.kv_bytes_per_token,
                "device": speed.device,
            }
            for speed in measure_speeds(variants, settings, advance)
        ]

    found: list[dict[str, Any]] = search.answers.ask(
        search.about | {"ask": "running costs", "recipes": recipes}, answer
    )
    return found
