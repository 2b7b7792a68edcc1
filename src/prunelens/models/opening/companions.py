"""The files that go with weights unchanged, tokenizer and processors, and the settings for generating.

They are copied from the checkpoint that a model was opened from: writing them again could change what they mean.
"""

import shutil
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from prunelens.errors import PrunelensError
from prunelens.models.opening.claims import CONFIG, GENERATION
from prunelens.models.opening.quiet import quiet

SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".spm", ".vocab", ".py")
LEGAL = ("LICENSE", "LICENCE", "NOTICE", "COPYING", "USE_POLICY")
OTHERS = (CONFIG, "quantize_config.json", "quant_config.json", "hf_quant_config.json", "trainer_state.json",
          "all_results.json", "train_results.json", "eval_results.json")  # fmt: skip
"""Files that are made anew, or that speak of other weights."""
TEMPLATES = "additional_chat_templates"


def write_companions(network: Any, tokenizer: Any, source: Path | None, folder: Path) -> None:
    """Fill a folder with all that belongs to a network beside config.json and weights.

    Args:
        network: whose settings for generating are written where the source has none in a file.
        tokenizer: written where there is no source.
        source: the checkpoint folder that both were opened from; None for a model in memory or from GGUF.
        folder: where to.
    """
    if source is None:
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    else:
        _copy(source, folder)
    settings = getattr(network, "generation_config", None)
    if settings is not None and not _says(folder, settings):
        # not by save_pretrained, which refuses or changes combinations that are allowed on opening
        settings.to_json_file(folder / GENERATION, use_diff=True, keys_to_pop=["compile_config"])


def _copy(source: Path, folder: Path) -> None:
    if not source.is_dir():
        raise PrunelensError(f"expected the checkpoint {source} to be still there, found it gone; open the model again")
    for file in sorted(source.iterdir()):
        if file.is_file() and _belongs(file.name):
            shutil.copyfile(file, folder / file.name)
    if (source / TEMPLATES).is_dir():
        shutil.copytree(source / TEMPLATES, folder / TEMPLATES, copy_function=shutil.copyfile)


def _says(folder: Path, settings: Any) -> bool:
    """Whether the file that was copied holds these settings, which may have been changed since."""
    if not (folder / GENERATION).is_file():
        return False
    copied = GenerationConfig.from_pretrained(folder).to_dict()
    return _lasting(copied) == _lasting(settings.to_dict())


def _lasting(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != "transformers_version" and not key.startswith("_")}


def save_weights(network: Any, folder: Path) -> None:
    """Write weights and config.json; the settings for generating are left to `write_companions`."""
    settings = getattr(network, "generation_config", None)
    try:
        if settings is not None:
            network.generation_config = GenerationConfig()  # others may be refused
        with quiet():
            network.save_pretrained(folder)
    finally:
        if settings is not None:
            network.generation_config = settings
    (folder / GENERATION).unlink(missing_ok=True)


def _belongs(name: str) -> bool:
    if name.upper().startswith(LEGAL):
        return True
    return name.endswith(SUFFIXES) and name not in OTHERS and ".index." not in name
