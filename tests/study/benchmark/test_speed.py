"""Speeds of tiny models: what is run, exact sizes, what the notes say, the table and the JSON. No time is asserted."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

import prunelens.cli.main
import prunelens.study.benchmark.speed as speed_module
import prunelens.study.benchmark.timing as runs
import prunelens.study.prepare as prepare_module
from conftest import tiny_model, words
from prunelens.errors import PrunelensError
from prunelens.models.model import Model
from prunelens.models.opening.loading import load
from prunelens.models.sizes import network_bytes
from prunelens.models.surgery.drop import NOTHING, Drop
from prunelens.models.surgery.shared_copy import named_owners, set_weight, shared_copy_of
from prunelens.models.surgery.variant import Variant
from prunelens.report.terminal.benchmark import print_speeds, size_in_words, speed_table, speeds_as_json
from prunelens.study.benchmark.benchmark import run_benchmark
from prunelens.study.benchmark.record import Speed, SpeedSettings, Spread
from prunelens.study.benchmark.speed import measure_speeds
from prunelens.study.benchmark.timing import CacheSize, Timing

SMALL = SpeedSettings(batch_size=2, context=10, new_tokens=3, repeats=2)
FIRST = Drop(attention=frozenset([0]))


def measured(*variants: Variant, settings: SpeedSettings = SMALL) -> list[Speed]:
    labels = ["dense", *(f"c{number}" for number in range(1, len(variants)))]
    return measure_speeds(dict(zip(labels, variants, strict=True)), settings, lambda done: None)


def with_zeros(model: Model, share: float) -> Model:
    """A twin whose linear layers in the blocks have this share of zeros."""
    twin = shared_copy_of(model)
    for name, (owner, attribute) in named_owners(twin.network).items():
        if ".layers." in name and isinstance(owner, nn.Linear) and attribute == "weight":
            value = owner.weight.detach().clone()
            value.view(-1)[: round(share * value.numel())] = 0
            set_weight(owner, attribute, value)
    return twin


def timed(monkeypatch: pytest.MonkeyPatch, *factors: float) -> None:
    """Let runs take given times: the n-th model of a repeat `factors[n]` times one second, then two."""
    calls = iter(range(1_000_000))

    def time_once(variant: Variant, ids: torch.Tensor, context: int) -> Timing:
        seconds = factors[next(calls) % len(factors)]
        return Timing(seconds, 2 * seconds, CacheSize(0, 0, ()))

    monkeypatch.setattr(speed_module, "time_once", time_once)


# --- what is run -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drop", [NOTHING, FIRST, Drop(block=frozenset([0]))], ids=["whole", "attention 0", "block 0"])
def test_decoding_continues_the_prefill(any_family: str, drop: Drop) -> None:
    model = tiny_model(any_family, torch.float64 if any_family == "llama" else torch.float32)
    read: list[torch.Tensor] = []
    logits: list[torch.Tensor] = []

    def watch(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        read.append(kwargs["input_ids"])
        logits.append(output.logits)

    variant = Variant(model, drop)
    handle = model.network.register_forward_hook(watch, with_kwargs=True)
    (found,) = measured(variant)
    handle.remove()
    assert [ids.shape[1] for ids in read] == [10, 1, 1, 1] * (SMALL.repeats + 2)
    assert logits[0].shape[1] == 1
    with variant.running(), torch.inference_mode():
        whole = model.network(input_ids=torch.cat(read[:4], dim=1), use_cache=False).logits
    torch.testing.assert_close(torch.cat(logits[:4], dim=1), whole[:, -4:], rtol=1e-3, atol=1e-3)
    assert found.prefill_tokens_per_second.low > 0 < found.decode_tokens_per_second.low
    assert found.kv_bytes_per_token + found.state_bytes > 0
    assert found.peak_memory_bytes is None or found.peak_memory_bytes >= found.weight_bytes_in_memory


def test_repeats_are_interleaved_and_all_models_read_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, other = tiny_model(), tiny_model(seed=1)
    seen: list[tuple[str, torch.Tensor]] = []
    own = runs.time_once

    def watched(variant: Variant, ids: torch.Tensor, context: int) -> Timing:
        seen.append(("dense" if variant.model is dense else "other", ids))
        return own(variant, ids, context)

    monkeypatch.setattr(speed_module, "time_once", watched)
    steps: list[int] = []
    measure_speeds({"a": Variant(dense), "b": Variant(other)}, SMALL, steps.append)
    assert [name for name, _ in seen] == ["dense", "other"] * 4
    assert all(torch.equal(ids, seen[0][1]) for _, ids in seen)
    assert seen[0][1].shape == (2, 13)
    assert steps == [1] * SMALL.num_runs(2)


def test_the_seed_chooses_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []

    def watched(variant: Variant, ids: torch.Tensor, context: int) -> Timing:
        seen.append(ids)
        return Timing(1.0, 1.0, CacheSize(0, 0, ()))

    monkeypatch.setattr(speed_module, "time_once", watched)
    model = tiny_model()
    for seed in (0, 0, 1):
        measured(Variant(model), settings=replace(SMALL, seed=seed))
    first, again, other = seen[0], seen[4], seen[8]
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert int(first.min()) >= 0
    assert int(first.max()) < 97


def test_ratios_are_taken_inside_a_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    untimed = [9.0] * 4  # two passes of two models
    timed(monkeypatch, *untimed, 1.0, 0.5, 4.0, 4.0, 2.0, 4.0)
    model = tiny_model()
    dense, other = measured(Variant(model), Variant(model), settings=replace(SMALL, repeats=3))
    assert dense.prefill_ratio is None
    assert dense.decode_ratio is None
    assert other.prefill_ratio == other.decode_ratio == Spread(median=1.0, low=0.5, high=2.0)
    assert dense.prefill_tokens_per_second == Spread(median=10.0, low=5.0, high=20.0)
    assert dense.decode_tokens_per_second == Spread(median=1.5, low=0.75, high=3.0)
    assert "prefill: no difference from the dense model that could be measured (0.50 to 2.00 times its speed)" in (
        other.notes
    )


# --- sizes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kv_bytes_of_a_llama(dtype: torch.dtype) -> None:
    model = tiny_model(dtype=dtype)
    whole, without, block = measured(
        Variant(model), Variant(model, Drop(attention=frozenset([1, 2]))), Variant(model, Drop(block=frozenset([3])))
    )
    size, layer = dtype.itemsize, 2 * 2 * 8 * dtype.itemsize
    assert whole.kv_bytes_per_token == 4 * layer
    assert without.kv_bytes_per_token == 2 * layer + 2 * 2 * size
    assert block.kv_bytes_per_token == 3 * layer + 2 * size
    assert whole.state_bytes == 0
    assert whole.dtype == str(dtype).removeprefix("torch.")


def test_states_are_no_keys() -> None:
    (mamba,) = measured(Variant(tiny_model("mamba")))
    assert mamba.kv_bytes_per_token == 0
    assert mamba.state_bytes == 4 * 48 * (4 + 8) * 4
    (jamba,) = measured(Variant(tiny_model("jamba")))
    assert jamba.kv_bytes_per_token == 2 * 2 * 2 * 8 * 4
    assert jamba.state_bytes == 2 * 64 * (4 + 8) * 4


def test_sliding_windows_are_told() -> None:
    (gemma,) = measured(Variant(tiny_model("gemma2")))
    layer = 2 * 2 * 8 * 4
    assert gemma.kv_bytes_per_token == 2 * layer + 2 * layer * 5 / 10
    assert any(note.startswith("2 of its layers keep at most the last 5 tokens") for note in gemma.notes)
    (llama,) = measured(Variant(tiny_model()))
    assert not any("keep at most" in note for note in llama.notes)


def test_weights_of_parts_taken_out_do_not_count() -> None:
    model = tiny_model()
    dense, without = measured(Variant(model), Variant(model, Drop(attention=frozenset([1]), block=frozenset([2]))))
    block = model.anatomy.blocks[1].module
    attention = [*block.self_attn.parameters(), *block.input_layernorm.parameters()]
    gone = sum(weight.nbytes for weight in (*attention, *model.anatomy.blocks[2].module.parameters()))
    assert dense.weight_bytes_in_memory == network_bytes(model.network)
    assert without.weight_bytes_in_memory == dense.weight_bytes_in_memory - gone
    assert dense.weight_bytes_stored == model.weight_bytes
    assert without.weight_bytes_stored is None
    assert any("parts taken out are not counted" in note for note in without.notes)


def test_what_is_stored_is_the_files(checkpoint: Any) -> None:
    model = load(checkpoint, dtype="float64", device="cpu")
    (found,) = measured(Variant(model))
    assert found.weight_bytes_stored == (checkpoint / "model.safetensors").stat().st_size
    assert found.weight_bytes_in_memory == network_bytes(model.network)
    assert any("times as much memory as on disk, because they were opened in float64" in note for note in found.notes)
    (twin,) = measured(Variant(shared_copy_of(model)))
    assert twin.weight_bytes_stored is None


def test_memory_is_what_a_run_adds(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    resident = iter([100, 130])
    monkeypatch.setattr(runs, "_resident", lambda: next(resident, 120))
    with runs.added_memory(tiny_model()) as added:
        pass
    assert added.num_bytes == 30
    assert added.source == "resident memory of the process, sampled"
    monkeypatch.setattr(runs, "RESIDENT", tmp_path / "statm")
    (found,) = measured(Variant(tiny_model()))
    assert found.peak_memory_bytes is None
    assert found.memory_source is None
    assert "—" in shown([found], 100)


def test_memory_of_gpus_is_their_allocators(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = [torch.device("cuda:0"), torch.device("cuda:1")]
    reset: list[torch.device] = []
    monkeypatch.setattr(runs, "cuda_devices", lambda model: devices)
    monkeypatch.setattr(torch.cuda, "memory_allocated", {devices[0]: 100, devices[1]: 200}.__getitem__)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", {devices[0]: 150, devices[1]: 207}.__getitem__)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    with runs.added_memory(tiny_model()) as added:
        assert reset == devices
    assert added.num_bytes == 57
    assert added.source == "the CUDA allocator's peak"


@pytest.mark.skipif(not runs.RESIDENT.is_file(), reason="needs Linux")
def test_memory_of_the_process_is_seen() -> None:
    with runs.added_memory(tiny_model()) as added:
        torch.ones(64 * 2**20)
    assert added.num_bytes is not None
    assert 200 * 2**20 < added.num_bytes < 2**30


# --- notes -------------------------------------------------------------------------------------------------


def test_zeros_that_save_nothing_are_told() -> None:
    model = tiny_model()
    dense, half, few = measured(Variant(model), Variant(with_zeros(model, 0.5)), Variant(with_zeros(model, 0.1)))
    note = (
        "50 % of the numbers in its blocks' matrices are zeros, but they are stored and multiplied like others: "
        "no time and no memory is saved without a sparse kernel or format"
    )
    assert half.zero_fraction == pytest.approx(0.5, abs=1e-3)
    assert half.notes[0] == note
    assert few.zero_fraction == pytest.approx(0.1, abs=1e-2)
    assert few.notes[0] == "its weights take as much memory as the dense model's"
    assert not any("zeros" in note or "as much memory" in note for note in dense.notes)


def test_quantised_weights_that_are_slower_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchao")
    from prunelens.pruning.quantize import quantize

    model = tiny_model()
    small = shared_copy_of(model)
    quantize(small, "int8")
    timed(monkeypatch, 1.0, 2.0)
    _, slow = measured(Variant(model), Variant(small))
    told = "slower than the dense model (0.50 to 0.50 times its speed)"
    assert [note.split(":")[0] for note in slow.notes if told in note] == ["prefill", "decoding"]
    assert slow.zero_fraction == 0
    _, plain = measured(Variant(model), Variant(shared_copy_of(model)))
    assert not any("slower" in note for note in plain.notes)
    timed(monkeypatch, 2.0, 1.0)
    _, fast = measured(Variant(model), Variant(small))
    assert not any("slower" in note or "difference" in note for note in fast.notes)


# --- errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batch_size": 0}, "--batch-size of at least 1, found 0"),
        ({"context": 0}, "--context of at least 1, found 0"),
        ({"new_tokens": -1}, "--new-tokens of at least 1, found -1"),
        ({"repeats": 1}, "--repeats of at least 2, found 1"),
        ({"seed": -1}, "seed of at least 0, found -1"),
        ({"context": 126}, "--context and --new-tokens of at most 128 together, .* dense .*126 \\+ 3"),
    ],
)
def test_settings_without_meaning_are_refused(changed: dict[str, int], message: str) -> None:
    with pytest.raises(PrunelensError, match=message):
        measured(Variant(tiny_model()), settings=replace(SMALL, **changed))


def test_the_longest_text_is_read_and_families_without_a_limit_read_more() -> None:
    (found,) = measured(Variant(tiny_model()), settings=SpeedSettings(1, 126, 2, 2))
    assert found.settings.context == 126
    measured(Variant(tiny_model("bloom")), settings=SpeedSettings(1, 130, 1, 2))


def test_no_models_are_refused() -> None:
    with pytest.raises(PrunelensError, match="expected at least one model"):
        measure_speeds({}, SMALL, lambda done: None)


def test_a_model_without_a_cache_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    own = model.network.forward
    monkeypatch.setattr(model.network, "forward", lambda **kwargs: own(**{**kwargs, "use_cache": False}))
    with pytest.raises(PrunelensError, match="expected tiny-llama to return a cache"):
        measured(Variant(model))


def test_full_memory_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> Timing:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(speed_module, "time_once", full)
    with pytest.raises(PrunelensError, match=r"dense has no memory for 2 x \(10 \+ 3\) tokens; lower --batch-size"):
        measured(Variant(tiny_model()))


# --- table and JSON ----------------------------------------------------------------------------------------


def large(label: str, **more: Any) -> Speed:
    spread = Spread(123456.7, 100000.1, 234567.8)
    found = Speed(
        label=label,
        settings=SpeedSettings(),
        device="cpu, threads: 2",
        dtype="float32",
        prefill_tokens_per_second=spread,
        decode_tokens_per_second=spread,
        prefill_ratio=Spread(10.25, 10.11, 10.99),
        decode_ratio=Spread(10.25, 10.11, 10.99),
        peak_memory_bytes=123 * 2**30,
        memory_source="resident memory of the process, sampled",
        kv_bytes_per_token=123456.0,
        state_bytes=1024.0,
        weight_bytes_in_memory=99 * 2**30,
        weight_bytes_stored=None,
        zero_fraction=0.5,
        notes=("a note",),
    )
    return replace(found, **more)


def shown(speeds: list[Speed], width: int) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(speed_table(speeds, speeds[0]))
    return console.export_text()


def test_three_models_fit_100_columns() -> None:
    dense = large("d" * 60, prefill_ratio=None, decode_ratio=None, weight_bytes_stored=2**30)
    others = [large(f"{name}[bold]\x1b[31m" * 9, weight_bytes_stored=3 * 2**28) for name in "ab"]
    text = shown([dense, *others], 100)
    assert max(map(len, text.splitlines())) <= 100
    assert "\x1b" not in text
    assert text.count("10.25× [10.11, 10.99]") == 4
    assert text.count("[100,000, 234,568]") == 2
    assert text.count("768 MiB 0.75×") == 2
    assert text.count("123 GiB 1.00×") == 2
    assert "states per row" in text
    assert "states per row" not in shown([replace(dense, state_bytes=0.0)], 100)


def test_many_models_fit_80_columns(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    dense = large("dense", prefill_ratio=None, decode_ratio=None)
    print_speeds([dense, *[large(f"a folder with a long name, number {number}") for number in range(4)]], 125.0)
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert max(map(len, lines)) <= 80
    assert lines[0] == "1 row of 512 tokens and 32 new ones, 5 repeats in turn"
    assert lines[-1] == "Took 2 min."
    text = "\n".join(lines)
    assert text.count("10.25× [10.11, 10.99]") == 8
    assert all(f"number {number}" in text for number in range(4))


def test_notes_stand_beneath_the_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    dense = large("dense", prefill_ratio=None, decode_ratio=None, notes=(), settings=SpeedSettings(repeats=4))
    print_speeds([dense, large("bad\x1b]0;name", peak_memory_bytes=None, memory_source=None)])
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert "bad\N{REPLACEMENT CHARACTER}]0;name: a note" in lines
    assert "measured on cpu, threads: 2, float32" in lines
    assert any(line.startswith("peak memory: weights in memory and what one run added (resident") for line in lines)
    assert "so few repeats can all differ by chance; pass --repeats 5 or more" in lines
    assert "\x1b" not in "".join(lines)


def test_json_holds_everything() -> None:
    model = tiny_model()
    speeds = measured(Variant(model), Variant(model, FIRST))
    found = json.loads(json.dumps(speeds_as_json(speeds), allow_nan=False))
    assert found["settings"] == {"batch_size": 2, "context": 10, "new_tokens": 3, "repeats": 2, "seed": 0}
    assert [record["label"] for record in found["models"]] == ["dense", "c1"]
    for record, speed in zip(found["models"], speeds, strict=True):
        assert set(record) == set(Speed.__dataclass_fields__) - {"settings"}
        assert record["notes"] == list(speed.notes)
        assert record["kv_bytes_per_token"] == speed.kv_bytes_per_token
        assert set(record["prefill_tokens_per_second"]) == {"median", "low", "high"}
    assert found["models"][0]["prefill_ratio"] is None


@pytest.mark.parametrize(
    ("size", "words"),
    [(None, "—"), (0, "0 B"), (576.5, "576.5 B"), (46080.0, "45 KiB"), (538060032, "513.1 MiB"), (2**50, "1024 TiB")],
)
def test_sizes_in_words(size: float | None, words: str) -> None:
    assert size_in_words(size) == words


# --- benchmark ---------------------------------------------------------------------------------------------


def test_recipes_and_models_are_measured_beside_the_dense_one(checkpoint: Path) -> None:
    model, other = load(checkpoint, device="cpu"), tiny_model(seed=1)
    recipes = ("drop-attention@1,2", "drop-block@2", "magnitude:0.5")
    dense, attention, block, zeros, opened = run_benchmark(model, [*recipes, other], SMALL)
    assert [speed.label for speed in (dense, attention, block, zeros, opened)] == ["dense", *recipes, "tiny-llama"]
    layer = 2 * 2 * 8 * 4
    assert [speed.kv_bytes_per_token for speed in (dense, attention, block, zeros, opened)] == [
        4 * layer,
        2 * layer + 2 * 2 * 4,
        3 * layer + 2 * 4,
        4 * layer,
        4 * layer,
    ]
    assert zeros.zero_fraction == pytest.approx(0.5, abs=0.01)
    assert zeros.notes[0].startswith("50 % of the numbers in its blocks' matrices are zeros, but they are stored")
    assert dense.weight_bytes_stored == model.weight_bytes
    assert opened.weight_bytes_stored == other.weight_bytes


def test_what_saving_a_recipe_would_write(checkpoint: Path) -> None:
    model = load(checkpoint, device="cpu")
    _, attention, block, zeros = run_benchmark(model, ["drop-attention@1", "drop-block@2", "magnitude:0.5"], SMALL)
    weights = list(model.network.parameters())
    cut = sum(weight.numel() for weight in model.anatomy.blocks[2].module.parameters())
    left = 1 - cut / sum(weight.numel() for weight in weights)
    assert attention.weight_bytes_stored == model.weight_bytes
    assert block.weight_bytes_stored == round(left * model.weight_bytes)
    assert zeros.weight_bytes_stored == model.weight_bytes
    assert ["stay on disk as zeros" in " ".join(speed.notes) for speed in (attention, block, zeros)] == [
        True,
        False,
        False,
    ]


def test_dropped_experts_stay_in_memory_and_are_not_stored() -> None:
    model = tiny_model("mixtral")
    dense, half = run_benchmark(model, ["drop-experts:0.5,uniform"], SMALL)
    assert half.weight_bytes_in_memory == dense.weight_bytes_in_memory
    experts = sum(block.module.mlp.experts.down_proj.nbytes * 3 for block in model.anatomy.blocks)
    gates = sum(block.module.mlp.gate.weight.nbytes for block in model.anatomy.blocks)
    assert half.weight_bytes_stored == pytest.approx(model.weight_bytes - (experts + gates) / 2, abs=1)
    assert "its dropped experts stay in memory here; a saved checkpoint leaves them out" in half.notes


def test_quantised_recipes_say_what_they_left(checkpoint: Path) -> None:
    pytest.importorskip("torchao")
    dense, small = run_benchmark(load(checkpoint, device="cpu"), ["quantize:int4"], SMALL)
    assert small.weight_bytes_in_memory < dense.weight_bytes_in_memory
    assert small.weight_bytes_stored is not None
    assert small.weight_bytes_stored < dense.weight_bytes_stored  # type: ignore[operator]
    assert any("torchao stores these 4-bit numbers in one byte each" in note for note in small.notes)


@pytest.mark.parametrize("recipe", ["drop-attention:1", "wanda:0.5"])
def test_calibration_texts_are_read_where_given(
    recipe: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(checkpoint, device="cpu")
    text = tmp_path / "text.txt"
    text.write_text(words(*range(3, 40)), encoding="utf-8")
    taken: list[Any] = []
    own = prepare_module.apply_recipes

    def watched(candidates: Any, dense: Model, texts: Any, ranking: Any, *rest: Any) -> None:
        taken.append((texts, ranking))
        own(candidates, dense, texts, ranking, *rest)

    monkeypatch.setattr(prepare_module, "apply_recipes", watched)
    run_benchmark(model, [recipe], SMALL, text)
    ((texts, ranking),) = taken
    assert [token for row in texts.texts for token in row if token > 2] == list(range(3, 40))
    assert (ranking is None) == (recipe == "wanda:0.5")
    with pytest.raises(PrunelensError, match="nowhere"):
        run_benchmark(model, [recipe], SMALL, tmp_path / "nowhere.txt")


def test_what_cannot_be_measured_is_refused_before_recipes_are_applied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "apply_recipes", None)
    model = tiny_model()
    for compressed, changed, message in (
        (["magnitude:0.5"], {"context": 126}, "at most 128 together"),
        (["drop-attention@9"], {}, "drop-attention@9|layer"),
        (["magnitude:0.5"], {"repeats": 0}, "--repeats of at least 2"),
        ([], {}, "expected at least one compressed model"),
        (["magnitude:0.5", "magnitude:0.5"], {}, "is given twice"),
    ):
        with pytest.raises(PrunelensError, match=message):
            run_benchmark(model, compressed, replace(SMALL, **changed))


# --- the command -------------------------------------------------------------------------------------------


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["prunelens", "benchmark", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stop:
        prunelens.cli.main.main()
    assert isinstance(stop.value.code, int)
    return stop.value.code


SHORT = ("--batch-size", "2", "--context", "9", "--new-tokens", "3", "--repeats", "2", "--device", "cpu")


def test_the_command_prints_json(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, checkpoint, "drop-attention@0", "magnitude:0.5", *SHORT, "--json") == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    found = json.loads(printed.out)
    assert found["dense"] == str(checkpoint)
    assert found["settings"] == {"batch_size": 2, "context": 9, "new_tokens": 3, "repeats": 2, "seed": 0}
    assert [record["label"] for record in found["models"]] == ["dense", "drop-attention@0", "magnitude:0.5"]
    assert [record["kv_bytes_per_token"] for record in found["models"]] == [512, 3 * 128 + 8, 512]
    for record in found["models"][1:]:
        for name in ("prefill_ratio", "decode_ratio"):
            ratio = record[name]
            assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]


def test_the_command_prints_a_table(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, checkpoint, "drop-attention@0", "drop-mlp@1", "magnitude:0.5", *SHORT) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[0].strip() == "2 rows of 9 tokens and 3 new ones, 2 repeats in turn"
    *_, zeros = (line for line in lines if "zeros in matrices" in line)  # as many tables as the width asks for
    assert zeros.split()[-2].startswith("50.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("magnitude:0.5", "--repeats", "1"), "expected --repeats of at least 2, found 1"),
        (("magnitude:2",), "magnitude"),
        (("magnitude:0.5", "--context", "500"), "at most 128 together"),
        (("nowhere/at/all",), "nowhere/at/all"),
    ],
)
def test_the_command_refuses_in_one_sentence(
    arguments: tuple[str, ...],
    message: str,
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command(monkeypatch, checkpoint, *arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert len(printed.err.splitlines()) == 1
