"""Chat templates as programs: whatever they do, one sentence comes back, and nothing else of the process changes."""

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from conftest import text_model, text_tokenizer
from prunelens.errors import PrunelensError
from prunelens.tasks import rendering
from prunelens.tasks.encoding import encode
from prunelens.tasks.prompts import PromptText
from prunelens.tasks.rendering import MAX_CHARACTERS, Unrendered, render

CHAT = [{"role": "user", "content": "hi"}]
LOOPS = {
    "empty": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "counting": "{% set n = namespace(x=0) %}{% for i in range(99999) %}{% for j in range(99999) %}"
    "{% set n.x = n.x + 1 %}{% endfor %}{% endfor %}",
    "inside one call": "{{ 9 ** (9 ** 9) }}",
    "while it is compiled": "{{ (7 ** 7 ** 7) ** (7 ** 7) }}",
}
RAISES = {
    "{{ raise_exception('never') }}": "never",
    "{% if %}": "Expected an expression",
    "{{ messages[0].a.b }}": "no attribute 'a'",
    "{{ 1 / 0 }}": "division by zero",
    "{{ messages + 3 }}": "concatenate",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "recursion",
    "{{ messages.append(3) }}": "unsafe",
    "{% include 'other' %}": "loader",
    "{{ 'x' | nofilter }}": "nofilter",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}": "",
}


def templated(template: str) -> Any:
    tokenizer = text_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "SECONDS", 0.5)


@pytest.mark.parametrize("template", RAISES, ids=lambda text: text[:30])
def test_whatever_a_template_raises_is_a_reason(template: str) -> None:
    first, second = render(templated(template), [CHAT, CHAT])
    assert isinstance(first, Unrendered)
    assert RAISES[template] in first.reason
    assert 0 < len(first.reason) <= 200
    assert "\n" not in first.reason
    assert second == first
    model = text_model()
    model.tokenizer.chat_template = template
    with pytest.raises(
        PrunelensError, match=r"^the chat template of text-llama fails on prompt 'p' \(.+--no-chat-templ"
    ):
        encode([PromptText("p", "text", tuple(CHAT))], model, True, 4)


@pytest.mark.parametrize("case", LOOPS)
def test_a_template_that_does_not_end_is_stopped(case: str, short: None) -> None:
    found = render(templated(LOOPS[case]), [CHAT, CHAT, CHAT])
    assert found == [Unrendered("it did not end within 0.5 s of processor time", stopped=True)] * 3


def test_what_was_rendered_before_it_is_kept(short: None) -> None:
    template = "{% if messages[0].content == 'loop' %}" + LOOPS["empty"] + "{% endif %}{{ messages[0].content }}"
    chats = [[{"role": "user", "content": text}] for text in ("a", "b", "loop", "c")]
    found = render(templated(template), chats)
    assert found[:2] == ["a", "b"]
    assert [isinstance(one, Unrendered) and one.stopped for one in found[2:]] == [True, True]


def test_it_is_stopped_in_a_thread_and_leaves_other_threads_and_children_alone(short: None) -> None:
    found: list[Any] = []
    ticks: list[int] = []
    done = threading.Event()

    def tick() -> None:
        while not done.wait(0.01):
            ticks.append(1)

    other = os.fork()
    if other == 0:
        signal.pause()
    ticking = threading.Thread(target=tick)
    ticking.start()
    working = threading.Thread(target=lambda: found.extend(render(templated(LOOPS["empty"]), [CHAT])))
    working.start()
    working.join(60)
    done.set()
    ticking.join()
    assert found[0].stopped
    assert len(ticks) > 5
    assert os.waitpid(other, os.WNOHANG) == (0, 0)
    os.kill(other, signal.SIGKILL)
    os.waitpid(other, 0)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ 'x' * 10 ** 11 }}", "it needs more than 1024 MiB"),
        ("{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}", "1024 MiB"),
        ("{{ 'x' * " + str(MAX_CHARACTERS + 1) + " }}", "it writes more than 16,777,216 characters"),
    ],
)
def test_memory_and_output_are_bounded(template: str, reason: str) -> None:
    (found,) = render(templated(template), [CHAT])
    assert isinstance(found, Unrendered)
    assert reason in found.reason
    assert found.stopped
    assert render(templated("{{ 'x' * " + str(MAX_CHARACTERS) + " }}"), [CHAT]) == ["x" * MAX_CHARACTERS]


def test_a_crash_of_its_process_is_a_reason() -> None:
    class Crashing:
        def apply_chat_template(self, *args: Any, **options: Any) -> str:
            os.kill(os.getpid(), signal.SIGUSR1)
            return ""

    assert render(Crashing(), [CHAT]) == [Unrendered("it crashed its process", stopped=True)]


def children() -> set[str]:
    """Processes that this one has started and not waited for, where the system tells."""
    return {pid for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()}


def test_nothing_of_this_process_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPROF)]
    opened = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else None
    others = children()
    assert render(templated("{{ messages[0].content }}"), [CHAT] * 3) == ["hi"] * 3
    assert "TOKENIZERS_PARALLELISM" not in os.environ
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPROF)] == handlers
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert opened is None or len(os.listdir("/proc/self/fd")) == opened
    assert children() <= others


def test_half_pairs_and_long_texts_come_through() -> None:
    texts = ["\ud800", "ä" * 1_000_000, ""]
    chats = [[{"role": "user", "content": text}] for text in texts]
    assert render(templated("{{ messages[0].content }}"), chats) == texts


def test_systems_that_cannot_fork_render_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "fork")
    assert render(templated("{{ messages[0].content }}"), [CHAT]) == ["hi"]
    found = render(templated("{{ 'x' * " + str(MAX_CHARACTERS + 1) + " }}"), [CHAT, CHAT])
    assert [one.stopped for one in found if isinstance(one, Unrendered)] == [True, True]


def test_where_no_process_can_be_started_it_renders_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> int:
        raise BlockingIOError

    monkeypatch.setattr(os, "fork", refuse)
    assert render(templated("{{ messages[0].content }}"), [CHAT]) == ["hi"]
