"""Saving a pruned model: plain transformers opens it, it computes the same, or nothing is left behind."""

import copy
import json
import os
import re
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import COMMON, MOE, shared_network, tiny_model, tiny_tokenizer
from prunelens.errors import PrunelensError
from prunelens.models.model import Model
from prunelens.models.opening.loading import load, wrap
from prunelens.models.opening.record import recorded_drop
from prunelens.models.saving import nemotron_nas
from prunelens.models.saving.export import NUM_STEPS, Exported, export
from prunelens.models.surgery.drop import Drop, dropped, remove
from prunelens.models.surgery.experts import mask_experts
from prunelens.models.surgery.mixtures import find_mixtures
from prunelens.models.surgery.shared_copy import shared_copy_of

TEXT = torch.tensor([[5, 40, 7, 90, 11, 3, 64, 22, 9, 31, 8, 77]])
QUIET = pytest.mark.filterwarnings("ignore")  # families warn about tiny sizes


def layers(*indices: int) -> frozenset[int]:
    return frozenset(indices)


def opened(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """What plain transformers makes of a folder, with no tensor missing or left over."""
    network, found = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(found.values()), found
    return network.eval()


def logits(network: Any) -> torch.Tensor:
    with torch.inference_mode():
        return network(input_ids=TEXT, use_cache=False).logits


def written(network: Any) -> list[int]:
    """The next tokens, greedily, with the cache."""
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    with torch.inference_mode():
        return network.generate(TEXT, attention_mask=torch.ones_like(TEXT), **settings)[0].tolist()


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def built(kind: type, values: dict[str, Any]) -> Model:
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(kind(**values)).eval()
    for weight in network.parameters():
        weight.data.normal_(0, 0.2)
    return wrap(network, tiny_tokenizer())


# --- every family ------------------------------------------------------------------------------------------


def drops(model: Model) -> Iterator[Drop]:
    """First, middle and last block; each kind of sublayer alone, beside a block that is cut before it."""
    last = len(model.anatomy.blocks) - 1
    middle = 2 if model.network.config.model_type == "qwen3_next" else 1  # its layer 1 is its only attention
    for cut in (0, middle, last):
        yield Drop(block=layers(cut))
    for kind in ("attention", "mlp"):
        holders = [part.layer_idx for part in model.anatomy.sublayers(kind) if part.layer_idx != middle]
        if holders:
            yield Drop(block=layers(middle), **{kind: layers(holders[0], holders[-1])})


@QUIET
def test_what_is_saved_computes_what_the_model_computes(tmp_path: Path, any_family: str) -> None:
    model = wrap(shared_network(any_family), tiny_tokenizer())
    before = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    settings = model.network.config.to_dict()
    for drop in drops(model):
        found = export(model, tmp_path / "pruned", drop)
        assert found.max_difference == 0.0
        network = opened(tmp_path / "pruned")
        assert network.config.num_hidden_layers == len(model.anatomy.blocks) - 1
        with dropped(model.anatomy, drop):
            assert torch.equal(logits(network), logits(model.network)), drop
            assert written(network) == written(model.network), drop
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.network.state_dict().items())
    assert model.network.config.to_dict() == settings
    assert os.listdir(tmp_path) == ["pruned"]


@QUIET
@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "mamba", "gemma2"])
def test_other_dtypes_come_back_as_they_were(tmp_path: Path, name: str, dtype: str) -> None:
    shared_network(name).save_pretrained(tmp_path / "dense")
    model = load(str(tmp_path / "dense"), dtype=dtype)
    found = export(model, tmp_path / "pruned", Drop(attention=layers(0), block=layers(3)))
    assert opened(tmp_path / "pruned", model.dtype).get_input_embeddings().weight.dtype == model.dtype
    assert config_of(tmp_path / "pruned")["dtype"] == dtype
    assert found.max_difference == 0.0


# --- settings that speak of layers -------------------------------------------------------------------------

SPARSE = MOE | {"head_dim": 8, "num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]}


@QUIET
@pytest.mark.parametrize("cut", [(0,), (2,), (1, 4)])
@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (transformers.Qwen3MoeConfig, SPARSE),
        (transformers.Qwen2Config, COMMON | {"num_hidden_layers": 6, "use_sliding_window": True, "sliding_window": 4}
         | {"max_window_layers": 3}),
        (transformers.SmolLM3Config, COMMON | {"num_hidden_layers": 6, "no_rope_layer_interval": 3}),
        (transformers.Gemma3TextConfig, COMMON | {"num_hidden_layers": 6, "head_dim": 8, "sliding_window": 4}
         | {"sliding_window_pattern": 3}),
        (transformers.LlamaConfig, COMMON | {"num_hidden_layers": 6, "eos_token_id": [2, 3, 4, 5, 6, 7]}),
    ],
)  # fmt: skip
def test_what_follows_from_the_index_stays_with_its_layer(
    tmp_path: Path, kind: type, values: dict[str, Any], cut: tuple[int, ...]
) -> None:
    model, drop = built(kind, values), Drop(block=layers(*cut))
    assert export(model, tmp_path / "pruned", drop).max_difference == 0.0
    network = opened(tmp_path / "pruned")
    with dropped(model.anatomy, drop):
        assert torch.equal(logits(network), logits(model.network))
    assert network.config.eos_token_id == model.network.config.eos_token_id


@pytest.mark.parametrize(
    ("name", "values", "cut", "reason"),
    [
        ("jamba", {}, 2, "in layer 3 other parts would be used"),
        ("qwen3_next", {}, 1, "none of its attention layers would stay"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, 1, "in layer 2 attn would have scaling"),
    ],
)
@QUIET
def test_what_cannot_be_expressed_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, values: dict[str, Any], cut: int, reason: str
) -> None:
    network = shared_network(name)
    if values:
        config = copy.deepcopy(network.config)
        config.update(values)
        network = AutoModelForCausalLM.from_config(config).eval()
    model = wrap(network)
    monkeypatch.setattr("tempfile.mkdtemp", lambda **_: pytest.fail("something was written"))
    with pytest.raises(PrunelensError, match=rf"cannot be written as a checkpoint .*{reason}.*drop other blocks"):
        export(model, tmp_path / "pruned", Drop(block=layers(cut)))
    assert os.listdir(tmp_path) == []


@QUIET
def test_the_last_block_may_go_where_settings_follow_from_the_index(tmp_path: Path) -> None:
    config = copy.deepcopy(shared_network("gpt2").config)
    config.scale_attn_by_inverse_layer_idx = True
    model = wrap(AutoModelForCausalLM.from_config(config).eval())
    assert export(model, tmp_path / "pruned", Drop(block=layers(3))).max_difference == 0.0


# --- what stands in the folder -----------------------------------------------------------------------------


def test_zeroed_sublayers_are_recorded_in_the_new_numbering(tmp_path: Path) -> None:
    model = tiny_model()
    drop = Drop(attention=layers(0, 3), mlp=layers(2), block=layers(1))
    found = export(model, tmp_path / "pruned", drop, recipe="drop-attention@0,3")
    entry = config_of(found.folder)["prunelens"]
    assert entry == {"dropped": {"attention": [0, 2], "mlp": [1]}, "recipe": "drop-attention@0,3"}
    network = opened(found.folder)
    assert recorded_drop(network.config) == Drop(attention=layers(0, 2), mlp=layers(1))
    zeros = sorted(name for name, weight in network.named_parameters() if not weight.any())
    projections = ["0.self_attn.o_proj", "1.mlp.down_proj", "2.self_attn.o_proj"]
    assert zeros == [f"model.layers.{name}.weight" for name in projections]
    before = logits(network)
    again = wrap(network)
    remove(again.anatomy, recorded_drop(network.config))
    assert torch.equal(logits(again.network), before)


def test_a_checkpoint_can_be_pruned_again(tmp_path: Path) -> None:
    """Whether its zeroed sublayers are still there or have been removed."""
    export(tiny_model(), tmp_path / "first", Drop(attention=layers(2)))
    for name in ("kept", "removed"):
        model = wrap(opened(tmp_path / "first"))
        if name == "removed":
            remove(model.anatomy, recorded_drop(model.network.config))
        found = export(model, tmp_path / name, Drop(block=layers(0), mlp=layers(3)))
        assert found.max_difference == 0.0
        assert config_of(found.folder)["prunelens"]["dropped"] == {"attention": [1], "mlp": [2]}


def test_tokenizer_card_settings_and_sizes_are_there(tmp_path: Path) -> None:
    model = tiny_model()
    model.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    model.network.generation_config.temperature = 0.3  # without sampling, which transformers refuses to save
    model.network.config.quantization_config = None
    steps: list[int] = []
    found = export(model, tmp_path / "pruned", Drop(block=layers(0)), card="# ½ a llama\n", advance=steps.append)
    names = set(os.listdir(found.folder))
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"} <= names
    assert (found.folder / "README.md").read_text(encoding="utf-8") == "# ½ a llama\n"
    assert AutoTokenizer.from_pretrained(found.folder).chat_template == model.tokenizer.chat_template
    assert "quantization_config" not in config_of(found.folder)
    assert "_name_or_path" not in config_of(found.folder)
    assert config_of(found.folder)["architectures"] == ["LlamaForCausalLM"]
    assert found.parameters == sum(weight.numel() for weight in opened(found.folder).parameters())
    assert found.num_bytes == (found.folder / "model.safetensors").stat().st_size
    assert steps == [1] * NUM_STEPS
    assert load(str(found.folder)).tokenizer is not None


def test_everybody_may_read_it(tmp_path: Path) -> None:
    export(tiny_model(), tmp_path / "out")
    files = [path for path in (tmp_path / "out").iterdir() if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o644}


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    model = built(transformers.LlamaConfig, COMMON | {"tie_word_embeddings": True})
    found = export(model, tmp_path / "pruned", Drop(block=layers(0)))
    network = opened(found.folder)
    assert network.lm_head.weight is network.model.embed_tokens.weight
    assert found.parameters == sum(weight.numel() for weight in network.parameters())


def test_finish_makes_the_weights(tmp_path: Path) -> None:
    """What it does not make is added; the difference it causes is told, not refused."""
    model = tiny_model()

    def coarser(plain: Path, out: Path) -> None:
        network = opened(plain)
        assert os.listdir(out) == []
        for weight in network.parameters():
            weight.data.mul_(8).round_().div_(8)
        network.save_pretrained(out)

    found = export(model, tmp_path / "pruned", Drop(block=layers(1)), finish=coarser, card="card")
    assert found.max_difference > 0.1
    assert {"tokenizer.json", "README.md", "config.json", "model.safetensors"} <= set(os.listdir(found.folder))
    assert not {"plain", "parts"} & set(os.listdir(found.folder))
    assert "prunelens" in config_of(found.folder)


@QUIET
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "olmoe", "jamba"])
def test_dropped_experts_are_sliced_out_beside_other_parts(tmp_path: Path, name: str) -> None:
    twin = shared_copy_of(wrap(shared_network(name)))
    experts = {layer: [layer % 4] for layer in find_mixtures(twin) if layer != 0}
    mask_experts(twin, experts)
    drop = Drop(block=layers(0), attention=layers(3))
    if 0 not in find_mixtures(twin):
        drop = Drop(block=layers(3), attention=layers(1))
    experts = {layer: gone for layer, gone in experts.items() if layer not in drop.block}
    assert export(twin, tmp_path / "pruned", drop, experts).max_difference < 1e-5
    network = opened(tmp_path / "pruned")
    with dropped(twin.anatomy, drop):
        torch.testing.assert_close(logits(network), logits(twin.network), rtol=1e-5, atol=1e-5)
    assert 3 in {tensor.shape[0] for name, tensor in network.named_parameters() if "experts" in name}


# --- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("drop", "said"),
    [
        (Drop(block=layers(0, 1, 2, 3)), "at least one block"),
        (Drop(block=layers(4)), "no such part in layer 4"),
        (Drop(attention=layers(-1)), "no such part in layer -1"),
        (Drop(mlp=layers(99)), "no such part in layer 99"),
    ],
)
def test_parts_that_are_not_there_are_refused(tmp_path: Path, drop: Drop, said: str) -> None:
    with pytest.raises(PrunelensError, match=said):
        export(tiny_model(), tmp_path / "pruned", drop)
    assert os.listdir(tmp_path) == []


def test_a_quantised_model_and_an_unknown_layout_are_refused(tmp_path: Path) -> None:
    model = tiny_model()
    with pytest.raises(PrunelensError, match="layout of transformers, nemotron-nas, found 'gguf'"):
        export(model, tmp_path / "pruned", layout="gguf")
    model.network.config.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(PrunelensError, match="quantised; name the dense model"):
        export(model, tmp_path / "pruned")


def test_offloaded_weights_are_refused(tmp_path: Path) -> None:
    model = tiny_model()
    model.network.lm_head.to("meta")
    with pytest.raises(PrunelensError, match="tiny-llama is offloaded"):
        export(model, tmp_path / "pruned", Drop(block=layers(0)))
    assert os.listdir(tmp_path) == []


def test_weights_that_finish_does_not_make_are_missed(tmp_path: Path) -> None:
    def nothing(plain: Path, out: Path) -> None:
        (out / "config.json").write_bytes((plain / "config.json").read_bytes())

    with pytest.raises(PrunelensError, match="opened again and removed, because it does not open"):
        export(tiny_model(), tmp_path / "pruned", Drop(block=layers(0)), finish=nothing)
    assert os.listdir(tmp_path) == []


def test_only_an_earlier_checkpoint_of_ours_is_replaced(tmp_path: Path, checkpoint: Path) -> None:
    model = tiny_model()
    before = (checkpoint / "model.safetensors").read_bytes()
    with pytest.raises(PrunelensError, match=r"new folder or an earlier checkpoint .*neither"):
        export(model, checkpoint, Drop(block=layers(0)))
    assert (checkpoint / "model.safetensors").read_bytes() == before
    for cut in (0, 1):
        export(model, tmp_path / "pruned", Drop(block=layers(*range(cut + 1))))
    assert config_of(tmp_path / "pruned")["num_hidden_layers"] == 2


def record(**changes: Any) -> dict[str, Any]:
    return {"dropped": {"attention": [0], "mlp": []} | changes, "recipe": ""}


@pytest.mark.parametrize(
    "found",
    [
        7, "drop", [], {}, {"dropped": None}, {"dropped": {"attention": [0]}}, record(block=[0]),
        record(mlp=0), record(mlp=[4]), record(mlp=[-1]), record(mlp=[0.0]), record(mlp=[True]), record(mlp=["0"]),
        record(mlp=[1, 1]), record(mlp=[None]), record(mlp=[[0]]), record(attention={"0": 0}),
        record(mlp=list(range(10**5))), record(mlp=["x" * 10**5]),
    ],
)  # fmt: skip
def test_a_strange_record_is_refused(found: Any) -> None:
    config = transformers.LlamaConfig(**COMMON, prunelens=found)
    with pytest.raises(PrunelensError, match=r"in the entry 'prunelens' of config\.json, found") as caught:
        recorded_drop(config)
    assert len(str(caught.value)) < 300


def test_no_record_is_no_drop() -> None:
    assert recorded_drop(transformers.LlamaConfig(**COMMON)) == Drop()
    assert recorded_drop(transformers.LlamaConfig(**COMMON, prunelens=record())) == Drop(attention=layers(0))


# --- whole or not at all -----------------------------------------------------------------------------------


def test_a_checkpoint_that_computes_something_else_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = transformers.modeling_utils.safe_save_file

    def damaged(tensors: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> None:
        save({name: tensor * 1.01 for name, tensor in tensors.items()}, *args, **kwargs)

    def lacking(tensors: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> None:
        save({name: tensor for name, tensor in tensors.items() if "down_proj" not in name}, *args, **kwargs)

    def nan(tensors: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> None:
        save({name: tensor * torch.nan for name, tensor in tensors.items()}, *args, **kwargs)

    for spoil, said in ((damaged, "logits differ by up to"), (lacking, "3 tensors are missing"), (nan, "NaN")):
        monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", spoil)
        with pytest.raises(PrunelensError, match=f"opened again and removed, because .*{said}"):
            export(tiny_model(), tmp_path / "pruned", Drop(block=layers(0)))
        assert os.listdir(tmp_path) == []


def full_when_saving(monkeypatch: pytest.MonkeyPatch, name: str, error: Exception) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(name, full)


@pytest.mark.parametrize(
    ("place", "error"),
    [
        (
            "transformers.modeling_utils.safe_save_file",
            SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        ),
        ("transformers.modeling_utils.safe_save_file", OSError(28, "No space left on device")),
        (
            "transformers.PreTrainedTokenizerFast.save_pretrained",
            Exception("No space left on device (os error 28)"),
        ),
        ("pathlib.Path.rename", OSError(28, "No space left on device")),
    ],
)
def test_a_full_disk_is_told_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, error: Exception
) -> None:
    full_when_saving(monkeypatch, place, error)
    with pytest.raises(PrunelensError, match=r"checkpoint cannot be written to .*No space left on device\); free"):
        export(tiny_model(), tmp_path / "a" / "pruned", Drop(block=layers(0)))
    assert os.listdir(tmp_path) == []


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("size", [10, 600, 40_000])
def test_a_disk_that_takes_no_more_is_told_in_a_sentence(tmp_path: Path, size: int) -> None:
    with largest_file(size), pytest.raises(PrunelensError, match=r"cannot be written to .*File too large"):
        export(tiny_model(), tmp_path / "pruned", Drop(block=layers(0)))
    assert os.listdir(tmp_path) == []


def killed_at(event: int, folder: Path, work: Callable[[], object]) -> bool:
    """Run `work` in a child that is killed at its nth use of a file in `folder`; whether it was."""
    child = os.fork()
    if child == 0:
        seen = 0

        def hook(name: str, args: tuple[Any, ...]) -> None:
            nonlocal seen
            if any(isinstance(value, str | Path) and str(value).startswith(str(folder)) for value in args):
                seen += 1
                if seen == event:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@QUIET
@pytest.mark.parametrize("earlier", [False, True])
def test_a_process_killed_at_any_moment_leaves_nothing_that_opens(tmp_path: Path, earlier: bool) -> None:
    model = tiny_model()
    whole = set(os.listdir(export(model, tmp_path / "whole", Drop(block=layers(0))).folder))
    events = 0
    for event in range(1, 300, 3 if earlier else 1):
        place = tmp_path / str(event)
        target = place / "pruned"
        place.mkdir()
        if earlier:
            export(model, target, Drop(block=layers(0, 1)))
        if not killed_at(event, place, lambda target=target: export(model, target, Drop(block=layers(0)))):
            break
        events += 1
        if target.exists():
            assert set(os.listdir(target)) == whole
            assert opened(target).config.num_hidden_layers in ((2, 3) if earlier else (3,))
        for hidden in (path for path in place.glob(".pruned.*") if path.is_dir()):
            assert "config.json" not in os.listdir(hidden) or set(os.listdir(hidden)) - {"parts"} == whole
    assert events > (5 if earlier else 20)


@QUIET
def test_half_written_weights_do_not_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = transformers.modeling_utils.safe_save_file

    def half(tensors: Any, path: str, **kwargs: Any) -> None:
        save(tensors, path, **kwargs)
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", half)
    model = tiny_model()
    assert killed_at(10**9, tmp_path, lambda: export(model, tmp_path / "pruned", Drop(block=layers(0))))
    assert not (tmp_path / "pruned").exists()
    for folder in [path for path in tmp_path.rglob("*") if path.is_dir()]:
        with pytest.raises(PrunelensError):
            load(str(folder))


# --- the layout nemotron-nas -------------------------------------------------------------------------------

WIDE = COMMON | {"intermediate_size": 256}
NAS = Drop(attention=layers(1), mlp=layers(2), block=layers(0))


def nas(tmp_path: Path, drop: Drop = NAS, kind: type = transformers.LlamaConfig, **changes: Any) -> Exported:
    return export(built(kind, WIDE | changes), tmp_path / "nas", drop, layout="nemotron-nas")


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (transformers.LlamaConfig, {}),
        (transformers.LlamaConfig, {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
        (transformers.MistralConfig, {"sliding_window": None}),
    ],
)
def test_sublayers_are_left_out(tmp_path: Path, kind: type, changes: dict[str, Any]) -> None:
    drop = Drop(attention=layers(2, 3), mlp=layers(1, 3), block=layers(0))
    found = nas(tmp_path, drop, kind, **changes)
    assert found.max_difference == 0.0
    config = config_of(found.folder)
    assert config["model_type"] == "nemotron-nas"
    assert config["architectures"] == ["DeciLMForCausalLM"]
    assert config["num_hidden_layers"] == len(config["block_configs"]) == 3
    assert config["num_key_value_heads"] is config["intermediate_size"] is None
    attention, mlp = ([block[name] for block in config["block_configs"]] for name in ("attention", "ffn"))
    assert [one["no_op"] for one in attention] == [False, True, True]
    assert [one["n_heads_in_group"] for one in attention] == [2, None, None]
    assert [one["no_op"] for one in mlp] == [True, False, True]
    assert [one["ffn_mult"] for one in mlp] == [None, 12.0, None]
    assert int(2 * 12.0 * config["hidden_size"] / 3) == 256
    state = nemotron_nas.load_file(found.folder / "model.safetensors")
    inside = {re.sub(r"^model\.layers\.(\d+\.\w+)\..*", r"\1", name) for name in state if "layers" in name}
    assert inside == {"0.self_attn", "0.input_layernorm", "1.mlp", "1.post_attention_layernorm"}
    assert found.parameters == sum(tensor.numel() for tensor in state.values())


@pytest.mark.parametrize(
    ("kind", "changes", "drop", "said"),
    [
        (transformers.Qwen3Config, {"head_dim": 8}, NAS, "a family of llama or mistral, found qwen3"),
        (transformers.MambaConfig, {}, Drop(), "a family of llama or mistral, found mamba"),
        (transformers.MistralConfig, {"sliding_window": 6}, NAS, "no sliding window, found one of 6 tokens"),
        (transformers.LlamaConfig, {"head_dim": 16}, NAS, "heads of 32 / 4 values, found 16"),
        (transformers.LlamaConfig, {"intermediate_size": 300}, NAS, "a multiple of 256, found 300"),
        (transformers.LlamaConfig, {}, Drop(attention=layers(0)), "the attention of layer 0 to stay"),
        (
            transformers.LlamaConfig,
            {},
            Drop(attention=layers(0, 1), mlp=layers(0)),
            "the attention of layer 1 to stay",
        ),
    ],
)
def test_what_the_layout_cannot_say_is_refused(
    tmp_path: Path, kind: type, changes: dict[str, Any], drop: Drop, said: str
) -> None:
    with pytest.raises(PrunelensError, match=f"layout nemotron-nas needs .*{said}.*choose the layout transformers"):
        nas(tmp_path, drop, kind, **changes)
    assert os.listdir(tmp_path) == []


def test_several_files_are_converted_with_their_index(tmp_path: Path) -> None:
    model = built(transformers.LlamaConfig, WIDE)
    plain, out = export(model, tmp_path / "plain", Drop(attention=layers(2))).folder, tmp_path / "out"
    network = opened(plain)
    (plain / "model.safetensors").unlink()
    network.save_pretrained(plain, max_shard_size="100KB")
    out.mkdir()
    nemotron_nas.convert(plain, out)
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 1
    assert set(index) == {
        name
        for name in network.state_dict()
        if not name.startswith(("model.layers.2.self_attn", "model.layers.2.input_layernorm"))
    }
    again = nemotron_nas.read_back(out, type(network), network.config)
    assert torch.equal(logits(again), logits(network))
    next(out.glob("*-00001-of-*.safetensors")).unlink()
    with pytest.raises(PrunelensError, match="missing or unexpected"):
        nemotron_nas.read_back(out, type(network), network.config)
