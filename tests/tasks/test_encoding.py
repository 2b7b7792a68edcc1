"""What a model reads of a prompt: chat templates that lose text, tokenizers that end it, texts that cannot be read."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from conftest import text_model, text_network, text_tokenizer, tiny_model, tiny_network, words
from prunelens.api import compare, evaluate
from prunelens.errors import PrunelensError
from prunelens.models.model import Model
from prunelens.models.opening.loading import load, wrap
from prunelens.models.texts import added_ending, text_ids, texts_ids
from prunelens.progress import silent
from prunelens.study.calibration_texts import own_texts, repair_texts
from prunelens.study.evaluate.measure import TaskRunner, TaskSettings
from prunelens.tasks.chats import lost_messages
from prunelens.tasks.encoding import encode, encode_each, prompt_notes
from prunelens.tasks.prompts import Prompt, PromptText
from prunelens.tasks.suite import parse_tasks

LOOP = "{% for m in messages %}"
END = "{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
PLAIN = LOOP + "[{{ m.role[0] }}]{{ m.content }}" + END
PART = "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% elif p.type == 'image' %}<image>{% endif %}"
PARTS = LOOP + "[{{ m.role[0] }}]" + PART + "{% endfor %}" + END
EITHER = (
    LOOP + "[{{ m.role[0] }}]{% if m.content is string %}S{{ m.content }}{% else %}" + PART + "{% endfor %}{% endif %}"
) + END
CHAT = (("system", "Be brief."), ("user", "What is rain?"), ("assistant", "Water."), ("user", "And snow?"))


def chat_model(template: Any = None) -> Model:
    model = text_model()
    model.tokenizer.chat_template = template
    return model


def messages(*turns: tuple[str, str]) -> tuple[dict[str, str], ...]:
    return tuple({"role": role, "content": content} for role, content in turns)


def asked(*turns: tuple[str, str], name: str = "p", **values: Any) -> PromptText:
    return PromptText(name, "text", messages(*turns), **values)


def read(model: Model, *turns: tuple[str, str], **values: Any) -> str:
    """What the model reads of one chat, as text."""
    (prompt,) = encode([asked(*turns, **values)], model, True, 4)
    return str(model.tokenizer.decode(prompt.token_ids))


# --- templates that take text, parts, or either ------------------------------------------------------------


def test_parts_are_sent_where_parts_are_expected() -> None:
    model = chat_model(PARTS)
    assert read(model, ("user", "What is rain?")) == "[u]What is rain?[a]"
    assert read(model, *CHAT) == "[s]Be brief.[u]What is rain?[a]Water.[u]And snow?[a]"
    texts = [asked(("user", text), name=text) for text in ("one?", "two?", "six?")]
    found = encode(texts, model, True, 4)
    assert len({prompt.token_ids for prompt in found}) == 3
    assert [prompt.text for prompt in found] == ["one?", "two?", "six?"]


@pytest.mark.parametrize(
    "content",
    [
        "{{ m.content[0].text }}",
        "{{ m.content[0]['text'] | trim }}",
        "{{ m.content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('') }}",
        "{% for p in m.content %}{{ p['text'] }}{% endfor %}",
        "{% if m.content is string %}{{ raise_exception('expected parts') }}{% endif %}{{ m.content[0].text }}",
        "{% if m.role == 'system' %}{{ m.content }}{% else %}{{ m.content[0].text }}{% endif %}",
        "{% if m.role == 'system' %}{{ m.content[0].text }}{% else %}{{ m.content }}{% endif %}",
    ],
)
def test_parts_are_sent_to_templates_of_every_kind(content: str) -> None:
    model = chat_model(LOOP + "[{{ m.role[0] }}]" + content + END)
    assert read(model, *CHAT) == "[s]Be brief.[u]What is rain?[a]Water.[u]And snow?[a]"


def test_templates_that_take_both_get_text() -> None:
    assert read(chat_model(EITHER), *CHAT) == "[s]SBe brief.[u]SWhat is rain?[a]SWater.[u]SAnd snow?[a]"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ messages[0].content | trim }}" + END.removeprefix("{% endfor %}"), "hi\n there[a]"),
        ("{{ messages[0].content | tojson }}", '" hi\\n there "'),
        ("{{ messages[0].content }}, again: {{ messages[0].content }}", " hi\n there , again:  hi\n there "),
    ],
)
def test_what_counts_as_present(template: str, expected: str) -> None:
    assert read(chat_model(template), ("user", " hi\n there ")) == expected


def test_a_system_message_folded_into_the_first_or_the_last_turn_is_present() -> None:
    first = (
        LOOP + "{% if loop.index0 == 1 %}[u]{{ messages[0].content }} {{ m.content }}"
        "{% elif loop.index0 > 1 %}[{{ m.role[0] }}]{{ m.content }}{% endif %}"
    ) + END
    assert read(chat_model(first), *CHAT) == "[u]Be brief. What is rain?[a]Water.[u]And snow?[a]"
    last = (
        LOOP + "{% if m.role != 'system' %}[{{ m.role[0] }}]{% if loop.last %}{{ messages[0].content }} {% endif %}"
        "{{ m.content }}{% endif %}"
    ) + END
    assert read(chat_model(last), *CHAT) == "[u]What is rain?[a]Water.[u]Be brief. And snow?[a]"


LOSING = {
    "system ignored": (LOOP + "{% if m.role != 'system' %}{{ m.content }}{% endif %}" + END, "message 1 .*'system'"),
    "only the last": ("[u]{{ messages[-1].content }}[a]", "message 1 .*'system'"),
    "only the first": ("[u]{{ messages[0].content }}[a]", "message 2 .*'user'"),
    "answers ignored": (LOOP + "{% if m.role != 'assistant' %}{{ m.content }}{% endif %}" + END, "message 3 .*'assist"),
    "cut": (LOOP + "{{ m.content[:9] }}|" + END, "message 2 .*'user'"),
    "upper": (LOOP + "{{ m.content | upper }}|" + END, "message 1 .*'system'"),
    "replaced": (LOOP + "{{ m.content | replace(' is ', ' was ') }}|" + END, "message 2 .*'user'"),
    "escaped": (LOOP + "{{ (m.content ~ '<') | e }}{{ m.content | replace('?', '') }}|" + END, None),
    "nothing": ("", "message 1 .*'system'"),
    "only its own words": ("What is this?", "message 1 .*'system'"),
    "another key": (LOOP + "{{ m.text }}{{ m.value }}" + END, "message 1 .*'system'"),
    "only parts of images": (LOOP + "{% for p in m.content if p.type == 'image' %}{{ p }}{% endfor %}" + END, "1 .*"),
    "cut, and parts printed": (
        LOOP + "{% if m.content is string %}?{% else %}{{ m.content }}{% endif %}" + END,
        "1 .*",
    ),
    "parts printed as JSON": (
        LOOP + "{% if m.content is string %}?{% else %}{{ m.content | tojson }}{% endif %}" + END,
        "1 .*",
    ),
}


@pytest.mark.parametrize("case", LOSING)
def test_a_template_that_loses_text_is_refused_by_name(case: str) -> None:
    template, where = LOSING[case]
    if where is None:  # the text stands there whole once more
        assert "Be brief." in read(chat_model(template), *CHAT)
        return
    said = (
        rf"^the chat template of text-llama leaves out or changes the text of message {where.removeprefix('message ')}"
    )
    with pytest.raises(PrunelensError, match=said + r".*of prompt 'p'; .*--no-chat-template$"):
        read(chat_model(template), *CHAT)


def test_reasoning_that_a_template_takes_out_of_past_answers_is_refused() -> None:
    template = LOOP + "[{{ m.role[0] }}]{{ m.content.split('</think>')[-1] }}" + END
    with pytest.raises(PrunelensError, match=r"message 2 .*'assistant'.*write the prompt without what it drops"):
        read(chat_model(template), ("user", "hi"), ("assistant", "<think>well</think>ho"), ("user", "and?"))
    assert read(chat_model(template), ("user", "hi"), ("assistant", "ho"), ("user", "and?")) == "[u]hi[a]ho[u]and?[a]"


def test_a_message_that_the_templates_own_words_hold_must_stand_there_besides() -> None:
    named = LOOP + "<{{ m.role }}>{% if m.role != 'system' %}{{ m.content }}{% endif %}" + END
    with pytest.raises(PrunelensError, match=r"message 1 \(role 'system'\)"):
        read(chat_model(named), ("system", "user"), ("user", "hi"))
    whole = LOOP + "<{{ m.role }}>{{ m.content }}" + END
    assert read(chat_model(whole), ("system", "user"), ("user", "hi")) == "<system>user<user>hi[a]"


def test_each_of_two_equal_messages_must_stand_there() -> None:
    with pytest.raises(PrunelensError, match="message"):
        read(chat_model("[u]{{ messages[-1].content }}[a]"), ("user", "hi"), ("assistant", "ho"), ("user", "hi"))
    with pytest.raises(PrunelensError, match="message 2"):
        read(chat_model("{{ messages[0].content }}"), ("user", "hi there"), ("user", "hi"))
    assert read(chat_model(PLAIN), ("user", "hi"), ("assistant", "hi"), ("user", "hi")) == "[u]hi[a]hi[u]hi[a]"


@pytest.mark.parametrize(
    ("texts", "rendered", "frame", "lost"),
    [
        (["a", "b"], "xaxb", "xxx", ()),
        (["a", "b"], "xax", "xxx", (1,)),
        (["a", "a"], "xax", "xx", (1,)),
        (["x"], "xx", "xx", (0,)),
        (["x"], "xxx", "xx", ()),
        ([" ", ""], "x", "x", ()),
        (["aa", "a"], "aa", "", (1,)),
        (["a\nb"], '"a\\nb"', '""', ()),
        (["ä"], "\\u00e4", "", ()),
        (["a  b"], "a b", "", (0,)),
    ],
)
def test_lost_messages(texts: list[str], rendered: str, frame: str, lost: tuple[int, ...]) -> None:
    assert lost_messages(texts, rendered, frame) == lost


def test_several_templates_by_name_are_read_as_the_library_does() -> None:
    assert read(chat_model({"default": PLAIN, "tool_use": "tools"}), ("user", "hi")) == "[u]hi[a]"
    with pytest.raises(PrunelensError, match=r"chat template of text-llama fails on prompt 'p' .*no default specified"):
        read(chat_model({"rag": PLAIN, "tool_use": PLAIN}), ("user", "hi"))


def test_a_template_that_opens_no_answer_is_told_where_its_prompt_ends_the_text() -> None:
    closed = LOOP + "{{ m.content }}<eos>{% endfor %}"
    (found,) = encode([asked(("user", "hi"))], chat_model(closed), True, 4)
    assert found.token_ids[-1] == 2  # the template's own: it stays
    assert prompt_notes([found]) == [
        "prompt 'p': the chat template of text-llama opens no answer; its last token '<eos>' ends a text"
    ]
    opened = closed + "{% if add_generation_prompt %}[a]{% endif %}"
    assert prompt_notes(encode([asked(("user", "hi"))], chat_model(opened), True, 4)) == []


def test_a_chat_that_ends_with_an_answer_is_told() -> None:
    (found,) = encode([asked(("user", "hi"), ("assistant", "ho"))], chat_model(PLAIN), True, 4)
    assert found.notes == ("the answer at the end is not continued; the chat template opens another one",)
    assert encode([asked(("user", "hi"), ("assistant", "ho"))], chat_model(), True, 4)[0].notes == ()


def test_a_template_beside_the_processor_is_the_tokenizers_where_that_has_none(tmp_path: Path) -> None:
    text_network().save_pretrained(tmp_path)
    text_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "chat_template.json"
    path.write_text(json.dumps({"chat_template": PARTS}))
    assert read(load(tmp_path), ("user", "hi")) == "[u]hi[a]"
    for damaged in ("[]", "{", '{"chat_template": 3}', "null"):
        path.write_text(damaged)
        with pytest.raises(PrunelensError, match=r"chat_template\.json"):
            load(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(PLAIN)
    assert load(tmp_path).tokenizer.chat_template == PLAIN


# --- wherever prompts are encoded --------------------------------------------------------------------------


def test_long_texts_and_calibration_texts_get_parts_too() -> None:
    model = chat_model(PARTS)
    items = TaskRunner(model, parse_tasks("core_long"), TaskSettings(limit=2, long_tokens=4)).tasks.prompts
    assert [model.tokenizer.decode(item.token_ids) for item in items] == [f"[u]{item.text}[a]" for item in items]
    assert len(items) == 2


def test_every_user_of_a_template_names_its_own_way_out() -> None:
    model = chat_model("{{ raise_exception('no chats') }}")
    for way, called in (
        ("--no-chat-template", lambda: compare(model, "drop-attention@1", prompts=[asked(("user", "hi"))])),
        ("leave out core_long", lambda: evaluate(model, "drop-attention@1", tasks="core_long", limit=2)),
        ("--calibration", lambda: own_texts(model, silent)),
        ("--calibration", lambda: repair_texts(model, silent)),
    ):
        with pytest.raises(PrunelensError, match=rf"chat template of text-llama fails on prompt .*no chats.*{way}"):
            called()


# --- tokenizers that end a text ----------------------------------------------------------------------------


def ending(tokenizer: Any, template: str = "<bos> $A <eos>") -> Any:
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<bos>", 1), ("<eos>", 2), ("<pad>", 0)]
    )
    return tokenizer


@pytest.mark.parametrize(
    ("template", "expected", "added"),
    [
        ("<bos> $A <eos>", [1, 3, 4], [2]),
        ("$A <eos>", [3, 4], [2]),
        ("<eos> $A <eos>", [2, 3, 4], [2]),
        ("<bos> $A <eos> <pad>", [1, 3, 4], [2, 0]),
        ("<bos> $A", [1, 3, 4], []),
        ("$A", [3, 4], []),
    ],
)
def test_what_a_tokenizer_puts_behind_a_text_is_taken_off_and_told_once(
    template: str, expected: list[int], added: list[int]
) -> None:
    model = tiny_model()
    ending(model.tokenizer, template)
    assert added_ending(model.tokenizer) == added
    assert text_ids(model, words(3, 4)) == expected
    assert texts_ids(model, [words(3, 4), words(5), ""])[0] == expected
    assert encode([asked(("user", words(3, 4)))], model, True, 4)[0].token_ids == tuple(expected)
    assert len(model.notes) == (1 if added else 0)
    if added == [2]:
        assert "the tokenizer of tiny-llama appends '<eos>' to every text; texts are read without it" in model.notes[0]


def test_an_end_that_the_text_itself_holds_stays() -> None:
    model = tiny_model()
    ending(model.tokenizer)
    assert text_ids(model, "w3 <eos>") == [1, 3, 2]
    assert text_ids(model, "<eos>") == [1, 2]
    assert text_ids(model, "<eos> w3 <eos> <eos>") == [1, 2, 3, 2, 2]


def test_a_tokenizer_written_in_python_and_one_that_knows_few_letters_are_asked_too() -> None:
    from transformers import ByT5Tokenizer

    assert added_ending(ByT5Tokenizer()) == [1]
    few = Tokenizer(models.BPE({"<pad>": 0, "<bos>": 1, "<eos>": 2, "z": 3}, []))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=few, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    model = wrap(tiny_network("llama"), ending(tokenizer), "few")
    assert text_ids(model, "zz") == [1, 3, 3]


def test_a_sep_of_an_encoders_tokenizer_is_taken_off(tmp_path: Path) -> None:
    from transformers import BertTokenizerFast

    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "there"]))
    model = wrap(tiny_network("llama"), BertTokenizerFast(str(tmp_path / "vocab.txt")), "bert")
    assert text_ids(model, "hello there") == [2, 5, 6]
    assert "'[SEP]'" in model.notes[0]


def test_options_go_on_from_the_prompt_and_not_from_its_end() -> None:
    model = tiny_model()
    ending(model.tokenizer)
    text = asked(("user", words(3)), options=("w4", "w5"), answer="w4")
    assert encode([text], model, True, 4)[0].option_ids == (4, 5)


def test_a_template_writes_its_special_tokens_itself() -> None:
    model = chat_model("<bos>" + LOOP + "{{ m.content }}<eos>" + END)
    ending(model.tokenizer)
    (found,) = encode([asked(("user", "hi"))], model, True, 4)
    assert model.tokenizer.decode(found.token_ids) == "<bos>hi<eos>[a]"
    assert model.notes == []


def test_the_note_reaches_results_of_compare_once() -> None:
    model = text_model()
    ending(model.tokenizer)
    texts = [asked(("user", "Hello <eos> there"), name="a"), asked(("user", "well"), name="b")]
    found = compare(model, "drop-attention@1", prompts=texts, max_new_tokens=2, lens_steps=0)
    assert [note for note in found.info["notes"] if "to every text" in note] == model.notes
    assert "prompt 'a': the text holds '<eos>', which is read as a special token" in found.info["notes"]
    assert len(found.info["notes"]) == 3  # the third: two prompts are few
    again = compare(model, "drop-attention@1", prompts=texts[1:], max_new_tokens=2, lens_steps=0)
    assert again.info["notes"][:-1] == model.notes  # what is said of a prompt stays with that prompt


def test_tasks_of_the_harness_are_asked_without_the_end() -> None:
    found = []
    for template in ("<bos> $A", "<bos> $A <eos>"):
        model = text_model()
        ending(model.tokenizer, template)
        bench = TaskRunner(model, parse_tasks("core_choice,core_facts"), TaskSettings(limit=3, batch_size=3))
        found.append([(one.metric.name, one.values, one.answers) for one in bench.dense_found.scored])
        assert len(model.notes) == (1 if "eos" in template else 0)
    assert found[0] == found[1]
    assert any(answers for _, _, answers in found[0])


# --- texts that a tokenizer cannot read --------------------------------------------------------------------


def test_special_tokens_in_a_text_are_told() -> None:
    model = chat_model(PLAIN)
    texts = [asked(("user", text), name=text[:1]) for text in ("a <eos>", "b", "c <pad><bos>", "d <eos>")]
    found = encode(texts, model, True, 4)
    assert [2 in prompt.token_ids for prompt in found] == [True, False, False, True]
    assert prompt_notes(found) == [
        "prompts 'a', 'd': the text holds '<eos>', which is read as a special token",
        "prompt 'c': the text holds '<bos>', '<pad>', which is read as a special token",
    ]


def test_unknown_letters_and_texts_that_cannot_be_told_apart_are_told() -> None:
    texts = [asked(("user", text), name=text) for text in ("w3 w4", "w3 what", "what", "who", "why", "how")]
    (known, *notes) = [prompt.notes for prompt in encode(texts, tiny_model(), True, 4)]
    assert known == ()
    assert [note[0].split(" of the text")[0] for note in notes] == ["not all", "none", "none", "none", "none"]
    told = prompt_notes(encode(texts, tiny_model(), True, 4))
    assert told[1].startswith("prompts 'what', 'who', 'why' and 1 more: none of the text is known to the tokenizer")
    assert told[2] == (
        "prompts 'what', 'who', 'why' and 1 more: texts that the tokenizer cannot tell apart: they have the same "
        "token ids"
    )
    assert len(told) == 3


def test_equal_texts_are_no_remark() -> None:
    texts = [asked(("user", words(3)), name=name) for name in "ab"]
    assert prompt_notes(encode(texts, tiny_model(), True, 4)) == []


@pytest.mark.parametrize("template", [None, PLAIN])
def test_a_text_whose_letters_all_vanish_is_refused(template: str | None) -> None:
    tokenizer = text_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\N{ZERO WIDTH SPACE}", "")
    tokenizer.chat_template = template
    model = wrap(text_network(), ending(tokenizer, "<bos> $A"), "text")
    with pytest.raises(
        PrunelensError, match=r"^prompts\.txt:3: expected a prompt with text, found no token for the text"
    ):
        encode([asked(("user", "\N{ZERO WIDTH SPACE}" * 3), where="prompts.txt:3")], model, True, 4)
    assert read(model, ("user", "a\N{ZERO WIDTH SPACE}b")).endswith("ab" if template is None else "ab[a]")


# --- texts that are too long -------------------------------------------------------------------------------


class Counting:
    """A tokenizer that counts the letters it is given."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.letters = tokenizer, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __call__(self, text: Any, **options: Any) -> Any:
        self.letters += sum(map(len, text if isinstance(text, list) else [text]))
        return self.tokenizer(text, **options)


@pytest.mark.parametrize("template", [None, PLAIN])
def test_a_text_far_beyond_the_context_is_refused_by_its_start(template: str | None) -> None:
    tokenizer = text_tokenizer()
    tokenizer.chat_template = template
    counting = Counting(tokenizer)
    model = wrap(text_network(), counting, "text")
    with pytest.raises(
        PrunelensError, match=r"prompt 'p' has more than 1024 tokens; with 4 new ones .* context of 1024"
    ):
        encode([asked(("user", "letters " * 1_000_000))], model, True, 4)
    assert counting.letters < 100_000


def test_a_long_text_of_few_tokens_is_read_whole() -> None:
    model = tiny_model()
    blanks = " " * 10_000
    assert encode([asked(("user", f"w3{blanks}w4"))], model, True, 4)[0].token_ids == (3, 4)
    with pytest.raises(PrunelensError, match="has 125 tokens; with 4 new"):
        encode([asked(("user", blanks.join(["w3"] * 125)))], model, True, 4)


def test_what_is_wrong_with_one_prompt_does_not_hide_the_others() -> None:
    texts = [asked(("user", text), name=text[:1]) for text in (" ", "a", "b" * 2000, "c")]
    found = encode_each(texts, chat_model(PLAIN), True, 4)
    assert [type(one) for one in found] == [PrunelensError, Prompt, PrunelensError, Prompt]
    assert [one.prompt_id for one in found if isinstance(one, Prompt)] == ["a", "c"]
