"""What models are asked: prompts from a file or the built-in core set, as token ids with the chat template applied."""

import json
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from prunelens.errors import PrunelensError, has_half_pair
from prunelens.models.loading import Model

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
    `options_problem` says why they cannot be told apart.
    """

    prompt_id: str
    kind: str
    text: str
    token_ids: tuple[int, ...]
    options: tuple[str, ...] = ()
    option_ids: tuple[int, ...] = ()
    answer: str | None = None
    options_problem: str | None = field(default=None, compare=False)


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


def encode(texts: list[PromptText], model: Model, chat_template: bool, max_new_tokens: int) -> list[Prompt]:
    """Token ids of the prompts, with the chat template where the tokenizer has one and it is wanted.

    Raises:
        PrunelensError: no tokenizer, a prompt without tokens, or one that does not fit the context.
    """
    if model.tokenizer is None:
        raise PrunelensError(f"{model.name} has no tokenizer; put its tokenizer files beside config.json")
    use_template = chat_template and getattr(model.tokenizer, "chat_template", None) is not None
    return [_encode(text, model, use_template, max_new_tokens) for text in texts]


def _encode(text: PromptText, model: Model, use_template: bool, max_new_tokens: int) -> Prompt:
    tokenizer = model.tokenizer
    if use_template:
        rendered = _rendered(text, model)
        ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    else:
        rendered = text.text
        ids = tokenizer(rendered)["input_ids"]
    name = f"prompt {text.prompt_id!r}"
    if not text.text.strip() or not ids:
        raise PrunelensError(f"{text.where or name}: expected a prompt with text, found none in {name}")
    num_known = model.network.get_input_embeddings().weight.shape[0]
    if max(ids) >= num_known:
        raise PrunelensError(
            f"{name} has the token id {max(ids)}, but {model.name} knows {num_known} tokens; its tokenizer belongs to "
            "another model"
        )
    limit = model.context_length
    if limit is not None and len(ids) + max_new_tokens > limit:
        raise PrunelensError(
            f"{name} has {len(ids)} tokens; with {max_new_tokens} new ones it exceeds the context of {limit} "
            f"tokens of {model.name}; shorten it or lower --max-new-tokens"
        )
    option_ids, problem = _option_ids(text, tokenizer, rendered, list(ids))
    if any(token >= num_known for token in option_ids):
        option_ids, problem = (), f"an option begins with a token that {model.name} does not know"
    return Prompt(text.prompt_id, text.kind, text.text, tuple(ids), text.options, option_ids, text.answer, problem)


def _rendered(text: PromptText, model: Model) -> str:
    from jinja2 import TemplateError

    try:
        return model.tokenizer.apply_chat_template(list(text.messages), tokenize=False, add_generation_prompt=True)
    except (TemplateError, TypeError, ValueError) as error:
        raise PrunelensError(
            f"the chat template of {model.name} fails on prompt {text.prompt_id!r} ({error}); mend it, or pass "
            "--no-chat-template"
        ) from error


def _option_ids(text: PromptText, tokenizer: Any, rendered: str, ids: list[int]) -> tuple[tuple[int, ...], str | None]:
    """The first token of each option when it continues the prompt."""
    if not text.options:
        return (), None
    space = "" if rendered[-1:].isspace() else " "
    found = []
    for option in text.options:
        whole = tokenizer(rendered + space + option, add_special_tokens=False)["input_ids"]
        start = len(ids)
        if whole[:start] != ids:  # special tokens in front, or a merge across the border
            alone = tokenizer(space + option, add_special_tokens=False)["input_ids"]
            whole, start = alone, 0
        if len(whole) <= start:
            return (), f"option {option!r} has no token of its own"
        found.append(whole[start])
    if len(set(found)) < len(found):
        return (), "two options begin with the same token"
    return tuple(found), None


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
