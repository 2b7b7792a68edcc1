"""The chat template of a folder that keeps it with its processor, not with its tokenizer."""

from pathlib import Path
from typing import Any

from prunelens.errors import PrunelensError
from prunelens.models.opening.json_files import read_object

PROCESSOR_TEMPLATE = "chat_template.json"


def add_processor_template(tokenizer: Any, folder: Path) -> None:
    """Give a tokenizer without a chat template the one of the processor beside it (older multimodal checkpoints).

    Raises:
        PrunelensError: the file holds no template.
    """
    path = folder / PROCESSOR_TEMPLATE
    if getattr(tokenizer, "chat_template", None) is not None or not path.is_file():
        return
    found = read_object(path).get("chat_template")
    if not isinstance(found, str):
        raise PrunelensError(f'expected a JSON object with "chat_template" as text in {path}; fix or remove the file')
    tokenizer.chat_template = found
