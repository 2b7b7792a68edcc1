"""The guarded readers: every hostile file is one short sentence that names it, at once and without its content."""

import io
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prunelens.documents import parse_json, read_json, read_yaml
from prunelens.errors import PrunelensError, cut, nearest, one_line, printable, shown
from prunelens.reading import read_array, read_bytes, read_lines, read_text


def said(read: Callable[[], Any]) -> str:
    with pytest.raises(PrunelensError) as caught:
        read()
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert len(sentence) < 600
    return sentence


def file(folder: Path, content: str | bytes, name: str = "a.yaml") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# --- files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("read", [read_bytes, read_text, read_json, read_yaml, read_array])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path, read: Callable[..., Any]) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "empty").mkdir()
    for name, words in (
        ("pipe", "found a pipe"),
        ("/dev/zero", "found a device"),
        ("empty", "found a directory"),
        ("loop", "Too many levels of symbolic links"),
        ("none", "No such file"),
        ("x" * 300, "File name too long"),
        ("a\0b", "NUL character"),
    ):
        found = said(lambda name=name: read(name if name.startswith(("/", "a")) else tmp_path / name, "a thing"))
        assert words in found, found
        assert "a thing" in found
    assert "an empty name" in said(lambda: read("", "a thing"))


def test_a_file_has_a_largest_size(tmp_path: Path) -> None:
    path = file(tmp_path, b"x" * 1025)
    assert read_bytes(path, "a thing", 1025) == b"x" * 1025
    assert "at most 0.000976562 MiB" in said(lambda: read_bytes(path, "a thing", 1024))
    with path.open("wb") as sparse:
        sparse.truncate(1 << 40)
    assert "at most 64 MiB" in said(lambda: read_text(path, "a thing"))
    assert "at most 0.25 MiB" in said(lambda: read_yaml(path, "a thing"))
    assert "at most 256 MiB" in said(lambda: read_json(path, "a thing"))


def test_text_is_utf8_however_its_lines_end(tmp_path: Path) -> None:
    for content in (b"a\nb\n", b"a\r\nb\r\n", b"a\rb\r", b"\xef\xbb\xbfa\r\nb\n"):
        assert read_text(file(tmp_path, content), "a thing") == "a\nb\n"
        assert [line for _, line in read_lines(file(tmp_path, content), "a thing")] == ["a", "b"]
    for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32"):
        found = said(lambda encoding=encoding: list(read_lines(file(tmp_path, "ab".encode(encoding)), "a thing")))
        assert "UTF-16" in found or "NUL" in found
    assert "the byte 0xff in line 3" in said(lambda: read_text(file(tmp_path, b"a\nb\nc\xff"), "a thing"))


# --- JSON ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": 1, "b": 2, "a": 3}', "the key 'a' is given twice"),
        ('[{"x": [{"a": 1, "a": 1}]}]', "the key 'a' is given twice"),
        ('{"a": 1, "\\u0061": 2}', "the key 'a' is given twice"),
        ("[" * 51 + "]" * 51, "at most 50 deep"),
        ('{"a":' * 60 + "1" + "}" * 60, "at most 50 deep"),
        ("[" * 1_000_000, "at most 50 deep"),
        ('"' + '\\"' * 500_000 + "[" * 100, "expected JSON, found"),
        ("9" * 5_000, "at most 100 digits, found one of 5000"),
        ("-" + "9" * 101, "at most 100 digits"),
        ("1e400", "below 1.8e308"),
        ("0." + "1" * 5_000, "at most 100 digits"),
        ("NaN", "found NaN"),
        ("[-Infinity]", "found -Infinity"),
        ('"\\ud800"', "half of a surrogate pair"),
        ('{"\\uDFFF": 1}', "half of a surrogate pair"),
        ("x" * 1_000_000, "expected JSON, found 'xxx"),
        ('{"a": 1}\n\n{"b": 2}', "Extra data in line 3"),
        ("", "expected JSON, found ''"),
    ],
)
def test_json_that_is_refused(text: str, words: str) -> None:
    found = said(lambda: parse_json(text, "there:7"))
    assert found.startswith("there:7: ")
    assert words in found


def test_json_that_is_read() -> None:
    deepest = "[" * 50 + "]" * 50
    assert str(parse_json(deepest, "there")) == deepest
    assert parse_json('{"a": ["[[[[", 1.5, -3, 1e3, true, null], "b": {"a": 1}}', "there") == {
        "a": ["[[[[", 1.5, -3, 1000.0, True, None],
        "b": {"a": 1},
    }
    assert parse_json('"' + "[" * 100 + '"', "there") == "[" * 100
    assert parse_json('"\\ud83e\\udd94"', "there") == "\N{HEDGEHOG}"
    assert parse_json("[NaN, Infinity]", "there", finite=False)[1] == float("inf")


# --- YAML ----------------------------------------------------------------------------------------------------

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: 2\na: 3\n", "a.yaml:1: the key 'a' is given twice"),
        ("x:\n  - b: 1\n    b: 2\n", "a.yaml:2: the key 'b' is given twice"),
        ("{x: {'a': 1, a: 2}}", "the key 'a' is given twice"),
        (LAUGHS, "no anchors (&) and aliases (*)"),
        ("&a [*a]", "no anchors"),
        ("a: &x 1\nb: *x\n", "no anchors"),
        ("a: &x {b: 1}\nc: {<<: *x}\n", "no anchors"),
        ("a: {<<: {b: 1}}\n", "no merge keys"),
        ("!!python/object/apply:os.getcwd []", "no tags (!)"),
        ("a: !foo 1", "no tags (!)"),
        ("a: !!int x", "no tags (!)"),
        ("a: !!timestamp x", "no tags (!)"),
        ("a: !!binary x", "no tags (!)"),
        ("!!set {a, b}", "no tags (!)"),
        ("a: " + "[" * 100_000, "at most 50 deep"),
        ("a: " + "{b: " * 5_000, "at most 50 deep"),
        ("\n".join("  " * depth + "a:" for depth in range(200)), "at most 50 deep"),
        ("a: " + "9" * 5_000, "at most 100 digits, found one of 5000"),
        ("a: 1e400", "below 1.8e308"),
        ("1: a", "expected text as a key, found '1'"),
        ("true: a", "expected text as a key, found 'true'"),
        ("~: a", "expected text as a key, found '~'"),
        ("1.5: a", "expected text as a key"),
        ("[a, b]: c", "expected text as a key, found a list or mapping"),
        ("? {a: 1}\n: c", "expected text as a key, found a list or mapping"),
        ("a: \x07", "the character U+0007 is not allowed, found in line 1"),
        ("a: 1\nb: \x00", "the character U+0000 is not allowed, found in line 2"),
        ("a: 1\n---\nb: 2\n", "found another document in line 2"),
        ("a:\n\t- 1", "cannot start any token in line 2"),
        ("a: [", "in YAML at"),
        ("%YAML 9.9\n---\na: 1", "in YAML at"),
    ],
)
def test_yaml_that_is_refused(tmp_path: Path, text: str, words: str) -> None:
    found = said(lambda: read_yaml(file(tmp_path, text), "a study"))
    assert words in found, found
    assert str(tmp_path / "a.yaml") in found


def test_yaml_that_is_read(tmp_path: Path) -> None:
    text = (
        "\ufeffa: 12\nb: -0.5\nc: 1e-3\nd: true\ne: null\nf: ~\ng:\nh: [x, 'y', \"z\"]\ni: {j: off}\n"
        "k: 2:4\nl: 012\nm: 2023-13-45\nn: .inf\no: '12'\np: 0o17\nq: 1_000\nr: |\n  12\ns: 2024-01-01\nt: -0\nu: .5\n"
    )
    assert read_yaml(file(tmp_path, text), "a study") == {
        "a": 12,
        "b": -0.5,
        "c": 0.001,
        "d": True,
        "e": None,
        "f": None,
        "g": None,
        "h": ["x", "y", "z"],
        "i": {"j": False},
        "k": "2:4",
        "l": "012",
        "m": "2023-13-45",
        "n": ".inf",
        "o": "12",
        "p": "0o17",
        "q": "1_000",
        "r": "12\n",
        "s": "2024-01-01",
        "t": 0,
        "u": 0.5,
    }
    assert read_yaml(file(tmp_path, "a: 1\rb: 2\r"), "a study") == {"a": 1, "b": 2}
    assert read_yaml(file(tmp_path, ""), "a study") is None


def test_a_large_study_is_read(tmp_path: Path) -> None:
    recipes = [f"drop-mlp@{index}" for index in range(8_000)]
    text = "recipes:\n" + "".join(f"  - {recipe}\n" for recipe in recipes)
    assert read_yaml(file(tmp_path, text), "a study") == {"recipes": recipes}


# --- arrays --------------------------------------------------------------------------------------------------


def npy(header: str, data: bytes = b"", version: tuple[int, int] = (1, 0)) -> bytes:
    text = header.encode() + b"\n"
    return b"\x93NUMPY" + bytes(version) + struct.pack("<H" if version == (1, 0) else "<I", len(text)) + text + data


def saved(array: Any, **more: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, **more)
    return stream.getvalue()


def header(shape: str = "(1, 2)", descr: str = "'<i8'", order: str = "False") -> str:
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}}}"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (npy(header("(1000000000, 1000000)")), "8000000000000000 bytes of numbers as its header tells, found 0"),
        (npy(header(f"({10**60}, 2)")), "16000"),
        (npy(header(f"({10**300}, 2)")), "bits bytes"),
        (npy(header("(0, 3)"), b"x"), "it was cut or joined"),
        (saved(np.ones((2, 3), int))[:-1], "48 bytes of numbers as its header tells, found 47"),
        (saved(np.ones((2, 3), int)) + saved(np.ones((2, 3), int)), "it was cut or joined"),
        (saved(np.array([[{}]], dtype=object), allow_pickle=True), "Python objects"),
        (npy(header("(-1, 2)")), "the shape"),
        (npy(header("(True, 2)")), "the shape"),
        (npy(header("(1.0, 2)")), "header that is no .npy"),
        (npy(header("'x'")), "header that is no .npy"),
        (npy("(" * 5_000), "header that is no .npy"),
        (npy("__import__('os').getcwd()"), "header that is no .npy"),
        (npy(header(), version=(9, 0)), "header that is no .npy"),
        (npy(header(descr="'<V0'")), "Python objects"),
        (npy(header(descr="'O'"), b"\x80\x04K\x01."), "Python objects"),
        (b"PK\x03\x04", "an archive"),
        (b"", "header that is no .npy"),
        (b"\x93NUMPY", "header that is no .npy"),
    ],
)
def test_an_array_that_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    found = said(lambda: read_array(file(tmp_path, content, "a.npy"), "token ids"))
    assert words in found, found
    assert str(tmp_path / "a.npy") in found


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["int64", ">i4", "uint16", "float32", "bool"])
def test_an_array_that_is_read(tmp_path: Path, dtype: str, order: Any) -> None:
    array = np.asarray(np.arange(6).reshape(2, 3), dtype=dtype, order=order)
    found = read_array(file(tmp_path, saved(array), "a.npy"), "token ids")
    assert found.dtype == array.dtype
    assert found.tolist() == array.tolist()


# --- sentences -----------------------------------------------------------------------------------------------


def test_an_error_is_cut_in_the_middle() -> None:
    found = str(PrunelensError("begin " + "x" * 100_000 + " end"))
    assert len(found) == 1_000
    assert found.startswith("begin x")
    assert found.endswith("x end")
    assert "…" in found
    assert cut("abcdef", 6) == "abcdef"
    assert cut("abcdefg", 6) == "abc…fg"


@pytest.mark.parametrize(
    "letter",
    ["\x1b", "\x07", "\r", "\x00", "\x7f", "\x85", "\x9b", "\u200b", "\u202e", "\u2066", "\u2028", "\u2029", "\ud800"],
)
def test_nothing_that_steers_is_printable(letter: str) -> None:
    assert printable(f"a{letter}b") == "a\N{REPLACEMENT CHARACTER}b"
    assert letter not in one_line(f"a{letter}b")
    assert letter not in shown(f"a{letter}b")
    printable(f"a{letter}b").encode()


def test_what_is_plain_stays() -> None:
    text = "Größe ½ \N{HEDGEHOG} 漢字 עברית [red] a\tb\nc"
    assert printable(text) == text
    assert one_line(" a\n b\t") == "a b"


def test_a_value_is_shown_short_and_by_its_type() -> None:
    assert (shown(None), shown(True), shown(3), shown(0.5), shown("a")) == ("null", "true", "3", "0.5", "'a'")
    assert (shown([1]), shown({"a": 1}), shown([]), shown(object())) == (
        "a list",
        "an object",
        "[]",
        "a value of type object",
    )
    assert len(shown("x" * 10**6)) < 130
    assert shown(10**5_000) == f"a number of {(10**5_000).bit_length()} bits"


def test_a_long_name_is_no_work() -> None:
    assert nearest("optoins", ("options", "prompt")) == " (did you mean options?)"
    assert nearest("x" * 10**6, ("options", "prompt")) == ""


def test_reading_stays_light() -> None:
    """No numpy before an array is read."""
    code = "import sys, prunelens.reading; print('numpy' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False"
