"""Chats as the text of a template, with the proof that the template let every message through."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prunelens.tasks.rendering import Unrendered, render

MARK = "QXZVJ"
"""Stands for each message where the template's own words are wanted."""
PRINTED_PART = re.compile(rf"text(['\"]|&#3[49];)\s*:\s*\1{MARK}", re.IGNORECASE)
"""What a marked part looks like where a template prints the part itself instead of its text."""

Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Lost:
    """What a template did not let through: the indices of the messages, or the reason why there is no text at all."""

    messages: tuple[int, ...] = ()
    reason: str = ""
    stopped: bool = False


def render_whole(tokenizer: Any, chats: Sequence[Messages]) -> list[str | Lost]:
    """The rendered text of each chat, in which every message's text stands, or what was lost.

    A message counts as present where its text, without white space at its ends, stands letter for letter (or escaped as
    in JSON) at a place of its own, which is not one of the template's own words. Messages are given as text; where that
    loses some, these are given as content parts, and then all of them: multimodal checkpoints expect parts.
    """
    found = _attempt(tokenizer, chats, [()] * len(chats))
    for everything in (False, True):
        again = [place for place, one in enumerate(found) if isinstance(one, Lost) and not one.stopped]
        if not again:
            break
        as_parts = [_all(chats[place]) if everything else _missing(found[place], chats[place]) for place in again]
        texts = _attempt(tokenizer, [chats[place] for place in again], as_parts)
        for place, text in zip(again, texts, strict=True):
            if isinstance(text, str) or text.stopped:
                found[place] = text
    return found


def _all(chat: Messages) -> tuple[int, ...]:
    return tuple(range(len(chat)))


def _missing(lost: str | Lost, chat: Messages) -> tuple[int, ...]:
    return (lost.messages if isinstance(lost, Lost) else ()) or _all(chat)


def _attempt(tokenizer: Any, chats: Sequence[Messages], as_parts: Sequence[tuple[int, ...]]) -> list[str | Lost]:
    """Render each chat, its messages of these indices as parts; and once more without its texts, to tell them apart."""
    asked: list[list[dict[str, Any]]] = []
    for chat, parts in zip(chats, as_parts, strict=True):
        for marked in (False, True):
            asked.append([_written(message, marked, index in parts) for index, message in enumerate(chat)])
    answers = render(tokenizer, asked)
    found: list[str | Lost] = []
    for chat, parts, text, marked_text in zip(chats, as_parts, answers[::2], answers[1::2], strict=True):
        frame = marked_text if isinstance(marked_text, str) else ""
        if isinstance(text, Unrendered):
            found.append(Lost(reason=text.reason, stopped=text.stopped))
        elif parts and PRINTED_PART.search(frame):
            found.append(Lost(parts))
        else:
            lost = lost_messages([message["content"] for message in chat], text, frame)
            found.append(Lost(lost) if lost else text)
    return found


def _written(message: Mapping[str, str], marked: bool, as_parts: bool) -> dict[str, Any]:
    content = MARK if marked else message["content"]
    return {**message, "content": [{"type": "text", "text": content}] if as_parts else content}


def lost_messages(texts: Sequence[str], rendered: str, frame: str) -> tuple[int, ...]:
    """Indices of the texts that do not stand in what was rendered.

    Args:
        texts: the messages.
        rendered: what the template made of them.
        frame: what it makes of marks in their place; what stands there are its own words.
    """
    wanted = {index: text.strip() for index, text in enumerate(texts) if text.strip()}
    left = rendered
    lost: list[int] = []
    placed: dict[int, str] = {}
    for index, text in sorted(wanted.items(), key=lambda item: -len(item[1])):
        form = next((form for form in _forms(text) if form in left), None)
        if form is None:
            lost.append(index)
            continue
        left = left.replace(form, "\0", 1)
        placed[index] = form
    lost += [index for index, form in placed.items() if left.count(form) < frame.count(form)]
    return tuple(sorted(lost))


def _forms(text: str) -> tuple[str, ...]:
    return text, *(json.dumps(text, ensure_ascii=ascii_only)[1:-1] for ascii_only in (False, True))
