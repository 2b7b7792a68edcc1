"""What models are asked: prompts from a file or the built-in core set, as token ids with the chat template applied."""

from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from prunelens.errors import PrunelensError, check_keys, check_whole, nearest, shown
from prunelens.models.loading import Model
from prunelens.reading import parse_json, read_lines

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
