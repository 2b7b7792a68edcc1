"""Configurations and headers that lie, of the damaged and of the hostile: one sentence, before memory is taken."""

import json
import os
import resource
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import tiny_network
from prunelens.errors import PrunelensError
from prunelens.models.opening.claims import check_fits
from prunelens.models.opening.loading import load, wrap
from prunelens.models.sizes import StoredTensor

LAST = 96
BAD_IDS: list[Any] = [
    LAST + 1,
    -1,
    10**400,
    "</s>",
    "2",
    2.0,
    True,
    [[2]],
    [2, "x"],
    [2, LAST + 1],
    [2, None],
    {"a": 1},
]


def refused(folder: Path, match: str) -> None:
    """One short sentence, and hardly any memory more than before."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(PrunelensError, match=match) as caught:
        load(folder, device="cpu")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def set_in(folder: Path, name: str, **values: Any) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def shown(value: Any) -> str:
    return str(value) if len(str(value)) < 30 else "a number"


# --- token ids ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", BAD_IDS, ids=shown)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_an_end_that_is_no_token_is_refused(checkpoint: Path, name: str, value: Any) -> None:
    set_in(checkpoint, name, eos_token_id=value)
    whole = len(str(value)) <= 100  # a longer number is refused by the reader
    sentence = rf"^expected eos_token_id in .*{name} to be a token id.*, found .*; set it to "
    refused(checkpoint, sentence if whole else rf"{name}: expected numbers of at most 100 digits")


@pytest.mark.parametrize("value", [LAST + 1, -1, "x", 1.5, [0]])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_padding_that_is_no_token_is_refused(checkpoint: Path, name: str, value: Any) -> None:
    set_in(checkpoint, name, pad_token_id=value)
    refused(checkpoint, rf"^expected pad_token_id in .*{name} to be a token id.*, found .*; set it to ")


@pytest.mark.parametrize("value", [0, LAST, None, [2, LAST]])
def test_tokens_of_the_vocabulary_are_taken(checkpoint: Path, value: Any) -> None:
    set_in(checkpoint, "config.json", eos_token_id=value)
    set_in(checkpoint, "generation_config.json", eos_token_id=value)
    expected = {None: [2]}.get(value) if value is None else value if isinstance(value, list) else [value]
    assert load(checkpoint, device="cpu").eos_ids == expected  # without one, the tokenizer knows it


@pytest.mark.parametrize("value", [LAST + 1, "x", [2.0], -1])
def test_the_end_of_a_model_in_memory_is_checked_too(value: Any) -> None:
    network = tiny_network("llama")
    network.generation_config.eos_token_id = value
    with pytest.raises(PrunelensError, match=r"eos_token_id in the settings of mine"):
        wrap(network, name="mine")


# --- config.json -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["null", "[]", "3", "", "{", '"x"', "true", "[" * 100_000, '{"a":' * 100_000, "\0"])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_what_is_no_object_is_refused(checkpoint: Path, name: str, content: str) -> None:
    (checkpoint / name).write_text(content)
    refused(checkpoint, rf"{name}.*expected an object in JSON|expected an object in JSON.*{name}")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_what_is_no_text_or_no_file_is_refused(checkpoint: Path, name: str) -> None:
    (checkpoint / name).write_bytes(b'{"a": "\xff"}')
    refused(checkpoint, rf"{name}")
    (checkpoint / name).unlink()
    os.mkfifo(checkpoint / name)
    refused(checkpoint, rf"{name}")


@pytest.mark.parametrize("kind", [None, 3, "", ["llama"]])
def test_a_configuration_without_a_family_is_refused(checkpoint: Path, kind: Any) -> None:
    set_in(checkpoint, "config.json", model_type=kind)
    refused(checkpoint, r'expected "model_type" in .*config\.json to name a model family')


def test_a_family_that_nobody_knows_is_one_sentence_and_no_list(checkpoint: Path) -> None:
    set_in(checkpoint, "config.json", model_type="nobody", architectures=["NobodyForCausalLM"])
    refused(checkpoint, "could not be opened .*`nobody`")


ABSURD = [0, -4, 10**9, 10**12, 10**30, "32", 1.5, None, [], True]


@pytest.mark.parametrize("value", ABSURD, ids=shown)
@pytest.mark.parametrize("key", ["vocab_size", "num_hidden_layers", "hidden_size", "num_attention_heads"])
def test_absurd_sizes_are_refused_before_memory_is_taken(checkpoint: Path, key: str, value: Any) -> None:
    set_in(checkpoint, "config.json", **{key: value})
    refused(checkpoint, "config.json|could not be opened|eos_token_id")


@pytest.mark.parametrize("value", [10**9, 10**12, 10**30, -1], ids=shown)
@pytest.mark.parametrize("key", ["intermediate_size", "head_dim", "num_key_value_heads"])
def test_other_absurd_sizes_are_refused_too(checkpoint: Path, key: str, value: int) -> None:
    set_in(checkpoint, "config.json", **{key: value})
    refused(checkpoint, "config.json|could not be opened")


def test_absurd_sizes_of_towers_are_refused(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    for key in ("num_hidden_layers", "hidden_size"):
        values = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]}
        values |= {"text_config": sizes | {"vocab_size": 97, "head_dim": 8}, "vision_config": sizes | {key: 10**9}}
        (tmp_path / "config.json").write_text(json.dumps(values))
        save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
        refused(tmp_path, "asks for .*, and (the|its) weight files hold|could not be opened|does not fit")


def test_tables_that_no_file_holds_are_bounded() -> None:
    network = torch.nn.Module()
    network.register_buffer("positions", torch.empty(10**9, 8, device="meta"), persistent=False)
    stored = [StoredTensor("a", "F32", (1000, 1000), 0, 4_000_000)]
    with pytest.raises(PrunelensError, match=r"tables of 32,000,000,000 bytes"):
        check_fits(network, stored, False, Path("model"))
    network.positions = torch.empty(1000, 8, device="meta")
    check_fits(network, stored, False, Path("model"))


@pytest.mark.parametrize(
    "values",
    [
        {"architectures": 3},
        {"architectures": [3]},
        {"rope_parameters": "x"},
        {"rope_parameters": {"rope_type": "nothing"}},
        {"hidden_act": "nothing"},
        {"dtype": "nothing"},
        {"dtype": 3},
        {"layer_types": ["x"] * 4},
        {"quantization_config": "x"},
        {"quantization_config": {}},
        {"quantization_config": {"quant_method": [1]}},
        {"prunelens": 3},
        {"num_attention_heads": 3},
    ],
    ids=str,
)
def test_settings_of_other_kinds_are_one_sentence(checkpoint: Path, values: dict[str, Any]) -> None:
    set_in(checkpoint, "config.json", **values)
    refused(checkpoint, ".")


# --- weight files ------------------------------------------------------------------------------------------


def header(content: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(content) if length is None else length) + content


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0",
        header(b"{}", 2**62),
        header(b"{}", 2**31),
        header(b"{}"),
        header(b"null"),
        header(b"[" * 100_000),
        header(b'{"a":{"dtype":"F32","shape":[1000000000000,1000000000000],"data_offsets":[0,4]}}') + b"0000",
        header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4000000000]}}') + b"0000",
    ],
    ids=lambda content: content[:24].hex(),
)
def test_headers_that_lie_are_refused(checkpoint: Path, content: bytes) -> None:
    (checkpoint / "model.safetensors").write_bytes(content)
    refused(checkpoint, r"damaged or cut short|weight files hold")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("null", "an object in JSON"),
        ("[" * 100_000, "an object in JSON"),
        ("", "an object in JSON"),
        ("{}", "no safetensors index"),
        ('{"weight_map": {}}', "no safetensors index"),
        ('{"weight_map": []}', "no safetensors index"),
        ('{"weight_map": {"a": 3}}', "no safetensors index"),
        ('{"weight_map": {"a": null}}', "no safetensors index"),
        ('{"weight_map": {"a": "../other/model.safetensors"}}', "in its own folder"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "in its own folder"),
        ('{"weight_map": {"a": "part.bin"}}', "in its own folder"),
        ('{"weight_map": {"a": "absent.safetensors"}}', "lacks absent.safetensors"),
    ],
    ids=lambda value: value[:40],
)
def test_an_index_that_lies_is_refused(checkpoint: Path, content: str, reason: str) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "part.safetensors")
    (checkpoint / "model.safetensors.index.json").write_text(content)
    refused(checkpoint, reason)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", 3, ["a"], "absent.safetensors"])
def test_a_weight_file_outside_the_folder_is_refused(checkpoint: Path, name: Any) -> None:
    set_in(checkpoint, "config.json", transformers_weights=name)
    refused(checkpoint, r"transformers_weights|lacks absent")


# --- weights that say nothing ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "is_zero",
    [
        lambda name: True,
        lambda name: "norm" not in name,
        lambda name: "norm" in name,
        lambda name: "embed" in name,
        lambda name: "lm_head" in name,
        lambda name: "layers" in name,
        lambda name: "mlp" in name,
    ],
    ids=["all", "all but norms", "norms", "embedding", "head", "blocks", "mlps"],
)
def test_weights_of_zeros_open(checkpoint: Path, is_zero: Callable[[str], bool]) -> None:
    path = checkpoint / "model.safetensors"
    tensors = {name: one * (0 if is_zero(name) else 1) for name, one in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    model = load(checkpoint, device="cpu")
    assert [part.kind for block in model.anatomy.blocks for part in block.sublayers] == ["attention", "mlp"] * 4
    with torch.inference_mode():
        found = model.network(input_ids=torch.tensor([[3, 4, 5]])).logits
    if is_zero("lm_head") or is_zero("model.embed_tokens") or is_zero("model.norm"):
        assert not found.any()
    else:
        assert found.isfinite().all()
