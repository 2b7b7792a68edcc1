"""Calibration text: every way of giving it yields token ids, cut to what the model reads; the rest is refused."""

import gc
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import processors

from conftest import tiny_model, words
from prunelens.errors import PrunelensError
from prunelens.models.model import Model
from prunelens.models.opening.loading import wrap
from prunelens.pruning.calibration import MAX_LENGTH, read_calibration


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_model("llama")


def text_file(tmp_path: Path, content: str | bytes, name: str = "text.txt") -> Path:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def lines(*records: Any) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def test_a_text_file_is_one_text(tmp_path: Path, model: Model) -> None:
    path = text_file(tmp_path, f"{words(3, 4)}\n\n{words(5)}\r\n{words(6)}")
    assert read_calibration(path, model) == [[3, 4, 5, 6]]


def test_a_byte_order_mark_is_no_token(tmp_path: Path, model: Model) -> None:
    assert read_calibration(text_file(tmp_path, b"\xef\xbb\xbf" + words(3, 4).encode()), model) == [[3, 4]]


def test_jsonl_holds_one_text_a_line(tmp_path: Path, model: Model) -> None:
    content = lines({"text": words(3, 4)}, {"prompt": words(5), "id": "x"}, {"text": words(6), "kind": "x"})
    expected = [[3, 4], [5], [6]]
    assert read_calibration(text_file(tmp_path, content, "a.jsonl"), model) == expected
    assert read_calibration(text_file(tmp_path, content, "a.json"), model) == expected
    windows = b"\xef\xbb\xbf" + content.replace("\n", "\r\n\r\n").encode()
    assert read_calibration(text_file(tmp_path, windows, "b.jsonl"), model) == expected


def test_a_line_separator_inside_a_text_does_not_end_the_line(tmp_path: Path, model: Model) -> None:
    content = json.dumps({"text": f"{words(3)}\u2028{words(4)}"}, ensure_ascii=False)
    assert read_calibration(text_file(tmp_path, content, "a.jsonl"), model) == [[3, 4]]


def test_empty_texts_among_others_are_passed_over(tmp_path: Path, model: Model) -> None:
    content = lines({"text": ""}, {"text": words(3)}, {"text": " \n"})
    assert read_calibration(text_file(tmp_path, content, "a.jsonl"), model) == [[3]]


@pytest.mark.parametrize("length", [1, 127, 128, 129, 256, 300])
def test_a_long_text_is_cut_to_the_context_and_nothing_is_lost(tmp_path: Path, model: Model, length: int) -> None:
    ids = [3 + position % 90 for position in range(length)]
    pieces = read_calibration(text_file(tmp_path, words(*ids)), model)
    assert [token for piece in pieces for token in piece] == ids
    assert all(len(piece) == 128 for piece in pieces[:-1])
    assert 1 <= len(pieces[-1]) <= 128


def test_without_a_limit_of_the_model_pieces_stay_short(
    tmp_path: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Model, "context_length", property(lambda self: None))
    pieces = read_calibration(text_file(tmp_path, words(*[5] * (MAX_LENGTH + 1))), model)
    assert [len(piece) for piece in pieces] == [MAX_LENGTH, 1]


def test_special_tokens_are_those_of_the_tokenizer(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 1)]
    )
    assert read_calibration(text_file(tmp_path, words(3, 4)), model) == [[1, 3, 4]]


# --- token ids ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["int64", "int32", "uint16", "int8", ">i4", "uint64"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_token_ids_are_taken_as_they_are(tmp_path: Path, model: Model, dtype: str, order: Any) -> None:
    path = tmp_path / "ids.npy"
    np.save(path, np.array([[3, 96, 0], [5, 6, 7]], dtype=dtype, order=order))
    found = read_calibration(path, model)
    assert found == [[3, 96, 0], [5, 6, 7]]
    assert all(type(token) is int for row in found for token in row)


def test_token_ids_need_no_tokenizer(tmp_path: Path) -> None:
    model = wrap(tiny_model().network)
    np.save(tmp_path / "ids.npy", np.full((1, 128), 3))
    assert read_calibration(tmp_path / "ids.npy", model) == [[3] * 128]
    with pytest.raises(PrunelensError, match=r"no tokenizer.*\.npy"):
        read_calibration(text_file(tmp_path, words(3)), model)


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.array([3, 4]), r"\(samples, length\).*int64 of shape \(2,\)"),
        (np.array(3), r"\(samples, length\).*shape \(\)"),
        (np.zeros((1, 2, 3), int), r"\(samples, length\).*shape \(1, 2, 3\)"),
        (np.zeros((0, 3), int), r"shape \(0, 3\)"),
        (np.zeros((3, 0), int), r"shape \(3, 0\)"),
        (np.array([[3.0]]), "integers.*float64"),
        (np.array([[True]]), "integers.*bool"),
        (np.array([["w3"]]), "integers.*<U2"),
        (np.zeros((1, 2), dtype=[("id", int)]), "integers"),
        (np.array([[3, 97]]), "from 3 to 97, but tiny-llama has 97 tokens"),
        (np.array([[-1, 3]]), "from -1 to 3"),
        (np.array([[2**63]], dtype=np.uint64), "to 9223372036854775808"),
        (np.full((2, 129), 3), "129 tokens, the context is 128"),
    ],
)
def test_an_array_that_holds_no_token_ids_is_refused(
    tmp_path: Path, model: Model, array: np.ndarray, said: str
) -> None:
    path = tmp_path / "ids.npy"
    np.save(path, array)
    with pytest.raises(PrunelensError, match=said) as caught:
        read_calibration(path, model)
    assert str(path) in str(caught.value)


class Opened:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_pickle_is_not_opened(tmp_path: Path, model: Model) -> None:
    sentinel, path = tmp_path / "sentinel", tmp_path / "ids.npy"
    np.save(path, np.array([[Opened(sentinel)]], dtype=object), allow_pickle=True)
    with pytest.raises(PrunelensError, match="Python objects"):
        read_calibration(path, model)
    assert not sentinel.exists()
    np.load(path, allow_pickle=True)
    assert sentinel.exists()


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_archive_is_refused(tmp_path: Path, model: Model) -> None:
    np.savez(tmp_path / "ids.npz", ids=np.array([[3]]))
    path = (tmp_path / "ids.npz").rename(tmp_path / "ids.npy")
    with pytest.raises(PrunelensError, match=r"archive.*numpy\.save"):
        read_calibration(path, model)
    gc.collect()


@pytest.mark.parametrize("data", [b"", b"\x93NUMPY", b"hello", b"\x80\x04K\x01."])
def test_what_is_no_array_is_refused(tmp_path: Path, model: Model, data: bytes) -> None:
    with pytest.raises(PrunelensError, match=r"\.npy of token ids"):
        read_calibration(text_file(tmp_path, data, "ids.npy"), model)


def test_an_array_cut_short_is_refused(tmp_path: Path, model: Model) -> None:
    path = tmp_path / "ids.npy"
    np.save(path, np.full((10, 100), 3))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(PrunelensError, match=r"\.npy of token ids"):
        read_calibration(path, model)


# --- text that is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", "", "at least one token"),
        ("a.txt", " \n\t ", "at least one token"),
        ("a.txt", b"\xef\xbb\xbf", "at least one token"),
        ("a.txt", b"w3 \xff", "calibration text"),
        ("a.jsonl", "", "at least one token"),
        ("a.jsonl", lines({"text": ""}), "at least one token"),
        ("a.jsonl", lines({"text": "w3"}) + "{", r"a\.jsonl:2: .*JSON object"),
        ("a.jsonl", "\n\n[3]", r"a\.jsonl:3: .*JSON object"),
        ("a.jsonl", '"w3"', r"a\.jsonl:1: .*JSON object"),
        ("a.jsonl", lines({"text": 3}), r'a\.jsonl:1: .*"text"'),
        ("a.jsonl", lines({"text": None, "prompt": "w3"}), r'a\.jsonl:1: .*"text"'),
        ("a.jsonl", lines({"messages": []}), r"a\.jsonl:1: there is no key 'messages'; known keys: text, prompt"),
        ("a.jsonl", lines({"txet": "w3"}), r"a\.jsonl:1: there is no key 'txet' \(did you mean text\?\)"),
        ("a.jsonl", lines({"text": "w3", "prompt": "w4"}), r'a\.jsonl:1: expected either "text" or "prompt"'),
        ("a.jsonl", '{"text": "w3", "text": "w4"}', r"a\.jsonl:1: the key 'text' is given twice"),
        ("a.txt", b"w\x003\x00", "NUL"),
        ("a.jsonl", b'{"text": "w3\x00"}', r"a\.jsonl:1: .*NUL"),
        ("a.txt", "w3".encode("utf-16"), "UTF-16"),
        ("a.jsonl", "[" * 100_000, r"a\.jsonl:1: .*50 deep"),
    ],
)
def test_text_without_tokens_is_refused(
    tmp_path: Path, model: Model, name: str, content: str | bytes, said: str
) -> None:
    with pytest.raises(PrunelensError, match=said):
        read_calibration(text_file(tmp_path, content, name), model)


@pytest.mark.parametrize("name", ["none.txt", "none.jsonl", "none.npy"])
def test_a_file_that_is_not_there_is_refused(tmp_path: Path, model: Model, name: str) -> None:
    with pytest.raises(PrunelensError, match="No such file"):
        read_calibration(tmp_path / name, model)
    (tmp_path / name).mkdir()
    with pytest.raises(PrunelensError, match="directory"):
        read_calibration(tmp_path / name, model)


def test_half_a_surrogate_pair_is_refused(tmp_path: Path, model: Model) -> None:
    with pytest.raises(PrunelensError, match=r"a\.jsonl:1"):
        read_calibration(text_file(tmp_path, r'{"text": "w3 \ud800"}', "a.jsonl"), model)


def test_token_ids_of_text_beyond_the_model_are_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.tokenizer.add_tokens(["more"])
    with pytest.raises(PrunelensError, match="97"):
        read_calibration(text_file(tmp_path, "w3 more"), model)


def test_texts_are_read_without_the_end_that_a_tokenizer_puts_behind_them(tmp_path: Path) -> None:
    model = tiny_model()
    model.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    plain, lined = tmp_path / "a.txt", tmp_path / "b.jsonl"
    plain.write_text(words(*[5] * 130))
    lined.write_text('{"text": "w3 w4"}\n{"text": "w5 <eos>"}\n{"text": ""}\n')
    assert read_calibration(plain, model) == [[1, *[5] * 127], [5, 5, 5]]
    assert read_calibration(lined, model) == [[1, 3, 4], [1, 5, 2]]
    assert len(model.notes) == 1
    assert "'<eos>' behind every text" in model.notes[0]
