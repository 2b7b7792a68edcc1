"""Prompts as token ids: the chat template applied, nothing of the text lost, and nothing behind it that ends it."""

from collections.abc import Sequence
from typing import Any

from prunelens.errors import PrunelensError
from prunelens.models.model import Model
from prunelens.models.texts import text_ids
from prunelens.tasks.chats import Lost, render_whole
from prunelens.tasks.prompts import Prompt, PromptText

WITHOUT_TEMPLATE = "pass --no-chat-template"
SHOWN = 3


def encode(
    texts: Sequence[PromptText],
    model: Model,
    chat_template: bool,
    max_new_tokens: int,
    instead: str = WITHOUT_TEMPLATE,
) -> list[Prompt]:
    """Token ids of the prompts, with the chat template where the tokenizer has one and it is wanted.

    Args:
        texts: what is asked.
        model: whose tokenizer and template read it.
        chat_template: whether the template is wanted.
        max_new_tokens: so many must fit into the context behind each prompt.
        instead: what a user can do where the template cannot be used.

    Raises:
        PrunelensError: no tokenizer, a prompt without tokens, one that does not fit the context, or a chat template
            that fails, does not end, or loses text of a message.
    """
    found: list[Prompt] = []
    for one in encode_each(texts, model, chat_template, max_new_tokens, instead):
        if isinstance(one, PrunelensError):
            raise one
        found.append(one)
    return found


def encode_each(
    texts: Sequence[PromptText],
    model: Model,
    chat_template: bool,
    max_new_tokens: int,
    instead: str = WITHOUT_TEMPLATE,
) -> list[Prompt | PrunelensError]:
    """As `encode`, with what is wrong with a prompt in its place instead of raised."""
    if model.tokenizer is None:
        return [PrunelensError(f"{model.name} has no tokenizer; put its tokenizer files beside config.json")] * len(
            texts
        )
    use_template = chat_template and getattr(model.tokenizer, "chat_template", None) is not None
    faults = [_fault(text, model, max_new_tokens) for text in texts]
    sound = [text for text, fault in zip(texts, faults, strict=True) if fault is None]
    chats: list[str | Lost | None] = [None] * len(sound)
    if use_template:
        chats[:] = render_whole(model.tokenizer, [text.messages for text in sound])
    made = iter([_made(text, chat, model, max_new_tokens, instead) for text, chat in zip(sound, chats, strict=True)])
    return [next(made) if fault is None else fault for fault in faults]


def prompt_notes(prompts: Sequence[Prompt]) -> list[str]:
    """What a reader of results on these prompts should know of how they were read."""
    named: dict[str, list[str]] = {}
    for prompt in prompts:
        for note in prompt.notes:
            named.setdefault(note, []).append(prompt.prompt_id)
    notes = [f"{_listed(names)}: {note}" for note, names in named.items()]
    texts: dict[tuple[int, ...], set[str]] = {}
    for prompt in prompts:
        texts.setdefault(prompt.token_ids, set()).add(prompt.text)
    alike = [prompt.prompt_id for prompt in prompts if len(texts[prompt.token_ids]) > 1]
    if alike:
        notes.append(f"{_listed(alike)}: texts that the tokenizer cannot tell apart, they have the same token ids")
    return notes


def _listed(names: Sequence[str]) -> str:
    shown, more = ", ".join(repr(name) for name in names[:SHOWN]), len(names) - SHOWN
    return ("prompt " if len(names) == 1 else "prompts ") + shown + (f" and {more} more" if more > 0 else "")


def _fault(text: PromptText, model: Model, max_new_tokens: int) -> PrunelensError | None:
    """What is wrong with a prompt before any template."""
    name = f"prompt {text.prompt_id!r}"
    if not text.text.strip():
        return PrunelensError(f"{text.where or name}: expected a prompt with text, found none in {name}")
    least = _least_tokens(text.text, model)
    if least is not None:
        return _too_long(text, f"more than {least}", model, max_new_tokens)
    if not _own_ids(text, model):
        return PrunelensError(
            f"{text.where or name}: expected a prompt with text, found no token for the text of {name}"
        )
    return None


def _least_tokens(text: str, model: Model) -> int | None:
    """A number of tokens that a text surely exceeds, where it is far too long for the context; reads its start only."""
    limit = model.context_length
    if limit is None:
        return None
    enough, end = 2 * limit + 64, 16 * limit
    while end < len(text):  # a start with twice what fits: no merge across its end takes half of it back
        if len(model.tokenizer(text[:end], add_special_tokens=False, verbose=False)["input_ids"]) > enough:
            return limit
        end *= 2
    return None


def _too_long(text: PromptText, count: str, model: Model, max_new_tokens: int) -> PrunelensError:
    return PrunelensError(
        f"prompt {text.prompt_id!r} has {count} tokens; with {max_new_tokens} new ones it exceeds the context of "
        f"{model.context_length} tokens of {model.name}; shorten it or lower --max-new-tokens"
    )


def _made(
    text: PromptText, chat: str | Lost | None, model: Model, max_new_tokens: int, instead: str
) -> Prompt | PrunelensError:
    if isinstance(chat, Lost):
        return _untold(text, chat, model, instead)
    rendered = text.text if chat is None else chat
    ids = _ids(rendered, chat is not None, model)
    known = model.network.get_input_embeddings().weight.shape[0]
    if max(ids) >= known:
        return PrunelensError(
            f"prompt {text.prompt_id!r} has the token id {max(ids)}, but {model.name} knows {known} tokens; its "
            "tokenizer belongs to another model"
        )
    limit = model.context_length
    if limit is not None and len(ids) + max_new_tokens > limit:
        return _too_long(text, str(len(ids)), model, max_new_tokens)
    option_ids, problem = _option_ids(text, model, rendered, chat is not None, ids)
    if any(token >= known for token in option_ids):
        option_ids, problem = (), f"an option begins with a token that {model.name} does not know"
    notes = _notes(text, model, ids, chat is not None)
    return Prompt(
        text.prompt_id, text.kind, text.text, tuple(ids), text.options, option_ids, text.answer, problem, notes
    )


def _untold(text: PromptText, lost: Lost, model: Model, instead: str) -> PrunelensError:
    start, name = f"the chat template of {model.name}", f"prompt {text.prompt_id!r}"
    if lost.reason:
        return PrunelensError(f"{start} fails on {name} ({lost.reason}); fix it, or {instead}")
    first = lost.messages[0]
    role = text.messages[first]["role"]
    which = (
        f"message {first + 1} (role {role!r}) of {name}" if len(text.messages) > 1 else f"the {role} message of {name}"
    )
    return PrunelensError(
        f"{start} leaves out or changes the text of {which}; write the prompt without what it drops, fix the "
        f"template, or {instead}"
    )


def _ids(rendered: str, from_template: bool, model: Model) -> list[int]:
    """A template writes its special tokens itself; else they are the tokenizer's."""
    if from_template:
        return list(model.tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"])
    return text_ids(model, rendered)


def _own_ids(text: PromptText, model: Model) -> list[int]:
    return list(model.tokenizer(text.text, add_special_tokens=False, verbose=False)["input_ids"])


def _option_ids(
    text: PromptText, model: Model, rendered: str, from_template: bool, ids: list[int]
) -> tuple[tuple[int, ...], str | None]:
    """The first token of each option when it continues the prompt."""
    if not text.options:
        return (), None
    space = "" if rendered[-1:].isspace() else " "
    found = []
    for option in text.options:
        whole, start = _ids(rendered + space + option, from_template, model), len(ids)
        if whole[:start] != ids:  # a merge across the border
            whole, start = list(model.tokenizer(space + option, add_special_tokens=False)["input_ids"]), 0
        if len(whole) <= start:
            return (), f"option {option!r} has no token of its own"
        found.append(whole[start])
    if len(set(found)) < len(found):
        return (), "two options begin with the same token"
    return tuple(found), None


def _notes(text: PromptText, model: Model, ids: list[int], from_template: bool) -> tuple[str, ...]:
    tokenizer, notes = model.tokenizer, []
    written = [token for token in _special_tokens(tokenizer) if token in text.text]
    if written:
        notes.append(f"the text holds {', '.join(map(repr, written))}, which is read as a special token")
    own, unknown = _own_ids(text, model), tokenizer.unk_token_id
    if unknown is not None and own.count(unknown) > text.text.count(str(tokenizer.unk_token)):
        share = "none" if set(own) == {unknown} else "not all"
        notes.append(f"{share} of the text is known to the tokenizer, which reads {str(tokenizer.unk_token)!r} instead")
    if from_template and ids[-1] in model.eos_ids:
        end = str(tokenizer.convert_ids_to_tokens(ids[-1]))
        notes.append(f"the chat template of {model.name} opens no answer, its last token {end!r} ends a text")
    if from_template and text.messages[-1]["role"] == "assistant":
        notes.append("the answer at the end is not continued, the chat template opens another one")
    return tuple(notes)


def _special_tokens(tokenizer: Any) -> list[str]:
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return sorted({*map(str, tokenizer.all_special_tokens), *added})
