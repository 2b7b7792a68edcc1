"""Which class of transformers opens a configuration: a causal language model, or one that also sees or hears."""

from pathlib import Path
from typing import Any

import transformers
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM

from prunelens.errors import PrunelensError

AUTO_CLASSES = (AutoModelForCausalLM, AutoModelForMultimodalLM)
REMOTE = ("AutoModelForCausalLM", "AutoModelForMultimodalLM", "AutoModelForImageTextToText")
"""What a checkpoint with code of its own may register a language model as."""
CAUSAL = ("CausalLM", "LMHeadModel", "ConditionalGeneration")


def auto_class_of(config: Any, trust_remote_code: bool = False) -> Any:
    """The auto class that opens a checkpoint whole: with its towers, if it was saved with them.

    Args:
        config: a transformers configuration.
        trust_remote_code: whether code that the checkpoint brings along may be run.

    Returns:
        A class with `from_pretrained` and `from_config`; None where transformers has none.
    """
    remote = [name for name in REMOTE if name in (getattr(config, "auto_map", None) or {})]
    if trust_remote_code and remote:
        return getattr(transformers, remote[0])
    fitting = [auto for auto in AUTO_CLASSES if type(config) in auto._model_mapping]
    named = [auto for auto in fitting if set(config.architectures or ()) & _class_names(auto, config)]
    if named or not fitting:
        return next(iter(named), None)
    return fitting[-1] if config.get_text_config(decoder=True) is not config else fitting[0]


def check_causal(config: Any, path: Path, trust_remote_code: bool = False) -> None:
    """Refuse a configuration that is not a causal decoder's.

    Raises:
        PrunelensError: it is not, or transformers has no class for it that writes text.
    """
    classes = list(config.architectures or [])
    known = {
        name for auto in AUTO_CLASSES if type(config) in auto._model_mapping for name in _class_names(auto, config)
    }
    causal = [name for name in classes if name.endswith(CAUSAL) or name in known or getattr(config, "auto_map", None)]
    is_encoder_decoder = any(
        getattr(one, "is_encoder_decoder", False) for one in (config, config.get_text_config(decoder=True))
    )
    if is_encoder_decoder or (classes and not causal):
        raise PrunelensError(
            f"expected a causal decoder in {path}, found {', '.join(classes) or config.model_type}; "
            "only causal language models can be compared"
        )
    if auto_class_of(config, trust_remote_code) is None:
        if any(name in (getattr(config, "auto_map", None) or {}) for name in REMOTE):
            raise PrunelensError(
                f"{path} is a {config.model_type} model that runs Python code of its own; pass --trust-remote-code if "
                "you trust it"
            )
        raise PrunelensError(
            f"expected a causal decoder in {path}, found a {config.model_type} model, which transformers has no class "
            "for that writes text; only causal language models can be compared"
        )


def _class_names(auto: Any, config: Any) -> set[str]:
    found = auto._model_mapping[type(config)]
    return {one.__name__ for one in (found if isinstance(found, tuple | list) else (found,))}
