"""Repaired checkpoints: what comes back from disk, what other programs make of them, and what is refused."""

import functools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from conftest import COMMON, shared_network, tiny_model, tiny_network, tiny_tokenizer, words
from prunelens import load
from prunelens.api import compare, prune
from prunelens.errors import PrunelensError
from prunelens.models.model import Model
from prunelens.models.opening.loading import wrap
from prunelens.models.opening.repair_files import KEY, REPAIRS
from prunelens.models.saving.bias_parameters import bias_parameters
from prunelens.models.saving.export import export
from prunelens.models.surgery.drop import Drop, dropped
from prunelens.models.surgery.repairs import Repair
from prunelens.pruning.apply import apply
from prunelens.pruning.pruned import Calibration, Pruned
from prunelens.pruning.recipe import parse_recipe
from prunelens.study.prune.prune import NEEDS_US
from prunelens.tasks.prompts import PromptText

TEXTS: list[list[int]] = np.random.default_rng(7).integers(3, 97, (8, 16)).tolist()
IDS = torch.tensor([[5, 40, 7, 90, 11, 3, 64, 22]])
CASES = [
    *(("llama", fit) for fit in ("bias", "linear", "linear,rank=4", "linear,weighted", "folded")),
    *(("gpt2", fit) for fit in ("bias", "linear", "folded")),
    *(("granite", fit) for fit in ("bias", "linear,rank=4", "folded")),
]
DROPS = ("drop-attention@1+drop-block@2+drop-mlp@3", "drop-block@0,2,3")
"""Each kind of sublayer and a block between them; the first block, and two that follow one another up to the last."""
LINEAR = "drop-attention@1+repair:linear"
Repairs = list[dict[str, Any]]
Tensors = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNELENS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    return written_texts(tmp_path / "texts.npy", TEXTS)


def written_texts(path: Path, texts: list[list[int]]) -> Path:
    np.save(path, np.array(texts))
    return path


@functools.cache
def opened(family: str) -> Model:
    """The shared network of a family, opened once; for tests that leave it as it is."""
    return wrap(shared_network(family), tiny_tokenizer(), f"tiny-{family}")


def repaired(model: Model, recipe: str) -> Pruned:
    return apply(parse_recipe(recipe), model, Calibration(TEXTS, TEXTS))


def plain(folder: Path) -> Any:
    """What plain transformers makes of a folder, with no tensor missing or left over."""
    network, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(found.values()), found
    return network.eval()


@torch.no_grad()
def logits(network: Any) -> Tensor:
    found: Tensor = network(input_ids=IDS, use_cache=False).logits
    return found


@torch.no_grad()
def written(network: Any, use_cache: bool = True) -> list[int]:
    """The next 8 tokens, greedily."""
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "use_cache": use_cache}
    found: list[int] = network.generate(IDS, attention_mask=torch.ones_like(IDS), **settings)[0].tolist()
    assert len(found) == IDS.shape[1] + 8
    return found


def close(left: Tensor, right: Tensor) -> bool:
    return torch.allclose(left, right, rtol=0, atol=1e-4)


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return found


def entries_of(folder: Path) -> Repairs:
    found: Repairs = config_of(folder)[KEY].get("repairs", [])
    return found


def assert_comes_back(model: Model, recipe: str, folder: Path) -> Model:
    """The checkpoint, opened by this program, is the model that was repaired in memory."""
    found, variant = load(folder, dtype=model.dtype), repaired(model, recipe).variant
    with variant.running() as whole:
        assert close(logits(found.network), logits(whole.network))
        tokens = written(whole.network)
    assert written(found.network) == tokens
    assert written(found.network, use_cache=False) == tokens
    return found


# --- the way to disk and back ------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "fit"), CASES)
@pytest.mark.parametrize("drop", DROPS)
def test_what_is_saved_comes_back(tmp_path: Path, texts: Path, family: str, drop: str, fit: str) -> None:
    drop = drop.replace("@0,", "@") if fit == "folded" else drop  # nothing comes before block 0
    model, recipe, folder = opened(family), f"{drop}+repair:{fit}", tmp_path / "out"
    result = prune(model, recipe, folder, calibration=texts)
    found = assert_comes_back(model, recipe, folder)
    in_weights = fit == "folded" or ((family, fit) == ("gpt2", "bias") and "@0" not in drop)
    assert (folder / REPAIRS).exists() is not in_weights
    assert close(logits(plain(folder)), logits(found.network)) is in_weights
    assert (NEEDS_US in result.notes) is not in_weights
    assert bool(found.notes) is not in_weights


@pytest.mark.parametrize("drop", ["drop-attention@1", "drop-mlp@2", "drop-block@1"])
def test_other_programs_compute_the_plain_drop(tmp_path: Path, texts: Path, drop: str) -> None:
    model, folder = opened("llama"), tmp_path / "out"
    prune(model, f"{drop}+repair:linear", folder, calibration=texts)
    with apply(parse_recipe(drop), model).variant.running() as bare:
        assert close(logits(plain(folder)), logits(bare.network))
    found = load(folder)
    assert not close(logits(plain(folder)), logits(found.network))
    assert found.notes == [f"{folder} carries 1 repairs of its own, which other programs leave out"]


def test_what_stands_after_a_norm_comes_back(tmp_path: Path, texts: Path) -> None:
    """A post-norm family; the second block of three repairs is followed by the third."""
    model, recipe = opened("gemma2"), "drop-attention@1+drop-mlp@2+drop-block@3+repair:linear"
    prune(model, recipe, tmp_path / "out", calibration=texts)
    assert_comes_back(model, recipe, tmp_path / "out")
    assert entries_of(tmp_path / "out") == [
        {"kind": "attention", "layer_idx": 1},
        {"kind": "mlp", "layer_idx": 2},
        {"kind": "stream", "layer_idx": 3},
    ]


@pytest.mark.parametrize(("family", "fit"), [("llama", "linear"), ("gpt2", "bias")])
def test_repairs_find_their_places_among_renumbered_layers(tmp_path: Path, texts: Path, family: str, fit: str) -> None:
    """Cuts on both sides of a sublayer that is out, and half a block out in front of a cut."""
    model, recipe = opened(family), f"drop-block@0,3+drop-mlp@2+repair:{fit}"
    prune(model, recipe, tmp_path / "out", calibration=texts)
    found = assert_comes_back(model, recipe, tmp_path / "out")
    assert len(found.anatomy.blocks) == 2
    places = [(entry["kind"], entry["layer_idx"]) for entry in entries_of(tmp_path / "out")]
    assert places == [("stream", 0), ("mlp", 1), ("stream", 2)]


@pytest.mark.parametrize("family", ["opt", "starcoder2", "gpt_neox"])
def test_biases_go_into_weights_where_a_family_has_them(tmp_path: Path, texts: Path, family: str) -> None:
    model, recipe, folder = opened(family), "drop-attention@1+drop-block@3+repair:bias", tmp_path / "out"
    prune(model, recipe, folder, calibration=texts)
    found = assert_comes_back(model, recipe, folder)
    assert all("parameter" in entry for entry in entries_of(folder))
    assert not (folder / REPAIRS).exists()
    assert close(logits(plain(folder)), logits(found.network))


def test_biases_in_weights_count_what_the_block_multiplies_by(tmp_path: Path, texts: Path) -> None:
    torch.manual_seed(0)
    values = COMMON | {"residual_multiplier": 0.22, "attention_bias": True, "mlp_bias": True}
    network = AutoModelForCausalLM.from_config(transformers.GraniteConfig(**values)).eval()
    for weight in network.parameters():
        weight.data.normal_(0, 0.2)
    model, recipe, folder = (
        wrap(network, tiny_tokenizer()),
        "drop-attention@1+drop-block@3+repair:bias",
        tmp_path / "out",
    )
    prune(model, recipe, folder, calibration=texts)
    assert not (folder / REPAIRS).exists()
    with repaired(model, recipe).variant.running() as whole:
        expected = logits(whole.network)
    assert close(logits(plain(folder)), expected)
    assert close(logits(load(folder).network), expected)


def test_of_two_biases_one_may_lie_in_the_file(tmp_path: Path, texts: Path) -> None:
    """The MLP before the cut is out itself: its bias holds its own repair, and none that comes after it."""
    model, folder = opened("gpt2"), tmp_path / "out"
    recipe = "drop-mlp@2+drop-block@3+repair:bias"
    result = prune(model, recipe, folder, calibration=texts)
    found = assert_comes_back(model, recipe, folder)
    own, after = entries_of(folder)
    assert own == {"kind": "mlp", "layer_idx": 2, "parameter": "transformer.h.2.mlp.c_proj.bias"}
    assert after == {"kind": "stream", "layer_idx": 3}
    assert set(load_file(folder / REPAIRS)) == {"1.bias"}
    assert NEEDS_US in result.notes
    assert not close(logits(plain(folder)), logits(found.network))
    pruned = repaired(model, recipe)
    with dropped(model.anatomy, pruned.drop, pruned.repairs[:1]):
        assert close(logits(plain(folder)), logits(model.network))


@pytest.mark.parametrize(
    ("dtype", "size"),
    [(torch.float32, 1.0), (torch.float32, 1e-4), (torch.bfloat16, 1.0), (torch.bfloat16, 0.2), (torch.bfloat16, 0.05)],
)
def test_a_norm_behind_a_bias_makes_it_none_that_can_carry(tmp_path: Path, dtype: torch.dtype, size: float) -> None:
    """However small the repair: next to what the sublayer adds, rounding may hide what becomes of it."""
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(transformers.Olmo2Config(**COMMON | {"attention_bias": True}))
    for weight in network.parameters():
        if weight.ndim > 1 or not weight.data.any():
            weight.data.normal_(0, 0.2)
    network.to(dtype).save_pretrained(tmp_path / "dense")
    model, drop, folder = load(tmp_path / "dense", dtype=dtype), Drop(attention=frozenset([1])), tmp_path / "out"
    bias = size * torch.randn(32, generator=torch.Generator().manual_seed(1))
    repairs = [Repair("attention", 1, bias.to(dtype))]
    assert not bias_parameters(model, drop, repairs)
    export(model, folder, drop, repairs=repairs)
    assert set(load_file(folder / REPAIRS)) == {"0.bias"}
    assert entries_of(folder) == [{"kind": "attention", "layer_idx": 1}]
    with dropped(model.anatomy, drop, repairs):
        expected = logits(model.network)
    assert torch.equal(logits(load(folder, dtype=dtype).network), expected)


def test_what_is_quantised_after_a_repair_comes_back(tmp_path: Path, texts: Path) -> None:
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**COMMON | {"hidden_size": 64, "intermediate_size": 128})
    model, recipe = wrap(AutoModelForCausalLM.from_config(config), tiny_tokenizer()), f"{LINEAR}+quantize:int8"
    prune(model, recipe, tmp_path / "out", calibration=texts)
    found = load(tmp_path / "out")
    with repaired(model, recipe).variant.running() as whole:
        assert close(logits(found.network), logits(whole.network))
    assert (tmp_path / "out" / REPAIRS).exists()


@pytest.mark.parametrize(
    ("family", "fit"), [("llama", "linear"), ("llama", "linear,rank=4"), ("gpt2", "bias"), ("llama", "folded")]
)
def test_bfloat16_stays_bfloat16(tmp_path: Path, texts: Path, family: str, fit: str) -> None:
    tiny_network(family, torch.bfloat16).save_pretrained(tmp_path / "dense")
    model = load(tmp_path / "dense", dtype="float32")
    recipe, folder = f"drop-attention@1+drop-block@3+repair:{fit}", tmp_path / "out"
    prune(model, recipe, folder, calibration=texts)
    for path in folder.glob("*.safetensors"):
        assert {tensor.dtype for tensor in load_file(path).values()} == {torch.bfloat16}
    pruned = repaired(model, recipe)
    for weight in pruned.model.network.parameters():
        weight.data = weight.data.bfloat16().float()
    rounded = [repair.in_dtype(torch.bfloat16).in_dtype(torch.float32) for repair in pruned.repairs]
    with dropped(pruned.model.anatomy, pruned.drop, rounded):
        expected = logits(pruned.model.network)
    if family == "gpt2" and fit == "bias":  # the bias of the MLP before the cut is added to, then rounded
        assert torch.allclose(logits(load(folder, dtype="float32").network), expected, rtol=0, atol=0.05)
    else:
        assert close(logits(load(folder, dtype="float32").network), expected)
    assert torch.equal(logits(load(folder).network), logits(load(folder).network))


# --- what is said of it ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "recipe", "in_weights"),
    [
        ("llama", "drop-attention@1+repair:folded", True),
        ("gpt2", "drop-attention@1+repair:bias", True),
        ("llama", "drop-attention@1+repair:bias", False),
        ("llama", LINEAR, False),
        ("gpt2", "drop-block@1+repair:linear,rank=4", False),
    ],
)
def test_the_card_says_who_has_the_repair(
    tmp_path: Path, texts: Path, family: str, recipe: str, in_weights: bool
) -> None:
    prune(opened(family), recipe, tmp_path / "out", calibration=texts)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    in_biases, alone = (
        "The weights carry it: every program that loads this checkpoint has it.",
        "only prunelens reads it",
    )
    assert (in_biases in card, alone in card, REPAIRS in card) == (in_weights, not in_weights, not in_weights)
    assert "Repair: fitted on" in card


def test_the_card_of_a_plain_drop_tells_of_no_repair(tmp_path: Path) -> None:
    prune(opened("llama"), "drop-attention@1", tmp_path / "out")
    assert "Repair" not in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "repairs" not in config_of(tmp_path / "out")[KEY]


def test_repairs_are_part_of_the_fingerprint_and_of_the_size(tmp_path: Path, texts: Path) -> None:
    other = written_texts(tmp_path / "other.npy", TEXTS[:4])
    first, second = tmp_path / "first", tmp_path / "second"
    result = prune(opened("llama"), LINEAR, first, calibration=texts)
    prune(opened("llama"), LINEAR, second, calibration=other)
    shutil.copytree(first, tmp_path / "copy")
    assert config_of(first) == config_of(second)
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    assert (first / REPAIRS).read_bytes() != (second / REPAIRS).read_bytes()
    models = [load(folder) for folder in (first, second, tmp_path / "copy")]
    assert models[0].fingerprint == models[2].fingerprint != models[1].fingerprint
    sizes = [(first / name).stat().st_size for name in ("model.safetensors", REPAIRS)]
    assert models[0].weight_bytes == result.num_bytes == sum(sizes)


# --- what it is good for -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "recipe"),
    [
        (LINEAR, "drop-mlp@2"),
        (LINEAR, "drop-block@1"),
        (LINEAR, "magnitude:0.5"),
        ("drop-block@2+repair:bias", "drop-mlp@2+repair:linear"),
    ],
)
def test_what_is_repaired_is_not_pruned_again(tmp_path: Path, texts: Path, first: str, recipe: str) -> None:
    prune(opened("llama"), first, tmp_path / "out", calibration=texts)
    model, before = load(tmp_path / "out"), sorted(os.listdir(tmp_path))
    for target in ("again", "out"):
        with pytest.raises(PrunelensError, match="expected a model without repairs"):
            prune(model, recipe, tmp_path / target, calibration=texts)
    assert sorted(os.listdir(tmp_path)) == before
    assert close(logits(load(tmp_path / "out").network), logits(model.network))


def test_what_is_repaired_is_compared_like_its_recipe(tmp_path: Path, texts: Path) -> None:
    prune(opened("llama"), LINEAR, tmp_path / "out", calibration=texts)
    prompts = [PromptText("p", "text", ({"role": "user", "content": words(5, 9, 33)},))]
    found = compare(
        tiny_model(),
        LINEAR,
        tmp_path / "out",
        prompts=prompts,
        max_new_tokens=6,
        calibration=str(texts),
        attribute=True,
    )
    recipe, folder = found.summary
    assert recipe["kl"]["mean"] > 0
    assert folder["kl"]["mean"] == pytest.approx(recipe["kl"]["mean"], rel=1e-4)
    sizes = [record["parameters"] for record in found.info["compressed"]]
    assert sizes[0] == sizes[1]


def test_the_other_layout_holds_no_repairs(tmp_path: Path, texts: Path) -> None:
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(PrunelensError, match="nemotron-nas cannot hold repairs"):
        prune(opened("llama"), LINEAR, tmp_path / "out", calibration=texts, layout="nemotron-nas")
    assert sorted(name for name in os.listdir(tmp_path) if name != "cache") == before


# --- what is refused on opening ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with three repairs: attention 1, MLP 2, and what was block 3, after the 3 that are left."""
    folder = tmp_path_factory.mktemp("good")
    calibration = written_texts(folder / "texts.npy", TEXTS)
    recipe = "drop-attention@1+drop-mlp@2+drop-block@3+repair:linear,rank=4"
    prune(opened("llama"), recipe, folder / "out", calibration=calibration)
    return folder / "out"


@pytest.fixture
def copied(good: Path, tmp_path: Path) -> Path:
    shutil.copytree(good, tmp_path / "copied")
    return tmp_path / "copied"


def with_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    config = config_of(folder)
    change(config)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def test_the_checkpoint_that_is_spoilt_below_is_good(copied: Path) -> None:
    assert load(copied).notes == [f"{copied} carries 3 repairs of its own, which other programs leave out"]
    assert [(entry["kind"], entry["layer_idx"]) for entry in entries_of(copied)] == [
        ("attention", 1),
        ("mlp", 2),
        ("stream", 3),
    ]


@pytest.mark.parametrize("repairs", [None, {}, {"0": {}}, "attention", 5, True, 0.5])
def test_repairs_that_are_no_list_are_refused(copied: Path, repairs: Any) -> None:
    with_config(copied, lambda config: config[KEY].update(repairs=repairs))
    with pytest.raises(PrunelensError, match=r"a list of repairs in the entry 'prunelens' of config\.json"):
        load(copied)


@pytest.mark.parametrize("entry", [None, 5, "attention", [], ["attention", 1], {}, {"kind": "attention"}])
def test_entries_that_are_no_repairs_are_refused(copied: Path, entry: Any) -> None:
    with_config(copied, lambda config: config[KEY]["repairs"].__setitem__(0, entry))
    with pytest.raises(PrunelensError, match=r"repairs of attention, mlp or stream .*config\.json"):
        load(copied)


@pytest.mark.parametrize(
    ("index", "change"),
    [
        (0, {"kind": "block"}),
        (0, {"kind": "heads"}),
        (0, {"kind": None}),
        (0, {"kind": 5}),
        (0, {"kind": ["attention"]}),
        (0, {"kind": {}}),
        (0, {"layer_idx": 3}),
        (0, {"layer_idx": -1}),
        (0, {"layer_idx": True}),
        (0, {"layer_idx": 1.0}),
        (0, {"layer_idx": "1"}),
        (0, {"layer_idx": None}),
        (0, {"layer_idx": [1]}),
        (0, {"layer_idx": 10**30}),
        (2, {"layer_idx": 4}),
        (2, {"layer_idx": -1}),
        (2, {"layer_idx": False}),
        (0, {"layer_idx": 0}),
        (0, {"layer_idx": 2}),
        (0, {"kind": "mlp"}),
        (1, {"kind": "attention"}),
        (0, {"parameter": "model.layers.1.nowhere.bias"}),
        (0, {"parameter": "model.layers.1"}),
        (0, {"parameter": ""}),
        (0, {"parameter": "."}),
        (0, {"parameter": 5}),
        (0, {"parameter": False}),
        (0, {"parameter": ["model.norm.weight"]}),
        (0, {"parameter": {}}),
        (0, {"parameter": "lm_head.weight"}),
        (2, {"parameter": "lm_head.weight"}),
        (0, {"parameter": "model.norm.weight"}),
    ],
)
def test_entries_that_lie_are_refused(copied: Path, index: int, change: dict[str, Any]) -> None:
    with_config(copied, lambda config: config[KEY]["repairs"][index].update(change))
    with pytest.raises(PrunelensError, match=r"config\.json"):
        load(copied)


@pytest.mark.parametrize("parameter", [None, "norm", "part"])
@pytest.mark.parametrize(("kind", "layer_idx"), [("attention", 1), ("attention", 3), ("mlp", 0), ("mlp", 2)])
def test_sublayers_that_a_hybrid_does_not_have_are_refused(
    tmp_path: Path, kind: str, layer_idx: int, parameter: str | None
) -> None:
    """A record that says they are dropped, alone and with a repair in a parameter of that layer or of another."""
    network = opened("nemotron_h").network
    assert opened("nemotron_h").anatomy.blocks[layer_idx].find(kind) is None
    network.save_pretrained(tmp_path / "out")
    fitting = [name for name, weight in network.named_parameters() if weight.shape == (32,)]
    entry: dict[str, Any] = {"dropped": {"attention": [], "mlp": []} | {kind: [layer_idx]}, "recipe": "x"}
    if parameter is not None:
        own = next(name for name in fitting if f".{layer_idx}." in name)
        name = own if parameter == "part" else fitting[-1]
        entry["repairs"] = [{"kind": kind, "layer_idx": layer_idx, "parameter": name}]
    with_config(tmp_path / "out", lambda config: config.update({KEY: entry}))
    with pytest.raises(PrunelensError, match=r"layers that have the part under dropped .* config\.json"):
        load(tmp_path / "out")


def test_a_null_entry_is_none(copied: Path) -> None:
    with_config(copied, lambda config: config.update({KEY: None}))
    assert close(logits(load(copied).network), logits(plain(copied)))


def test_without_its_entry_the_file_is_not_read(copied: Path) -> None:
    with_config(copied, lambda config: config[KEY].pop("repairs"))
    assert close(logits(load(copied).network), logits(plain(copied)))


def changed(name: str, value: Tensor | None) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        del tensors[name]
        if value is not None:
            tensors[name] = value

    return change


def spoilt(name: str, value: float) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name].view(-1)[3] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        changed("0.bias", None),
        changed("1.down", None),
        changed("2.up", None),
        changed("0.bias", torch.ones(31)),
        changed("0.bias", torch.ones(32, 1)),
        changed("0.bias", torch.ones(())),
        changed("1.down", torch.ones(31, 4)),
        changed("1.down", torch.ones(32, 5)),
        changed("1.down", torch.ones(32)),
        changed("1.down", torch.ones(1, 32, 4)),
        changed("1.down", torch.ones(())),
        changed("2.up", torch.ones(4, 31)),
        changed("2.up", torch.ones(3, 32)),
        changed("2.up", torch.ones(32)),
        changed("2.up", torch.ones(())),
        spoilt("0.bias", torch.nan),
        spoilt("1.down", torch.inf),
        spoilt("2.up", -torch.inf),
    ],
)
def test_tensors_that_do_not_fit_are_refused(copied: Path, change: Callable[[Tensors], None]) -> None:
    tensors = load_file(copied / REPAIRS)
    change(tensors)
    save_file(tensors, copied / REPAIRS, metadata={"format": "pt"})
    with pytest.raises(PrunelensError, match=rf"config\.json|{REPAIRS}"):
        load(copied)


@pytest.mark.parametrize("name", ["0.bias", "1.down", "2.up"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_tensors_of_a_strange_dtype_are_refused(copied: Path, dtype: torch.dtype, name: str) -> None:
    tensors = load_file(copied / REPAIRS)
    tensors[name] = tensors[name].to(dtype)
    save_file(tensors, copied / REPAIRS, metadata={"format": "pt"})
    with pytest.raises(PrunelensError, match=rf"{REPAIRS}, found {dtype} in '{name}'"):
        load(copied)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_tensors_of_other_floats_are_read(copied: Path, dtype: torch.dtype) -> None:
    expected = logits(load(copied).network)
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(copied / REPAIRS).items()}
    save_file(tensors, copied / REPAIRS, metadata={"format": "pt"})
    assert torch.allclose(logits(load(copied).network), expected, rtol=0, atol=0.1)


@pytest.mark.parametrize("kept", [0, 5, 100, -1, -500])
def test_a_file_cut_short_is_refused(copied: Path, kept: int) -> None:
    content = (copied / REPAIRS).read_bytes()
    (copied / REPAIRS).write_bytes(content[:kept])
    with pytest.raises(PrunelensError, match=f"{REPAIRS} is damaged or cut short"):
        load(copied)


def test_a_file_of_something_else_is_refused(copied: Path) -> None:
    (copied / REPAIRS).write_text("version https://git-lfs.github.com/spec/v1\n", encoding="utf-8")
    with pytest.raises(PrunelensError, match=REPAIRS):
        load(copied)
    (copied / REPAIRS).unlink()
    (copied / REPAIRS).mkdir()
    with pytest.raises(PrunelensError, match=REPAIRS):
        load(copied)


def test_a_file_that_is_missing_is_refused(copied: Path) -> None:
    (copied / REPAIRS).unlink()
    with pytest.raises(PrunelensError, match=rf"expected {REPAIRS} beside the weights, as config\.json says"):
        load(copied)


def test_biases_in_the_weights_of_a_sublayer_that_still_works_are_refused(tmp_path: Path, texts: Path) -> None:
    prune(opened("gpt2"), "drop-attention@1+repair:bias", tmp_path / "out", calibration=texts)
    state = load_file(tmp_path / "out" / "model.safetensors")
    name = next(name for name in state if name.endswith("h.1.attn.c_proj.weight"))
    state[name].normal_()
    save_file(state, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PrunelensError, match=r"config\.json says that sublayers are zeroed"):
        load(tmp_path / "out")


def test_nothing_is_left_of_a_checkpoint_whose_repairs_come_out_wrong(
    tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(os.listdir(tmp_path))

    def spoiling(tensors: Tensors, *args: Any, **more: Any) -> None:
        save_file({name: 2 * tensor for name, tensor in tensors.items()}, *args, **more)

    monkeypatch.setattr("prunelens.models.opening.repair_files.save_file", spoiling)
    with pytest.raises(PrunelensError, match="written, opened again and removed"):
        prune(opened("llama"), LINEAR, tmp_path / "out", calibration=texts)
    assert sorted(name for name in os.listdir(tmp_path) if name != "cache") == before


def test_a_repair_before_the_first_part_cannot_be_folded(tmp_path: Path, texts: Path) -> None:
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(PrunelensError, match="nothing comes before the first part that is out"):
        prune(opened("llama"), "drop-block@0+repair:folded", tmp_path / "out", calibration=texts)
    assert sorted(name for name in os.listdir(tmp_path) if name != "cache") == before
