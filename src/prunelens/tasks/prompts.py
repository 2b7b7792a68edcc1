"""What models are asked: prompts from a file or the built-in core set, as they are written."""

from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from prunelens.documents import parse_json
from prunelens.errors import PrunelensError, check_keys, check_whole, nearest, shown
from prunelens.reading import read_lines

CORE = "core"
KEYS = ("prompt", "messages", "id", "kind", "options", "answer")
MESSAGE_KEYS = ("role", "content")
ROLES = ("system", "developer", "user", "assistant", "tool")
WHAT = "a prompt file (UTF-8 text or JSONL)"


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
        PrunelensError: no such file, nothing in it, a malformed line, an unknown key, an answer that is no option, an
            id given twice, or a limit below 1.
    """
    if limit is not None:
        check_whole("--num-prompts", limit, 1)
    is_core = str(source) == CORE
    path = resources.files("prunelens.tasks").joinpath("core_prompts.jsonl") if is_core else source
    found = _parse_file(Path(str(path)), CORE if is_core else str(source))
    if not found:
        raise PrunelensError(f"expected at least one prompt in {source}, found none")
    seen: set[str] = set()
    for prompt in found:
        if prompt.prompt_id in seen:
            raise PrunelensError(f"{prompt.where}: the id {prompt.prompt_id!r} is given twice")
        seen.add(prompt.prompt_id)
    return found[:limit]


def _parse_file(path: Path, name: str) -> list[PromptText]:
    lines = [(f"{name}:{where.rpartition(':')[2]}", line.strip()) for where, line in read_lines(path, WHAT)]
    if path.suffix in (".jsonl", ".json"):
        return [_parse_record(parse_json(line, where, "a JSON object"), where) for where, line in lines]
    return [
        PromptText(f"line-{_number(where)}", "text", ({"role": "user", "content": line},), where=where)
        for where, line in lines
    ]


def _number(where: str) -> str:
    return where.rpartition(":")[2]


def _parse_record(record: Any, where: str) -> PromptText:
    if not isinstance(record, dict):
        raise PrunelensError(f'{where}: expected a JSON object with "prompt" or "messages", found {shown(record)}')
    check_keys(record, KEYS, where)
    if ("prompt" in record) == ("messages" in record):
        raise PrunelensError(f'{where}: expected an object with either "prompt" or "messages"')
    given = record["messages"] if "messages" in record else [{"role": "user", "content": record["prompt"]}]
    messages = _messages(given, where)
    options = _options(record.get("options", []), where)
    name, kind, answer = (record.get(key) for key in ("id", "kind", "answer"))
    if name is not None and (isinstance(name, bool) or not isinstance(name, str | int)):
        raise PrunelensError(f"{where}: expected text or a whole number as id, found {shown(name)}")
    if kind is not None and not isinstance(kind, str):
        raise PrunelensError(f"{where}: expected text as kind, found {shown(kind)}; put it in quotes")
    if answer is not None and (isinstance(answer, bool) or not isinstance(answer, str | int | float)):
        raise PrunelensError(f"{where}: expected text or a number as answer, found {shown(answer)}")
    answer = None if answer is None else str(answer)
    if options and answer is not None and answer not in options:
        raise PrunelensError(
            f"{where}: expected the text of one of the options as answer, found {shown(answer)}"
            f"{nearest(answer, options)}"
        )
    return PromptText(
        prompt_id=f"line-{_number(where)}" if name is None else str(name),
        kind=kind or ("multiple_choice" if options else "text"),
        messages=messages,
        options=options,
        answer=answer,
        where=where,
    )


def _messages(given: Any, where: str) -> tuple[dict[str, str], ...]:
    if not isinstance(given, list) or not given or not all(isinstance(message, dict) for message in given):
        raise PrunelensError(f"{where}: expected text in a list of messages (role, content), found {shown(given)}")
    for message in given:
        check_keys(message, MESSAGE_KEYS, f"{where}: in a message")
        if not all(isinstance(message.get(key), str) for key in MESSAGE_KEYS):
            raise PrunelensError(f"{where}: expected text in the prompt or in each message (role, content)")
        if message["role"] not in ROLES:
            raise PrunelensError(
                f"{where}: expected a role of {', '.join(ROLES)}, found {shown(message['role'])}"
                f"{nearest(message['role'], ROLES)}"
            )
    return tuple({key: message[key] for key in MESSAGE_KEYS} for message in given)


def _options(given: Any, where: str) -> tuple[str, ...]:
    if not isinstance(given, list) or not all(isinstance(item, str) and item.strip() for item in given):
        raise PrunelensError(f"{where}: expected a list of texts as options")
    if len(given) == 1:
        raise PrunelensError(f"{where}: expected at least two options, found one")
    twice = next((item for item in given if given.count(item) > 1), None)
    if twice is not None:
        raise PrunelensError(f"{where}: the option {shown(twice)} is given twice; name each once")
    return tuple(given)
