"""What recipes are calibrated on: prompts of their own, texts that are kept, and none that hold what is reported."""

import json
import re
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import text_model, text_network, tiny_model, words
from prunelens.cache import cache_dir
from prunelens.errors import PrunelensError
from prunelens.models.model import Model
from prunelens.models.opening.loading import wrap
from prunelens.progress import silent
from prunelens.pruning.recipe import Recipe, parse_recipe
from prunelens.study import calibration_texts as module
from prunelens.study.calibration_texts import REPAIR_PROMPTS, REPAIR_SEEDS, calibrate, own_texts, repair_texts, unseen
from prunelens.tasks.prompts import prompts

TASKS = Path(str(resources.files("prunelens.tasks")))
BUILT_IN = prompts(TASKS / REPAIR_PROMPTS)
FEW = ("Name a tree.", "Why is the sea salt?", "Count to three.")
NEW_TOKENS = 4
RUN = 8
"""So many words in a row are no chance."""


@pytest.fixture(autouse=True)
def _few_and_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of its own, three calibration prompts and two core prompts, and short texts."""
    monkeypatch.setenv("PRUNELENS_CACHE", str(tmp_path / "cache"))
    write_prompts(tmp_path / "few.jsonl", FEW)
    monkeypatch.setattr(module, "REPAIR_PROMPTS", str(tmp_path / "few.jsonl"))
    monkeypatch.setattr(module, "REPAIR_TOKENS", NEW_TOKENS)
    own = module.prompts
    monkeypatch.setattr(module, "prompts", lambda *source: own(*source) if source else own()[:2])


@pytest.fixture
def model() -> Model:
    return text_model()


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many texts were asked for in each call of the writer."""
    asked: list[int] = []
    own = module.write

    def counted(model: Model, ids: Any, *more: Any) -> Any:
        asked.append(len(ids))
        return own(model, ids, *more)

    monkeypatch.setattr(module, "write", counted)
    return asked


def write_prompts(path: Path, texts: tuple[str, ...]) -> None:
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts), encoding="utf-8")


def forbidden(*args: Any) -> Any:
    raise AssertionError("nothing was to be written")


def recipes(*texts: str) -> list[Recipe]:
    return [parse_recipe(text) for text in texts]


def kept_files() -> list[Path]:
    return sorted(cache_dir().glob("texts/*"))


def told(held: int, texts: int) -> str:
    return f"{held} of {texts} calibration texts hold what is reported on and were left out of the fit"


def read(model: Model, *texts: str) -> list[list[int]]:
    return [model.tokenizer(text)["input_ids"] for text in texts]


# --- the built-in prompts ----------------------------------------------------------------------------------


def strings(value: Any) -> Iterator[str]:
    """Every text below a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from strings(part)


def of_suites() -> list[str]:
    """Every text of every item of the built-in suites: questions, prompts, choices, passages."""
    lines = [line for path in TASKS.glob("suites/**/*.jsonl") for line in path.read_text("utf-8").splitlines()]
    return [text for line in lines if line.strip() for text in strings(json.loads(line))]


def normed(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def runs_of(text: str) -> set[str]:
    own = normed(text).split()
    return {" ".join(own[start : start + RUN]) for start in range(len(own) - RUN + 1)}


def elsewhere() -> list[str]:
    """The texts on which results are reported."""
    found = [prompt.text for prompt in prompts()] + of_suites()
    assert len(found) > 1000
    return found


def test_the_built_in_prompts_are_asked_nowhere_else() -> None:
    own = [normed(prompt.text) for prompt in BUILT_IN]
    assert len(own) == len(set(own)) >= 90
    assert not set(own) & {normed(text) for text in elsewhere()}


def test_no_reported_prompt_is_part_of_a_built_in_one() -> None:
    """As `unseen` looks for them."""
    asked = [prompt.text.strip() for prompt in prompts()]
    assert not [prompt.prompt_id for prompt in BUILT_IN if any(text in prompt.text for text in asked)]


def test_the_built_in_prompts_share_no_eight_words_with_what_is_reported() -> None:
    others = set().union(*(runs_of(text) for text in elsewhere()))
    shared = {prompt.prompt_id: sorted(runs_of(prompt.text) & others) for prompt in BUILT_IN}
    assert not {name: found for name, found in shared.items() if found}


def test_the_built_in_prompts_are_of_many_kinds() -> None:
    assert len({prompt.kind for prompt in BUILT_IN}) >= 8
    assert all(prompt.text.strip() for prompt in BUILT_IN)


# --- texts for repairs -------------------------------------------------------------------------------------


def test_every_prompt_is_continued_once_a_seed(model: Model) -> None:
    found = repair_texts(model, silent)
    asked = read(model, *FEW)
    assert len(found) == len(FEW) * len(REPAIR_SEEDS)
    for number, text in enumerate(found):
        prompt = asked[number % len(FEW)]
        assert text[: len(prompt)] == prompt
        assert 0 < len(text) - len(prompt) <= NEW_TOKENS
    assert found[: len(FEW)] != found[len(FEW) :]


def test_the_texts_are_the_same_whenever_they_are_written(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = repair_texts(model, silent)
    monkeypatch.setenv("PRUNELENS_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr(module, "REPAIR_ROWS", 1)
    assert repair_texts(text_model(), silent) == first


def test_the_texts_are_kept(model: Model, runs: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    first = repair_texts(model, silent)
    assert runs == [len(FEW) * len(REPAIR_SEEDS)]
    (path,) = kept_files()
    assert json.loads(path.read_text(encoding="utf-8")) == first
    monkeypatch.setattr(module, "write", forbidden)
    assert repair_texts(text_model(), silent) == first
    assert kept_files() == [path]


def test_other_models_prompts_and_settings_have_texts_of_their_own(
    model: Model, runs: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [repair_texts(model, silent), repair_texts(text_model(seed=1), silent)]
    monkeypatch.setattr(module, "REPAIR_TOKENS", NEW_TOKENS - 1)
    found.append(repair_texts(model, silent))
    monkeypatch.setattr(module, "REPAIR_SEEDS", (0, 1, 2))
    found.append(repair_texts(model, silent))
    write_prompts(tmp_path / "few.jsonl", FEW[:2])
    found.append(repair_texts(model, silent))
    assert runs == [6, 6, 6, 9, 6]
    assert len({json.dumps(texts) for texts in found}) == len(kept_files()) == 5


def test_another_chat_template_has_texts_of_its_own(model: Model, runs: list[int]) -> None:
    first, other = repair_texts(model, silent), text_model()
    other.tokenizer.chat_template = "{% for message in messages %}<<{{ message['content'] }}>>{% endfor %}"
    assert other.fingerprint == model.fingerprint
    found = repair_texts(other, silent)
    assert len(runs) == len(kept_files()) == 2
    for text, asked in zip(found, read(other, *(f"<<{text}>>" for text in FEW)) * len(REPAIR_SEEDS), strict=True):
        assert text[: len(asked)] == asked
    assert repair_texts(text_model(), silent) == first
    assert repair_texts(other, silent) == found
    assert len(runs) == 2


def test_other_ends_of_texts_have_texts_of_their_own(model: Model, runs: list[int]) -> None:
    first, other = repair_texts(model, silent), text_model()
    asked = read(model, *FEW) * len(REPAIR_SEEDS)
    begun = {text[len(prompt)] for text, prompt in zip(first, asked, strict=True)}
    other.network.generation_config.eos_token_id = [2, *sorted(begun)]
    assert other.fingerprint == model.fingerprint
    found = repair_texts(other, silent)
    assert [len(text) - len(prompt) for text, prompt in zip(found, asked, strict=True)] == [1] * len(asked)
    assert len(runs) == len(kept_files()) == 2
    other.network.generation_config.eos_token_id.reverse()
    assert repair_texts(other, silent) == found
    assert len(runs) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: b"",
        lambda content: b"\xff\xfe" + content,
        lambda content: b"null",
        lambda content: b"{}",
        lambda content: b"[]",
        lambda content: b'[["a"]]',
    ],
    ids=["cut short", "empty", "no text", "null", "an object", "no texts", "no numbers"],
)
def test_a_damaged_file_is_written_anew(model: Model, runs: list[int], damage: Callable[[bytes], bytes]) -> None:
    first = repair_texts(model, silent)
    (path,) = kept_files()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert repair_texts(model, silent) == first
    assert path.read_bytes() == whole
    assert len(runs) == 2


def test_a_cache_that_cannot_be_written_is_none(
    model: Model, runs: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("PRUNELENS_CACHE", str(tmp_path / "file" / "cache"))
    assert repair_texts(model, silent) == repair_texts(model, silent)
    assert len(runs) == 2


def test_progress_is_told_of_every_token(model: Model) -> None:
    told: dict[str, list[int]] = {}

    def reporter(stage: str, total: int, /) -> Callable[[int], None]:
        counts = told.setdefault(stage, [total, 0])

        def advance(done: int) -> None:
            counts[1] += done

        return advance

    repair_texts(model, reporter)
    assert told == {"writing calibration texts for the repair": [len(FEW) * len(REPAIR_SEEDS) * NEW_TOKENS] * 2}
    told.clear()
    repair_texts(model, reporter)
    assert not told


def test_a_model_without_a_tokenizer_needs_a_calibration() -> None:
    with pytest.raises(PrunelensError, match=r"no tokenizer.*pass --calibration"):
        repair_texts(wrap(text_network(), None, "bare"), silent)
    assert not kept_files()


def test_prompts_that_are_too_long_are_left_out(model: Model, tmp_path: Path, runs: list[int]) -> None:
    write_prompts(tmp_path / "few.jsonl", (FEW[0], "word " * 300, FEW[1]))
    found = repair_texts(model, silent)
    assert [text[: len(prompt)] for text, prompt in zip(found[:2], read(model, *FEW[:2]), strict=True)] == read(
        model, *FEW[:2]
    )
    assert runs == [2 * len(REPAIR_SEEDS)]


def test_a_context_that_is_too_short_needs_a_calibration(model: Model, tmp_path: Path) -> None:
    write_prompts(tmp_path / "few.jsonl", ("word " * 300,))
    with pytest.raises(PrunelensError, match=r"text-llama cannot write calibration texts for a repair .*--calibration"):
        repair_texts(model, silent)


# --- what is reported on is not fitted on ------------------------------------------------------------------


def test_texts_that_hold_a_reported_prompt_are_left_out(model: Model) -> None:
    texts = read(
        model,
        "Name a tree.",
        "Hello. Name a tree. Oak.",
        "Name a bush.",
        "Why is the sea salt",
        "\n Why is the sea salt? Rivers.",
    )
    asked = [" Name a tree.\n", "Why is the sea salt?"]
    assert unseen(texts, asked, model) == ([texts[2], texts[3]], (told(3, 5),))
    assert unseen(texts, ["Count to three."], model) == (texts, ())
    assert unseen(texts, [], model) == (texts, ())


def test_without_a_tokenizer_nobody_can_tell(model: Model) -> None:
    bare, texts = wrap(text_network(), None, "bare"), read(model, "Name a tree.")
    assert unseen(texts, [], bare) == (texts, ())
    with pytest.raises(PrunelensError, match="bare has no tokenizer"):
        unseen(texts, ["Name a bush."], bare)


def test_white_space_does_not_count(model: Model) -> None:
    texts = read(model, "Name\n  a   tree.", "Name a bush.")
    assert unseen(texts, ["Name a tree."], model) == (texts[1:], (told(1, 2),))


def test_a_prompt_that_spans_pieces_of_a_text_is_found(model: Model) -> None:
    """In each of the pieces, be they two or more, lies a part of it."""
    texts = read(model, "Hello.", "Why is", "the", "sea salt? Rivers.", "Why is", "the shore salt?")
    assert unseen(texts, ["Why is the sea salt?"], model) == ([texts[0], *texts[4:]], (told(3, 6),))
    assert unseen(texts, ["Hello."], model) == (texts[1:], (told(1, 6),))


def test_a_chat_is_found_between_the_marks_of_its_template(model: Model) -> None:
    chat = "Be brief.\nName a tree.\nOak.\nAnother?"
    texts = read(
        model,
        "<s>Be brief.</s><u>Name a tree.</u><a>Oak.</a><u>Another?</u>",
        "<s>Be brief.</s><u>Name a tree.</u>",
        "Another? Oak.",
    )
    assert unseen(texts, [chat], model) == (texts[1:], (told(1, 3),))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.text("ab \n", max_size=24), min_size=1, max_size=6),
    st.lists(st.text("ab ", max_size=20), min_size=1, max_size=4),
)
def test_what_is_found_is_what_stands_there(texts: list[str], wanted: list[str]) -> None:
    """Against looking at every place of the joined texts, one by one."""
    squeezed, asked = [[re.sub(r"\s", "", text) for text in given] for given in (texts, wanted)]
    owners = [index for index, text in enumerate(squeezed) for _ in text]
    joined, expected = "".join(squeezed), set()
    for one in asked:
        for place in range(len(joined)) if one else ():
            if joined[place : place + len(one)] == one:
                # texts without a character between two that hold a part count too
                expected |= set(range(owners[place], owners[place + len(one) - 1] + 1))
    assert module._in_a_row(squeezed, asked) == expected


def test_words_are_found_as_the_tokenizer_writes_them() -> None:
    model = tiny_model()
    texts = [[9, 5, 6, 7], [5, 7, 6], [6, 7]]
    assert unseen(texts, [words(5, 6)], model) == (texts[1:], (told(1, 3),))


def test_where_every_text_holds_a_reported_prompt_nothing_can_be_fitted(model: Model) -> None:
    texts = read(model, "Name a tree.", "Why is the sea salt? Rivers.")
    with pytest.raises(PrunelensError, match=r"other than the prompts and tasks that are reported on.*other --prompts"):
        unseen(texts, ["Name a tree.", "Why is the sea salt?"], model)


def test_the_built_in_texts_hold_none_of_the_core_prompts(model: Model) -> None:
    texts = read(model, *(prompt.text for prompt in BUILT_IN))
    assert unseen(texts, [prompt.text for prompt in prompts()], model) == (texts, ())


# --- what recipes need -------------------------------------------------------------------------------------


def test_a_file_serves_for_both(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "write", forbidden)
    ids = np.random.default_rng(0).integers(3, 259, (3, 5))
    np.save(tmp_path / "ids.npy", ids)
    asked = recipes("drop-mlp:1", "drop-attention@1+repair:linear")
    found = calibrate(asked, model, tmp_path / "ids.npy", silent)
    assert found.texts == found.repair == ids.tolist()
    (tmp_path / "text.txt").write_text("Some text.", encoding="utf-8")
    found = calibrate(asked, model, tmp_path / "text.txt", silent)
    assert found.texts == found.repair == read(model, "Some text.")
    with pytest.raises(PrunelensError, match="nowhere"):
        calibrate(asked, model, tmp_path / "nowhere.txt", silent)


def test_what_needs_no_texts_gets_none(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "write", forbidden)
    found = calibrate(recipes("drop-mlp@1", "magnitude:0.5", "quantize:int8"), model, None, silent)
    assert not found.texts
    assert not found.repair
    assert not kept_files()


def test_counts_get_the_greedy_texts_alone(model: Model, runs: list[int]) -> None:
    found = calibrate(recipes("drop-mlp:1", "drop-mlp@1"), model, None, silent)
    assert len(found.texts) == 2
    assert not found.repair
    assert runs == [2]
    assert not kept_files()


def test_repairs_get_the_samples_alone(model: Model, runs: list[int]) -> None:
    found = calibrate(recipes("drop-mlp@1", "drop-mlp@1+repair:bias"), model, None, silent)
    assert not found.texts
    assert found.repair == repair_texts(model, silent)
    assert runs == [len(FEW) * len(REPAIR_SEEDS)]


def test_a_recipe_that_ranks_and_repairs_gets_both(model: Model, runs: list[int]) -> None:
    found = calibrate(recipes("drop-mlp:1+repair:folded"), model, None, silent)
    assert (len(found.texts), len(found.repair)) == (2, 6)
    assert sorted(runs) == [2, 6]
    assert found.texts != found.repair


def test_a_context_too_short_for_own_texts_asks_for_calibration() -> None:
    model = text_model()
    model.network.config.max_position_embeddings = 8
    with pytest.raises(PrunelensError, match=r"own answers to the built-in prompts.*pass a text with --calibration"):
        own_texts(model, silent)
