"""Pruned checkpoints: what is on disk, what is said of it, that it opens elsewhere, and that nothing else is left."""

import errno
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

import prunelens.cli.main
from conftest import COMMON, tiny_network, tiny_tokenizer, words
from prunelens.api import compare, prune
from prunelens.errors import PrunelensError
from prunelens.models.model import Model
from prunelens.models.opening.loading import load
from prunelens.models.surgery.drop import num_parameters
from prunelens.pruning.apply import apply
from prunelens.pruning.calibration import read_calibration
from prunelens.pruning.pruned import Calibration, Pruned
from prunelens.pruning.recipe import parse_recipe
from prunelens.results import Comparison
from prunelens.study.prune.card import model_card
from prunelens.study.prune.prune import PruneResult

Cli = Callable[..., tuple[int, str, str]]

IDS = torch.tensor([[5, 9, 31, 7, 50, 12]])
TEXTS = f"{words(*range(3, 30))}\n"
ATTENTION = 2 * 32 * 32 + 2 * 16 * 32 + 32
"""Numbers in an attention sublayer of the tiny llama and in its norm."""
MLP = 3 * 32 * 48 + 32
PROJECTION = re.compile(r"layers\.\d+\.(self_attn|mlp)\..*weight")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNELENS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text(TEXTS, encoding="utf-8")
    return path


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    """A checkpoint whose matrices all have a multiple of 32 inputs."""
    torch.manual_seed(0)
    config = LlamaConfig(**COMMON | {"hidden_size": 64, "intermediate_size": 128})
    return save(AutoModelForCausalLM.from_config(config), tmp_path / "wide")


def save(network: Any, folder: Path) -> Path:
    network.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def logits(network: Any) -> torch.Tensor:
    with torch.inference_mode():
        return network.eval()(IDS).logits


def reopened(folder: Path) -> Any:
    """What plain transformers makes of a folder, where every tensor has found its place."""
    network, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    return network


def variant_logits(pruned: Pruned) -> torch.Tensor:
    with pruned.variant.running() as model:
        return logits(model.network)


def pruned_in_memory(model: Model, recipe: str, texts: Path) -> Pruned:
    return apply(parse_recipe(recipe), model, Calibration(read_calibration(texts, model)))


def zeros(network: Any) -> float:
    """Share of zeros in the projections of attention and MLP."""
    weights = [weight for name, weight in network.named_parameters() if PROJECTION.search(name)]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


def stored_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def tree(folder: Path) -> dict[str, str]:
    """Every file below a folder, hidden ones too, and what it holds; folders by name."""
    return {
        str(path.relative_to(folder)): "" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if "cache" not in path.relative_to(folder).parts
    }


# --- what is saved -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "layers", "gone", "sparsity"),
    [
        ("drop-block@1", 3, ATTENTION + MLP, 0.0),
        ("drop-block:2", 2, 2 * (ATTENTION + MLP), 0.0),
        ("drop-attention@0,2", 4, 2 * ATTENTION, 0.0),
        ("drop-mlp:1", 4, MLP, 0.0),
        ("drop-block@0+drop-mlp@2", 3, ATTENTION + 2 * MLP, 0.0),
        ("magnitude:0.5", 4, 0, 0.5),
        ("wanda:2:4", 4, 0, 0.5),
        ("sparsegpt:0.5", 4, 0, 0.5),
        ("drop-attention@1+wanda:1:4", 4, ATTENTION, 0.25),
    ],
)
def test_what_is_saved_computes_what_the_recipe_makes(
    checkpoint: Path, texts: Path, tmp_path: Path, recipe: str, layers: int, gone: int, sparsity: float
) -> None:
    model, target = load(checkpoint), tmp_path / "out"
    before = tree(checkpoint)
    found = prune(model, parse_recipe(recipe), target, calibration=texts)
    network = reopened(target)
    expected = pruned_in_memory(load(checkpoint), recipe, texts)
    assert torch.equal(logits(network), variant_logits(expected))
    assert not torch.allclose(logits(network), logits(model.network), atol=1e-3)
    assert network.config.num_hidden_layers == layers
    assert found.sparsity == pytest.approx(sparsity, abs=2e-3)
    assert found == PruneResult(
        folder=str(target),
        recipe=recipe,
        parameters=model.network.num_parameters() - gone,
        dense_parameters=model.network.num_parameters(),
        num_bytes=stored_bytes(target),
        dense_bytes=stored_bytes(checkpoint),
        sparsity=found.sparsity,
        dense_sparsity=0.0,
        max_difference=0.0,
        notes=expected.notes,
    )
    if not gone:
        assert found.sparsity == zeros(network)
    assert tree(checkpoint) == before
    assert torch.equal(logits(model.network), logits(reopened(checkpoint)))  # the dense model is as it was


def test_blocks_that_are_cut_out_save_bytes_and_zeros_do_not(checkpoint: Path, tmp_path: Path) -> None:
    model = load(checkpoint)
    cut = prune(model, parse_recipe("drop-block@1"), tmp_path / "cut")
    assert cut.dense_bytes - cut.num_bytes == pytest.approx(4 * (ATTENTION + MLP), abs=1500)
    for recipe in ("drop-mlp@1", "magnitude:0.5"):
        zeroed = prune(model, parse_recipe(recipe), tmp_path / recipe[:4])
        assert zeroed.num_bytes == pytest.approx(zeroed.dense_bytes, abs=200)


def test_the_other_layout_leaves_sublayers_out(tmp_path: Path) -> None:
    network = AutoModelForCausalLM.from_config(LlamaConfig(**COMMON | {"intermediate_size": 256}))
    model = load(save(network, tmp_path / "dense"))
    found = prune(model, parse_recipe("drop-mlp@1"), tmp_path / "out", layout="nemotron-nas")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "nemotron-nas"
    mlp = 3 * 32 * 256 + 32
    assert found.dense_parameters - found.parameters == mlp
    assert found.dense_bytes - found.num_bytes == pytest.approx(4 * mlp, abs=1500)
    assert found.num_bytes == stored_bytes(tmp_path / "out")


@pytest.mark.parametrize(
    "recipe", ["quantize:int8", "quantize:int4", "drop-mlp@1+quantize:int4", "wanda:2:4+quantize:int8"]
)
def test_quantised_it_is_what_it_is_in_memory(wide: Path, texts: Path, tmp_path: Path, recipe: str) -> None:
    model, target = load(wide), tmp_path / "out"
    found = prune(model, parse_recipe(recipe), target, calibration=texts)
    expected = pruned_in_memory(load(wide), recipe, texts)
    network = AutoModelForCausalLM.from_pretrained(target, device_map="cpu")
    assert torch.equal(logits(network), variant_logits(expected))
    assert not torch.equal(logits(network), logits(model.network))
    is_out = "drop" in recipe
    assert found.parameters == model.network.num_parameters() - is_out * (3 * 64 * 128 + 64)
    assert found.sparsity == pytest.approx(0.5 if "wanda" in recipe else 0.0, abs=1e-3)
    assert found.num_bytes == stored_bytes(target) < 0.62 * found.dense_bytes
    assert found.max_difference == 0.0
    assert found.notes == expected.notes
    assert any("one byte" in note for note in found.notes) == ("int4" in recipe)
    card = (target / "README.md").read_text(encoding="utf-8")
    assert all(f"- {note}" in card for note in found.notes)
    again = load(target)
    assert num_parameters(again.network, again.anatomy) == found.parameters
    assert torch.equal(logits(again.network), logits(network))
    assert {path.name for path in target.iterdir()} == {"README.md", *(path.name for path in wide.iterdir())}


@pytest.mark.parametrize("recipe", ["drop-experts:0.25", "drop-experts:0.5,uniform", "drop-experts:0.25+quantize:int8"])
def test_experts_are_sliced(texts: Path, tmp_path: Path, recipe: str) -> None:
    folder = save(tiny_network("mixtral"), tmp_path / "mixtral")
    model, target = load(folder), tmp_path / "out"
    found = prune(model, parse_recipe(recipe), target, calibration=texts, seed=3)
    network = AutoModelForCausalLM.from_pretrained(target, device_map="cpu")
    expected = apply(parse_recipe(recipe), load(folder), Calibration(read_calibration(texts, model)), seed=3)
    assert torch.allclose(logits(network), variant_logits(expected), atol=1e-5)
    left = 2 if "uniform" in recipe else 3
    assert network.config.num_local_experts == left
    one = 3 * 32 * 48 + 32  # an expert and its row of the router
    assert found.parameters == model.network.num_parameters() - 4 * (4 - left) * one
    assert found.num_bytes == stored_bytes(target) < found.dense_bytes
    assert num_parameters(load(target).network, load(target).anatomy) == found.parameters


@pytest.mark.parametrize(
    "recipe", ["drop-block@1,2+repair:bias", "drop-attention@1+repair:bias", "drop-mlp@1+drop-block@3+repair:folded"]
)
def test_what_weights_carry_is_counted_once(texts: Path, tmp_path: Path, recipe: str) -> None:
    model = load(save(tiny_network("gpt2"), tmp_path / "gpt2"))
    found = prune(model, recipe, tmp_path / "out", calibration=texts)
    again = load(tmp_path / "out")
    assert found.parameters == num_parameters(again.network, again.anatomy)
    if "attention" not in recipe and "mlp" not in recipe:  # elsewhere zeros stay for other programs
        assert found.parameters == reopened(tmp_path / "out").num_parameters()


def test_the_seed_chooses_the_experts(tmp_path: Path) -> None:
    model = load(save(tiny_network("mixtral"), tmp_path / "mixtral"))
    recipe = parse_recipe("drop-experts:0.5,uniform")
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        prune(model, recipe, tmp_path / name, seed=seed)
    a, b, c = (load_file(tmp_path / name / "model.safetensors") for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)


@pytest.mark.parametrize("recipe", ["drop-attention@1", "magnitude:0.5", "sparsegpt:2:4", "quantize:int8"])
def test_bfloat16_stays_bfloat16(texts: Path, tmp_path: Path, recipe: str) -> None:
    folder = save(tiny_network("llama", torch.bfloat16), tmp_path / "half")
    model = load(folder, dtype="float32")
    found = prune(model, parse_recipe(recipe), tmp_path / "out", calibration=texts)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    if "quantize" not in recipe:
        assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
        expected = apply(parse_recipe(recipe), load(folder), Calibration(read_calibration(texts, model)))
        weights = dict(expected.model.network.named_parameters())
        silenced = "layers.1.self_attn.o_proj"
        differing = [name for name in stored if not torch.equal(stored[name], weights[name].bfloat16())]
        assert differing == ([f"model.{silenced}.weight"] if "drop" in recipe else [])
    assert stored["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert model.dtype == torch.float32
    assert model.network.config.dtype == torch.float32
    assert found.dense_bytes == stored_bytes(folder)
    assert found.num_bytes <= found.dense_bytes + 200
    assert reopened(tmp_path / "out").dtype == torch.bfloat16


def test_the_asked_dtype_is_for_computing_only(checkpoint: Path, tmp_path: Path) -> None:
    prune(load(checkpoint, dtype="float64"), parse_recipe("drop-mlp@1"), tmp_path / "out")
    stored, dense = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", checkpoint))
    differing = [name for name in dense if not torch.equal(stored[name], dense[name])]
    assert differing == ["model.layers.1.mlp.down_proj.weight"]
    assert not stored[differing[0]].any()


def test_the_calibration_is_used(checkpoint: Path, tmp_path: Path) -> None:
    model = load(checkpoint)
    rng = np.random.default_rng(0)
    rows = rng.integers(3, 97, (2, 20))
    np.save(tmp_path / "one.npy", rows[:1])
    np.save(tmp_path / "two.npy", rows[1:])
    stored = []
    for name in ("one", "two"):
        prune(model, parse_recipe("wanda:0.5"), tmp_path / f"out-{name}", calibration=tmp_path / f"{name}.npy")
        stored.append(reopened(tmp_path / f"out-{name}"))
    expected = apply(parse_recipe("wanda:0.5"), load(checkpoint), Calibration(rows[:1].tolist()))
    assert torch.equal(logits(stored[0]), variant_logits(expected))
    assert not torch.equal(logits(stored[0]), logits(stored[1]))


def test_without_calibration_the_models_own_texts_are_written(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prunelens.tasks.prompts import Prompt, prompts

    def few() -> list[Prompt]:
        path = tmp_path / "prompts.txt"
        path.write_text(f"{words(3, 4, 5)}\n{words(6, 7)}\n", encoding="utf-8")
        return prompts(path)

    monkeypatch.setattr("prunelens.study.calibration_texts.prompts", few)
    asked: list[tuple[str, int]] = []

    def reporter(stage: str, total: int, /) -> Callable[[int], None]:
        asked.append((stage, total))
        return lambda done: None

    model = load(checkpoint)
    prune(model, parse_recipe("wanda:0.5"), tmp_path / "own", reporter=reporter)
    assert ("writing calibration texts", 2 * 64) in asked
    network, own = model.network, []
    for ids in ([3, 4, 5], [6, 7]):
        text = network.generate(torch.tensor([ids]), max_new_tokens=64, do_sample=False, eos_token_id=2, pad_token_id=0)
        own.append(text[0].tolist())
    expected = apply(parse_recipe("wanda:0.5"), load(checkpoint), Calibration(own))
    assert torch.allclose(logits(reopened(tmp_path / "own")), variant_logits(expected), atol=1e-5)
    asked.clear()
    prune(model, parse_recipe("magnitude:0.5"), tmp_path / "none", reporter=reporter)
    assert [stage for stage, _ in asked if "calibration" in stage] == []


# --- opening it again --------------------------------------------------------------------------------------


def test_recorded_sublayers_are_removed_on_opening(checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    dense = load(checkpoint)
    found = prune(dense, parse_recipe("drop-attention@1+drop-mlp@3"), target)
    record = json.loads((target / "config.json").read_text())["prunelens"]
    assert record == {"dropped": {"attention": [1], "mlp": [3]}, "recipe": "drop-attention@1+drop-mlp@3"}
    model = load(target)
    left = num_parameters(model.network, model.anatomy)
    assert left == found.parameters == dense.network.num_parameters() - ATTENTION - MLP
    assert torch.equal(logits(model.network), logits(reopened(target)))
    assert model.network.model.layers[1].self_attn.q_proj.weight.numel() == 0
    assert model.network.model.layers[3].mlp.up_proj.weight.numel() == 0
    again = prune(model, parse_recipe("drop-block@0"), tmp_path / "again")  # and what was out stays out
    assert again.parameters == left - ATTENTION - MLP
    record = json.loads((tmp_path / "again" / "config.json").read_text())["prunelens"]
    assert record["dropped"] == {"attention": [0], "mlp": [2]}
    assert num_parameters(load(tmp_path / "again").network, load(tmp_path / "again").anatomy) == again.parameters


@pytest.mark.parametrize("recipe", ["drop-mlp@1", "drop-mlp@1+quantize:int8"])
def test_a_record_that_lies_is_refused(wide: Path, tmp_path: Path, recipe: str) -> None:
    target = tmp_path / "out"
    prune(load(wide), parse_recipe(recipe), target)
    load(target)
    path = target / "config.json"
    config = json.loads(path.read_text())
    config["prunelens"]["dropped"]["mlp"] = [2]
    path.write_text(json.dumps(config))
    with pytest.raises(PrunelensError, match=r"sublayers are zeroed .* but their weights do something"):
        load(target)


def test_weights_that_lie_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    prune(load(checkpoint), parse_recipe("drop-attention@2"), target)
    tensors = load_file(target / "model.safetensors")
    tensors["model.layers.2.self_attn.o_proj.weight"][0, 0] = 1.0
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    with pytest.raises(PrunelensError, match="weights do something"):
        load(target)


def test_an_earlier_checkpoint_is_replaced_but_not_by_what_is_made_from_it(checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    prune(load(checkpoint), parse_recipe("drop-mlp@1"), target)
    with pytest.raises(PrunelensError, match="expected an output apart from what is read"):
        prune(load(target), parse_recipe("drop-mlp@2"), target)
    prune(load(checkpoint), parse_recipe("drop-mlp@1,2"), target)
    assert json.loads((target / "config.json").read_text())["prunelens"]["dropped"]["mlp"] == [1, 2]
    pruned = apply(parse_recipe("drop-mlp@1,2"), load(checkpoint))
    assert torch.equal(logits(reopened(target)), variant_logits(pruned))
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == ["checkpoint", "out"]


# --- the model card ----------------------------------------------------------------------------------------


def card_of(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def test_the_card_tells_how_it_was_made(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    model = load(checkpoint)
    prune(model, parse_recipe("drop-attention:1"), tmp_path / "out", calibration=texts)
    lines = card_of(tmp_path / "out").splitlines()
    assert lines[0] == "---"
    assert lines[1 : lines.index("---", 1)] == [
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags:",
        "- pruned",
        "- prunelens",
    ]
    text = "\n".join(lines)
    assert f"fingerprint `{model.fingerprint[:16]}`" in text
    assert f"    prunelens prune {model.name} drop-attention:1" in lines
    assert f"Calibration: {texts}." in lines
    assert "Nothing was measured. `prunelens compare` measures it." in lines
    prune(model, parse_recipe("magnitude:0.5"), tmp_path / "other", calibration=texts)
    assert "Calibration" not in card_of(tmp_path / "other")  # nothing of it was used


def test_the_card_tells_what_a_run_has_found(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    model, run = load(checkpoint), tmp_path / "run"
    names = ("drop-attention@1", "drop-mlp@0")
    compare(checkpoint, *names, prompts=texts, max_new_tokens=10, lens_steps=0).report(run)
    prune(load(checkpoint), parse_recipe("drop-mlp@0"), tmp_path / "out", run=run)
    card = card_of(tmp_path / "out")
    record = Comparison.open(run).summary[1]
    assert record["compressed"] == "drop-mlp@0"
    kl = record["kl"]
    assert f"| KL per token, mean (nats) | {kl['mean']:.4f} [{kl['low']:.4f}, {kl['high']:.4f}] |" in card
    assert f"| KL, 95th percentile (nats) | {kl['p95']:.4f} |" in card
    assert f"| same most likely token | {100 * record['same_top1']['mean']:.1f} % |" in card
    assert record["survival"]
    for n, survival in record["survival"].items():
        assert f"| probability that {n} sampled tokens agree | {survival['value']:.3f} [" in card
    assert "Nothing was measured" not in card
    before = tree(tmp_path)
    with pytest.raises(PrunelensError, match=r"with the recipe drop-mlp@1 .* found drop-attention@1, drop-mlp@0"):
        prune(model, parse_recipe("drop-mlp@1"), tmp_path / "wrong", run=run)
    other = load(save(tiny_network("llama", seed=1), tmp_path / "other"))
    with pytest.raises(PrunelensError, match="found one of another model"):
        prune(other, parse_recipe("drop-mlp@0"), tmp_path / "wrong", run=run)
    with pytest.raises(PrunelensError):
        prune(model, parse_recipe("drop-mlp@0"), tmp_path / "wrong", run=tmp_path / "nowhere")
    assert {name for name in tree(tmp_path) if not name.startswith("other")} == before.keys()


@pytest.mark.parametrize("fit", ["bias", "linear", "folded"])
def test_what_a_run_has_found_is_true_of_what_is_saved(checkpoint: Path, tmp_path: Path, fit: str) -> None:
    """A repair is fitted on the same texts as in the run: those without its prompts."""
    rows = np.random.default_rng(3).integers(3, 97, (20, 16))
    lines = [words(*row) for row in rows.tolist()]
    asked, target, recipe = tmp_path / "prompts.txt", tmp_path / "out", f"drop-block@1+repair:{fit}"
    asked.write_text("".join(f"{line}\n" for line in lines[:8]), encoding="utf-8")
    calibration = tmp_path / "texts.jsonl"
    calibration.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), encoding="utf-8")
    compared = compare(checkpoint, recipe, prompts=asked, calibration=str(calibration), max_new_tokens=4, lens_steps=0)
    compared.report(tmp_path / "run")
    model = load(checkpoint)
    found = prune(model, recipe, target, calibration=calibration, run=tmp_path / "run")
    note = f"repair:{fit}: 8 of 20 calibration texts hold what is reported on and were left out of the fit"
    assert note in found.notes
    assert compared.info["notes"][-1] == f"{recipe}: {note}"
    ids = read_calibration(calibration, model)
    assert ids == rows.tolist()
    others, everything = (apply(parse_recipe(recipe), model, Calibration((), own)) for own in (ids[8:], ids))
    saved = logits(load(target).network)
    assert torch.allclose(saved, variant_logits(others), rtol=0, atol=1e-5)
    assert not torch.allclose(saved, variant_logits(everything), rtol=0, atol=1e-3)
    assert f"- {note}" in card_of(target).replace("\\", "")
    again = compare(checkpoint, target, prompts=asked, max_new_tokens=4, lens_steps=0)
    assert again.summary[0]["kl"]["mean"] == pytest.approx(compared.summary[0]["kl"]["mean"], rel=1e-4)


def test_figures_of_other_calibration_texts_are_told(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    model, recipe, run, more = load(checkpoint), "drop-mlp@1+magnitude:0.5", tmp_path / "run", {"max_new_tokens": 4}
    repaired = f"{recipe}+drop-mlp@2+repair:bias"
    (tmp_path / "asked.txt").write_text("Name a tree.", encoding="utf-8")
    calibration = str(tmp_path / "other.txt")
    Path(calibration).write_text("Birds sang in the garden.", encoding="utf-8")
    compare(
        model, recipe, repaired, prompts=tmp_path / "asked.txt", calibration=calibration, lens_steps=0, **more
    ).report(run)
    told = f"what was found is of the recipe with --calibration {calibration}, this checkpoint was made with {texts}"
    assert told in prune(model, repaired, tmp_path / "a", calibration=texts, run=run).notes
    same = prune(model, repaired, tmp_path / "b", calibration=Path(calibration), run=run)
    uncalibrated = prune(model, recipe, tmp_path / "c", calibration=texts, run=run)
    assert "what was found is of" not in " ".join(same.notes + uncalibrated.notes)


def test_a_run_leaves_texts_for_the_ranking(checkpoint: Path, tmp_path: Path) -> None:
    """Only repairs are kept from prompts; what ranks and masks may read them, as in the run."""
    asked, recipe = tmp_path / "prompts.txt", "drop-mlp:1+wanda:0.5"
    asked.write_text(TEXTS, encoding="utf-8")
    compare(checkpoint, recipe, prompts=asked, calibration=str(asked), max_new_tokens=4, lens_steps=0).report(
        tmp_path / "run"
    )
    found = prune(load(checkpoint), recipe, tmp_path / "out", calibration=asked, run=tmp_path / "run")
    assert not [note for note in found.notes if "left out" in note]
    assert torch.equal(
        logits(reopened(tmp_path / "out")), variant_logits(pruned_in_memory(load(checkpoint), recipe, asked))
    )


def test_hostile_names_are_text_in_the_card(checkpoint: Path) -> None:
    model = load(checkpoint)
    model.name = "<script>x</script>\n# Heading\n---\n[a](javascript:b) `c` | *d* \x1b[2J\u202e\\"
    notes = ("<img src=x onerror=y>\n- more",)
    card = model_card(model, parse_recipe("drop-attention:1"), Path("<b>|`.txt"), notes, None)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\u202e]", card)
    lines = card.splitlines()
    assert lines.count("---") == 2
    title, found = (line for line in lines if line.startswith("#"))
    assert title.startswith(r"# \<script\>x\</script\> # Heading --- \[a\](javascript:b) \`c\` \| \*d\* ")
    assert found == "## What was found against the dense model"
    items = [line for line in lines if line.startswith("- ")]
    assert items == ["- pruned", "- prunelens", r"- \<img src=x onerror=y\> - more"]
    code = [line for line in lines if line.startswith("    ")]  # in code nothing means anything
    assert len(code) == 1
    assert r"Calibration: \<b\>\|\`.txt." in lines
    for line in set(lines) - set(code):
        own = line.replace(f"`{model.fingerprint[:16]}`", "").replace("`prunelens compare`", "")
        assert not re.search(r"[<>|`*\[\]]", re.sub(r"\\.", "", own)), line


# --- the command line --------------------------------------------------------------------------------------


@pytest.fixture
def cli(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Cli:
    """Run the command line beside the checkpoint: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.txt").write_text(TEXTS, encoding="utf-8")

    def run(*argv: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["prunelens", *argv])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            prunelens.cli.main.main()
        printed = capsys.readouterr()
        return int(stop.value.code or 0), printed.out, printed.err

    return run


def refused(cli: Cli, folder: Path, *argv: str) -> str:
    """What must be refused says so in one sentence, with exit code 2, and changes nothing on disk."""
    before = tree(folder)
    code, out, err = cli("prune", *argv)
    assert (code, out) == (2, ""), err
    assert tree(folder) == before
    assert err.startswith("prunelens: ")
    assert len(err.splitlines()) == 1, err
    return err


def test_the_command_prunes_and_prints(cli: Cli, tmp_path: Path) -> None:
    code, out, err = cli("prune", "checkpoint", "wanda:2:4+drop-mlp@1", "--calibration", "texts.txt", "-o", "a/out")
    assert (code, err) == (0, "")
    text = " ".join(out.split())
    assert "37,216" in text
    assert f"{37216 - MLP:,}" in text
    assert "12.47 %" in text
    assert "50.000 %" in text
    assert "The zeros of a mask are stored" in text
    assert "Dropped sublayers are saved as zeros" in text
    assert "The checkpoint: a/out" in text
    assert torch.equal(
        logits(reopened(tmp_path / "a" / "out")),
        variant_logits(pruned_in_memory(load("checkpoint"), "wanda:2:4+drop-mlp@1", Path("texts.txt"))),
    )


def test_the_command_prints_json(cli: Cli, tmp_path: Path) -> None:
    code, out, err = cli("prune", "checkpoint", "drop-block@0,1", "-o", "out", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert len(out.splitlines()) == 1
    assert found == {
        "folder": "out",
        "recipe": "drop-block@0,1",
        "parameters": 37216 - 2 * (ATTENTION + MLP),
        "dense_parameters": 37216,
        "num_bytes": stored_bytes(tmp_path / "out"),
        "dense_bytes": stored_bytes(tmp_path / "checkpoint"),
        "sparsity": 0.0,
        "dense_sparsity": 0.0,
        "max_difference": 0.0,
        "notes": [],
    }


def test_a_recipe_in_yaml_is_pruned_by(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("steps:\n  - {method: drop-mlp, at: [2]}\n", encoding="utf-8")
    code, out, _ = cli("prune", "checkpoint", "recipe.yaml", "-o", "out", "--json")
    assert code == 0
    assert json.loads(out)["recipe"] == "drop-mlp@2"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("drop-everything:3",), "expected a recipe"),
        (("wanda:4:2",), "wanda"),
        (("quantize:int3",), "int3"),
        (("quantize:int8+wanda:0.5",), "quantize comes last"),
        (("drop-mlp@1", "--format", "onnx"), "onnx"),
        (("quantize:int8", "--format", "nemotron-nas"), "quantised"),
        (("drop-mlp@1", "--seed", "-1"), "seed"),
    ],
)
def test_a_bad_request_is_refused_before_the_model_is_opened(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: tuple[str, ...], said: str
) -> None:
    monkeypatch.setattr("prunelens.models.opening.loading.load", lambda *args, **more: pytest.fail("too late"))
    assert said in refused(cli, tmp_path, "checkpoint", *argv, "-o", "out")


@pytest.mark.parametrize("recipe", ["drop-mlp:1", "wanda:0.5", "quantize:int8"])
def test_what_is_quantised_already_is_refused_before_any_work(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    assert cli("prune", "checkpoint", "quantize:int8", "-o", "small")[0] == 0
    load("small")  # its fingerprint is known
    monkeypatch.setattr("prunelens.study.prune.prune.calibrate", lambda *args: pytest.fail("too late"))
    assert "small is quantised" in refused(cli, tmp_path, "small", recipe, "-o", "out")


@pytest.mark.parametrize("recipe", ["drop-mlp@4", "drop-block@17", "drop-attention:9", "drop-experts:0.5"])
def test_parts_that_are_not_there_are_refused(cli: Cli, tmp_path: Path, recipe: str) -> None:
    refused(cli, tmp_path, "checkpoint", recipe, "-o", "out")


def test_all_blocks_cannot_go(cli: Cli, tmp_path: Path) -> None:
    refused(cli, tmp_path, "checkpoint", "drop-block@0,1,2,3", "-o", "a/b/out")


@pytest.mark.parametrize("output", ["checkpoint", "texts.txt", "holiday"])
def test_a_folder_that_is_something_else_stays(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    (tmp_path / "holiday").mkdir()
    (tmp_path / "holiday" / "photo.jpg").write_bytes(b"photo")
    monkeypatch.setattr("prunelens.models.opening.loading.load", lambda *args, **more: pytest.fail("too late"))
    found = refused(cli, tmp_path, "checkpoint", "drop-mlp@1", "-o", output)
    assert "a new folder or an earlier checkpoint" in found


@pytest.mark.parametrize("option", ["--calibration", "--run"])
def test_files_that_are_not_there_are_refused(cli: Cli, tmp_path: Path, option: str) -> None:
    assert "nowhere" in refused(cli, tmp_path, "checkpoint", "drop-mlp:1", option, "nowhere", "-o", "out")


def test_a_recipe_without_its_library_is_refused(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    assert "torchao" in refused(cli, tmp_path, "checkpoint", "quantize:int8", "-o", "out")


def full(*args: Any, **more: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize(
    ("recipe", "place"),
    [
        ("drop-mlp@1", "transformers.PreTrainedModel.save_pretrained"),
        ("drop-mlp@1", "pathlib.Path.write_text"),
        ("drop-mlp@1", "pathlib.Path.rename"),
        ("quantize:int8", "prunelens.pruning.quantize.save_quantized"),
        ("quantize:int8", "shutil.copy2"),
    ],
)
def test_a_full_disk_leaves_nothing(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, place: str, earlier: bool
) -> None:
    load("checkpoint")  # its fingerprint is known
    if earlier:
        assert cli("prune", "checkpoint", "drop-block@2", "-o", "a/out")[0] == 0
    monkeypatch.setattr(place, full)
    found = refused(cli, tmp_path, "checkpoint", recipe, "-o", "a/out")
    assert os.strerror(errno.ENOSPC) in found
    assert "free space" in found


def test_weights_that_come_out_wrong_are_not_kept(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Something between memory and disk changes a number: the proof finds it."""
    write = transformers.PreTrainedModel.save_pretrained

    def spoilt(network: Any, folder: Path, *args: Any, **more: Any) -> None:
        write(network, folder, *args, **more)
        tensors = load_file(Path(folder) / "model.safetensors")
        tensors["model.layers.2.mlp.up_proj.weight"] *= 1.5
        save_file(tensors, Path(folder) / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", spoilt)
    assert "logits differ" in refused(cli, tmp_path, "checkpoint", "drop-mlp@1", "-o", "out")


def test_a_checkpoint_without_a_tokenizer_is_pruned_where_no_text_is_needed(cli: Cli, tmp_path: Path) -> None:
    for path in (tmp_path / "checkpoint").glob("tok*"):
        path.unlink()
    assert cli("prune", "checkpoint", "drop-mlp@1", "-o", "out")[0] == 0
    assert not list((tmp_path / "out").glob("tok*"))
    shutil.rmtree(tmp_path / "out")
    assert "tokenizer" in refused(cli, tmp_path, "checkpoint", "drop-mlp:1", "-o", "out")  # nothing can be written


def test_from_python_a_recipe_is_a_text(checkpoint: Path, tmp_path: Path) -> None:
    import prunelens

    found = prunelens.prune(load(checkpoint), "drop-mlp@1", str(tmp_path / "out"))
    assert found.recipe == "drop-mlp@1"
    assert found.parameters < found.dense_parameters
    assert (tmp_path / "out" / "config.json").is_file()
