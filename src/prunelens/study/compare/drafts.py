"""The stage that lets every compressed model draft for the dense one (S5), and what run.json says of it."""

from collections.abc import Sequence
from typing import Any

from prunelens.errors import PrunelensError
from prunelens.models.model import Model
from prunelens.progress import Reporter
from prunelens.study.candidates import Candidate
from prunelens.study.compare.settings import Settings
from prunelens.study.compare.summary import NUM_DRAFTED
from prunelens.tasks.prompts import Prompt
from prunelens.tracing.draft import measure_draft
from prunelens.tracing.draft_run import DraftRun

DRAFT_PROMPTS = 4
"""At most so many prompts are continued: each one takes a text at a time, alone and with every draft."""


def measure_drafts(
    dense: Model,
    candidates: Sequence[Candidate],
    prompts: Sequence[Prompt],
    settings: Settings,
    reporter: Reporter,
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """What was measured for each compressed model, by label, and the reasons why something was not."""
    if not settings.draft:
        return {}, {"draft.measured": "not asked for; --draft measures it"}
    ids = [prompt.token_ids for prompt in prompts[:DRAFT_PROMPTS]]
    found, nulls = {}, {}
    for candidate in candidates:
        advance = reporter(f"{candidate.label} drafts", 2 * len(ids) * settings.max_new_tokens)
        try:
            run = measure_draft(
                dense,
                candidate.variant(dense),
                ids,
                settings.max_new_tokens,
                NUM_DRAFTED,
                settings.temperature,
                settings.seed,
                advance,
            )
        except PrunelensError as error:
            nulls[f"draft.measured.{candidate.label}"] = str(error)
        else:
            found[candidate.label] = describe_draft(run)
    return found, nulls


def describe_draft(run: DraftRun) -> dict[str, Any]:
    """The measured side of `draft` in the summary; ratios of times are to a token of the dense model alone."""
    low, high = run.speedup_range
    return {
        "prompts": len(run.assisted),
        "tokens": sum(len(text.token_ids) for text in run.assisted),
        "examined": run.examined,
        "accepted": run.accepted,
        "acceptance": run.acceptance,
        "tokens_per_dense_call": run.tokens_per_dense_call,
        "cost_ratio": run.cost_ratio,
        "check_ratio": run.check_ratio,
        "plain_tokens_per_second": run.plain_tokens_per_second,
        "assisted_tokens_per_second": run.assisted_tokens_per_second,
        "speedup": {"value": run.speedup, "low": low, "high": high},
    }
