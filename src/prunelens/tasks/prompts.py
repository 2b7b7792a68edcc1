"""What models are asked: prompts from a file or the built-in core set, as they are written."""

import json
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from prunelens.errors import PrunelensError, has_half_pair

CORE = "core"


@dataclass(frozen=True)
class PromptText:
    """A prompt as written: `messages` in chat form (one user message for plain text)."""

    prompt_id: str
    kind: str
    messages: tuple[dict[str, str], ...]
    options: tuple[str, ...] = ()
    answer: str | None = None
    where: str = ""

    @property
    def text(self) -> str:
        """The text without any template."""
        return "\n".join(message["content"] for message in self.messages)


@dataclass(frozen=True)
class Prompt:
    """A prompt as fed to the models.

    `option_ids` are the first tokens of the options' continuations, empty where there are none or where
    `options_problem` says why they cannot be told apart. `notes` are remarks on how it is read.
    """

    prompt_id: str
    kind: str
    text: str
    token_ids: tuple[int, ...]
    options: tuple[str, ...] = ()
    option_ids: tuple[int, ...] = ()
    answer: str | None = None
    options_problem: str | None = field(default=None, compare=False)
    notes: tuple[str, ...] = field(default=(), compare=False)


def prompts(source: str | Path = CORE, limit: int | None = None) -> list[PromptText]:
    """Read prompts: `core` (48 built-in ones), a JSONL file (`prompt` or `messages`), or plain text, one a line.

    Args:
        source: "core" or a path.
        limit: keep only the first so many.

    Raises:
        PrunelensError: no such file, nothing in it, a malformed line, or an id given twice.
    """
    if str(source) == CORE:
        text = resources.files("prunelens.tasks").joinpath("core_prompts.jsonl").read_text(encoding="utf-8")
        found = _parse_jsonl(text, CORE)
    else:
        found = _parse_file(Path(source))
    if not found:
        raise PrunelensError(f"expected at least one prompt in {source}, found none")
    seen: set[str] = set()
    for prompt in found:
        if prompt.prompt_id in seen:
            raise PrunelensError(f"{prompt.where}: the id {prompt.prompt_id!r} is given twice")
        seen.add(prompt.prompt_id)
    return found[:limit]


def _parse_file(path: Path) -> list[PromptText]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise PrunelensError(f"expected a prompt file (UTF-8 text or JSONL) at {path}: {error}") from error
    if path.suffix in (".jsonl", ".json"):
        return _parse_jsonl(text, str(path))
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    return [
        PromptText(f"line-{number}", "text", ({"role": "user", "content": line},), where=f"{path}:{number}")
        for number, line in lines
    ]


def _parse_jsonl(text: str, path: str) -> list[PromptText]:
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise PrunelensError(f"{where}: expected a JSON object, found {line.strip()[:60]!r}") from error
        found.append(_parse_record(record, where, number))
    return found


def _parse_record(record: Any, where: str, number: int) -> PromptText:
    if not isinstance(record, dict) or ("prompt" in record) == ("messages" in record):
        raise PrunelensError(f'{where}: expected an object with either "prompt" or "messages"')
    messages = record.get("messages") or [{"role": "user", "content": record.get("prompt")}]
    if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
        raise PrunelensError(f"{where}: expected text in the prompt or in each message (role, content)")
    options = record.get("options", [])
    if not isinstance(options, list) or not all(isinstance(item, str) and item for item in options):
        raise PrunelensError(f"{where}: expected a list of texts as options")
    if len(options) == 1:
        raise PrunelensError(f"{where}: expected at least two options, found one")
    name, kind, answer = (record.get(key) for key in ("id", "kind", "answer"))
    written = (*options, *(message["content"] for message in messages), str(name), str(kind), str(answer))
    if any(has_half_pair(part) for part in written):
        raise PrunelensError(f"{where}: expected text, found half of a surrogate pair (\\ud800 to \\udfff)")
    return PromptText(
        prompt_id=f"line-{number}" if name is None else str(name),
        kind=str(kind or ("multiple_choice" if options else "text")),
        messages=tuple({"role": message["role"], "content": message["content"]} for message in messages),
        options=tuple(options),
        answer=None if answer is None else str(answer),
        where=where,
    )


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
