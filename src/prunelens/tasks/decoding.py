"""Which rules written answers follow: those of lm-evaluation-harness keep the checkpoint's own generation settings."""

from typing import Any

from prunelens.models.model import Model

NAMES = (
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "transformers_version"),
    *("use_cache", "cache_implementation", "cache_config", "compile_config", "disable_compile", "max_length"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
)
"""Settings that say nothing of how tokens are chosen."""
SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h")
"""Settings that greedy decoding does not read."""
FREE = "texts are drawn at T = 1, and by the dense checkpoint's own settings where it has any"


def own_settings(model: Model, samples: bool = False) -> dict[str, Any]:
    """The generation settings of a checkpoint that differ from plain decoding and are read in the harness's tasks.

    Args:
        model: its checkpoint.
        samples: whether a task draws its answers, so that settings of sampling are read too.
    """
    config = getattr(model.network, "generation_config", None)
    if config is None:
        return {}
    found: dict[str, Any] = config.to_diff_dict()
    unread = NAMES if samples else (*NAMES, *SAMPLING)
    return {
        name: value
        for name, value in found.items()
        if name not in unread and not name.startswith("_") and value is not None and value != [] and value is not False
    }


def decoding_note(settings: dict[str, dict[str, Any] | None]) -> list[str]:
    """One sentence where a checkpoint's own settings shape its answers; `settings` by the model's label."""
    own = {label: found for label, found in settings.items() if found}
    if not own:
        return []
    listed = "; ".join(
        f"{label}: {', '.join(f'{name} {value}' for name, value in found.items())}" for label, found in own.items()
    )
    return [
        f"written answers of lm-evaluation-harness tasks follow the checkpoint's own generation settings, as lm_eval "
        f"itself does ({listed}); compare sets them aside, and core_long draws texts both ways"
    ]
