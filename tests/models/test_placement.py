"""A model larger than one device: every result is that of the same model in memory.

On a CPU the last bit of a product can depend on where in memory a matrix begins, and safetensors are mapped as
they lie in their file; so a model opened from a file is compared with one opened from the same file.
"""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_loading import write_gguf
from transformers.integrations import accelerate as planning

import prunelens
from conftest import tiny_network, tiny_tokenizer
from prunelens.cache import scratch_folder
from prunelens.cli.main import main
from prunelens.errors import PrunelensError
from prunelens.models.model import Model
from prunelens.models.opening.fingerprint import fingerprint_model
from prunelens.models.opening.loading import load, wrap
from prunelens.models.placement import named_weights
from prunelens.models.surgery.drop import Drop, dropped, num_parameters
from prunelens.pruning.redundancy import rank_redundancy
from prunelens.tracing.forced import Trajectory, forced_states
from prunelens.tracing.free import write_dense, write_free

FAMILIES = ("llama", "gpt2", "qwen2")  # gpt2: Conv1D and a tied head; qwen2 below: tied
PROMPTS = [[3, 14, 15], [92, 6, 5, 35, 8], [9, 79, 32, 38]]
TRAJECTORIES = [
    Trajectory(index, "greedy", tuple(prompt), tuple(range(40 + index, 46 + index)), False)
    for index, prompt in enumerate(PROMPTS)
]
DROPS = [
    Drop(attention=frozenset([0])),
    Drop(attention=frozenset([1]), mlp=frozenset([3])),
    Drop(mlp=frozenset([2])),
    Drop(block=frozenset([1, 3])),
    Drop(block=frozenset([3])),
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PRUNELENS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def network_of(family: str) -> Any:
    network = tiny_network(family)
    if family == "qwen2":
        network.config.tie_word_embeddings = True
        network.all_tied_weights_keys = network.get_expanded_tied_weights_keys()
        network.tie_weights()
    return network


def halves(family: str) -> dict[str, str]:
    """Layers 1 and 3 on disk, everything else on the CPU."""
    decoder, layers = ("transformer", "h") if family == "gpt2" else ("model", "layers")
    rest = ("wte", "wpe", "ln_f") if family == "gpt2" else ("embed_tokens", "norm", "rotary_emb")
    found = {f"{decoder}.{name}": "cpu" for name in rest}
    return (
        found | {f"{decoder}.{layers}.{index}": ("cpu", "disk")[index % 2] for index in range(4)} | {"lm_head": "cpu"}
    )


def saved(folder: Path, family: str, shards: bool = False) -> Path:
    network_of(family).save_pretrained(folder, **({"max_shard_size": "30KB"} if shards else {}))
    tiny_tokenizer().save_pretrained(folder)
    return folder


def split(family: str, folder: Path) -> Model:
    return load(saved(folder, family), device=halves(family))


def on_disk(family: str, folder: Path) -> Model:
    return load(saved(folder, family), device={"": "disk"})


def sharded_on_disk(family: str, folder: Path) -> Model:
    return load(saved(folder, family, shards=True), device=halves(family))


def in_main_memory(family: str, folder: Path) -> Model:
    network = network_of(family)
    return wrap(accelerate.cpu_offload(network, execution_device=torch.device("cpu")), name=family)


def users_disk(family: str, folder: Path) -> Model:
    return wrap(accelerate.disk_offload(network_of(family), str(folder), execution_device=torch.device("cpu")))


def users_map(family: str, folder: Path) -> Model:
    return wrap(accelerate.dispatch_model(network_of(family), halves(family), offload_dir=str(folder)))


WAYS = [split, on_disk, sharded_on_disk, in_main_memory, users_disk, users_map]
Opener = Callable[[str, Path], Model]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", params=WAYS, ids=lambda way: way.__name__)
def pair(request: pytest.FixtureRequest, family: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Model]:
    """A model in memory and the same one offloaded; every test leaves both as they were."""
    place = tmp_path_factory.mktemp("pair")
    folder = place / "model"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRUNELENS_CACHE", str(place / "cache"))
        away = request.param(family, folder)
        assert any(weight.is_meta for weight in away.network.parameters())
        return load(folder, device="cpu") if (folder / "config.json").is_file() else wrap(network_of(family)), away


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected)
    for left, right in zip(found, expected, strict=True):
        assert left.device.type == "cpu"
        assert torch.equal(left, right)


def outline(model: Model) -> list[Any]:
    anatomy = model.anatomy
    sublayers = [part for block in anatomy.blocks for part in block.sublayers]
    parts = [(part.kind, part.name, part.norms, part.scale) for part in sublayers]
    return [anatomy.decoder, anatomy.final_norm, anatomy.head, anatomy.vocab_size, anatomy.hidden_size, *parts]


def test_everything_equals_the_model_in_memory(pair: tuple[Model, Model]) -> None:
    whole, away = pair
    assert outline(away) == outline(whole)
    assert (away.device, away.dtype) == (whole.device, whole.dtype)
    expected = forced_states(whole, TRAJECTORIES, DROPS)
    for _ in range(2):
        assert_same(forced_states(away, TRAJECTORIES, DROPS), expected)
        assert_same([away.head(states) for states in expected], [whole.head(states) for states in expected])
    scores = [rank_redundancy(model, PROMPTS).scores for model in (whole, away)]
    assert scores[0] == scores[1]
    for drop in (Drop(), *DROPS):
        counts = [num_parameters(model.network, model.anatomy, drop) for model in (whole, away)]
        assert counts[0] == counts[1]


def test_writing_equals_the_model_in_memory(pair: tuple[Model, Model]) -> None:
    whole, away = pair
    written = [write_dense(model, PROMPTS, 6, 1.0, 0, 4) for model in pair]
    for left, right in zip(*written, strict=True):
        assert repr(left) == repr(right)
    free = []
    for model in (whole, away):
        with dropped(model.anatomy, DROPS[1]):
            free.append(write_free(model, PROMPTS, written[0][0], [index % 3 for index in range(len(PROMPTS))], 6, 4))
    assert repr(free[0]) == repr(free[1])
    for left, right in zip(*free, strict=True):
        assert torch.equal(left.states, right.states)


def test_weights_and_fingerprint_are_those_of_the_numbers(pair: tuple[Model, Model]) -> None:
    whole, away = pair
    expected, found = dict(named_weights(whole.network)), dict(named_weights(away.network))
    assert expected.keys() <= found.keys() <= whole.network.state_dict().keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    assert away.fingerprint == whole.fingerprint
    again = wrap(away.network)  # after runs under inference mode
    assert again.fingerprint == fingerprint_model(whole.network)


def test_what_is_dropped_is_not_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    away = on_disk("llama", tmp_path / "model")
    fetched: list[str] = []
    loader = accelerate.utils.OffloadedWeightsLoader
    own = loader.__getitem__
    monkeypatch.setattr(loader, "__getitem__", lambda self, key: (fetched.append(key), own(self, key))[1])
    away_states = forced_states(away, TRAJECTORIES, [Drop(attention=frozenset([2]), block=frozenset([3]))])
    assert len(away_states) == 2
    counts = {name: fetched.count(name) for name in dict(away.network.named_parameters())}
    assert counts["model.layers.0.mlp.up_proj.weight"] == 1  # replayed
    assert counts["model.layers.2.mlp.up_proj.weight"] == 2
    assert counts["model.layers.2.self_attn.q_proj.weight"] == 1  # taken out
    assert counts["model.layers.3.mlp.up_proj.weight"] == 1
    assert counts["lm_head.weight"] == 0
    fetched.clear()
    away.head(away_states[0])
    assert fetched == ["lm_head.weight"]


def test_forwards_come_back_after_parts_were_out(pair: tuple[Model, Model]) -> None:
    _, away = pair
    before = {module: module.__dict__.get("forward") for module in away.network.modules()}
    with dropped(away.anatomy, DROPS[0]), dropped(away.anatomy, DROPS[3]):
        away.head(torch.zeros(2, away.anatomy.hidden_size))
    assert {module: module.__dict__.get("forward") for module in away.network.modules()} == before


def test_after_a_failure_inside_a_hook_the_results_are_the_same(tmp_path: Path) -> None:
    away = on_disk("llama", tmp_path / "model")
    expected = forced_states(away, TRAJECTORIES, DROPS)

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    handle = away.layers[2].register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        forced_states(away, TRAJECTORIES, DROPS)
    handle.remove()
    assert_same(forced_states(away, TRAJECTORIES, DROPS), expected)


def test_float16_and_bfloat16_are_offloaded_too(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", "llama")
    for dtype in ("float64", "bfloat16", "float16"):
        whole, away = load(folder, dtype, "cpu"), load(folder, dtype, halves("llama"))
        assert away.dtype == whole.dtype
        assert away.fingerprint == whole.fingerprint
        assert_same(forced_states(away, TRAJECTORIES, DROPS), forced_states(whole, TRAJECTORIES, DROPS))


# --- auto --------------------------------------------------------------------------------------------------


def memory(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Let accelerate find so many bytes of main memory and no GPU."""
    monkeypatch.setattr(planning, "accelerate_max_memory", lambda max_memory=None: {"cpu": size})


def test_auto_with_room_is_the_model_in_memory(checkpoint: Path, cache: Path) -> None:
    whole, model = load(checkpoint, device="cpu"), load(checkpoint, device="auto")
    assert model.spread
    if not torch.cuda.is_available():
        assert model.device == torch.device("cpu")
        assert not any(hasattr(module, "_hf_hook") for module in model.network.modules())
        assert_same(forced_states(model, TRAJECTORIES, DROPS), forced_states(whole, TRAJECTORIES, DROPS))
    assert model.fingerprint == whole.fingerprint
    assert list((cache / "offload").iterdir()) == []


@pytest.mark.parametrize("size", [0, 60_000, 120_000])
def test_auto_without_room_offloads(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, size: int, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = load(checkpoint, device="cpu")
    memory(monkeypatch, size)
    away = load(checkpoint, dtype="float32", device="auto")
    waiting = sum(weight.is_meta for weight in away.network.parameters())
    assert 0 < waiting <= len(list(away.network.parameters()))
    assert_same(forced_states(away, TRAJECTORIES, DROPS), forced_states(whole, TRAJECTORIES, DROPS))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", ["folder", "sharded", "gguf"])
def test_the_command_runs_with_auto(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    if kind == "gguf":
        model = write_gguf(tmp_path / "tiny.gguf", tiny_network("llama"))
    else:
        model = saved(tmp_path / "model", "llama", shards=kind == "sharded")
    answers = []
    for device, size in (("cpu", 0), ("auto", 10**9), ("auto", 60_000)):
        if device == "auto":
            memory(monkeypatch, size)
        out = tmp_path / f"{device}-{size}"
        words = ["compare", model, "drop-attention:1", "--device", device, "--dtype", "float32", "--num-prompts", "2"]
        words += ["--max-new-tokens", "4", "--json", "-o", out]
        monkeypatch.setattr(sys, "argv", ["prunelens", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        output = capsys.readouterr()
        assert ended.value.code == 0, output.err
        answers.append(json.loads(output.out)["summary"])
    assert answers[0] == answers[1] == answers[2]


def test_models_compared_with_one_are_opened_the_same_way(checkpoint: Path) -> None:
    assert load(checkpoint, device="auto").placement == "auto"
    assert load(checkpoint, device={"": "disk"}).placement == "auto"
    assert load(checkpoint, device="cpu").placement == torch.device("cpu")


# --- what must be written anew -----------------------------------------------------------------------------


def test_what_was_written_to_offload_goes_with_the_network(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_network("llama"))
    whole = load(path, "float32", "cpu")
    memory(monkeypatch, 60_000)
    away = load(path, "float32", "auto")
    assert len(list((cache / "offload").iterdir())) == 1
    assert_same(forced_states(away, TRAJECTORIES, DROPS), forced_states(whole, TRAJECTORIES, DROPS))
    del away
    gc.collect()
    assert list((cache / "offload").iterdir()) == []


def test_what_killed_processes_had_offloaded_is_removed_and_no_more(tmp_path: Path) -> None:
    forgetful = (
        "import os, sys; from pathlib import Path; from prunelens.cache import scratch_folder; "
        "folder = scratch_folder(Path(sys.argv[1])); (folder / 'weight.dat').touch(); print(folder, flush=True); "
        "sys.stdin.read() if len(sys.argv) > 2 else os.kill(os.getpid(), 9)"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(prunelens.__file__).parents[1])}
    command = [sys.executable, "-c", forgetful, str(tmp_path / "offload")]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    with subprocess.Popen([*command, "lives"], **pipes) as living, subprocess.Popen(command, **pipes) as killed:
        of_living, of_killed = (Path(process.stdout.readline().strip()) for process in (living, killed))
        killed.wait()
        assert (of_killed / "weight.dat").exists()
        others = [
            tmp_path / "offload" / name for name in ("mine", "prunelens-0badcafe-1-abcdefgh", of_killed.name[:-1])
        ]
        for other in others:
            other.mkdir()
        new = scratch_folder(tmp_path / "offload")
        assert set((tmp_path / "offload").iterdir()) == {of_living, new, *others}
        living.stdin.close()


def test_a_gguf_file_takes_no_map_to_disk(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_network("llama"))
    with pytest.raises(PrunelensError, match=r"tiny\.gguf.*--device auto"):
        load(path, device=halves("llama"))
    assert load(path, device={"": "cpu"}).device == torch.device("cpu")


def test_a_cache_that_cannot_be_written_does_not_matter(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("PRUNELENS_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert load(checkpoint, device={"": "disk"}).device == torch.device("cpu")
    assert not list(tmp_path.glob("prunelens-*"))


# --- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("layer", [0, 1])
def test_weights_that_are_no_numbers_are_found_on_disk(checkpoint: Path, value: float, layer: int) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    tensors[f"model.layers.{layer}.mlp.up_proj.weight"][3, 5] = value
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    for device in (halves("llama"), {"": "disk"}):
        with pytest.raises(PrunelensError, match=rf"layers\.{layer}\.mlp\.up_proj\.weight.*NaN"):
            load(checkpoint, device=device)


def test_weights_that_are_no_numbers_are_found_under_the_users_hooks(tmp_path: Path) -> None:
    for offload in (accelerate.cpu_offload, lambda network: accelerate.disk_offload(network, str(tmp_path / "folder"))):
        network = tiny_network("llama")
        network.model.layers[3].self_attn.o_proj.weight.data[0, 0] = float("nan")
        with pytest.raises(PrunelensError, match=r"layers\.3\.self_attn\.o_proj\.weight.*NaN"):
            wrap(offload(network))


def missing(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.1.mlp.up_proj.weight"]


def misshapen(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.ones(7, 32)


@pytest.mark.parametrize("change", [missing, misshapen])
def test_gaps_on_disk_are_found(checkpoint: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    change(tensors)
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    for device in (halves("llama"), {"": "disk"}):
        with pytest.raises(PrunelensError, match=r"layers\.1\.mlp\.up_proj\.weight"):
            load(checkpoint, device=device)


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ({}, "empty"),
        ({"": "cpu", "model.layers.1": "disk"}, "do not overlap"),
        ({"": "meta"}, "holds no numbers"),
        ({"": "nowhere"}, "nowhere"),
        ({"": "cuda:77"}, "cuda:77"),
        ({"": 77}, "77"),
        ({"model": "disk"}, "lm_head"),
        ({"model": "cpu", "lm_hat": "disk"}, "lm_head"),
        ({"model": "cpu", "lm_head": "disk", "lm_hat": "cpu"}, "'lm_hat'.*LlamaForCausalLM"),
    ],
)
def test_a_map_that_cannot_be_followed(checkpoint: Path, device: Any, words: str) -> None:
    with pytest.raises(PrunelensError, match=words):
        load(checkpoint, device=device)


@pytest.mark.parametrize("places", [("cpu", "disk"), ("disk", "cpu")])
def test_tied_weights_apart(tmp_path: Path, places: tuple[str, str]) -> None:
    folder = saved(tmp_path / "model", "gpt2")
    with pytest.raises(PrunelensError, match=r"map of devices .* tied weights"):
        load(folder, device=dict(zip(("transformer", "lm_head"), places, strict=True)))


def test_numbers_that_are_nowhere() -> None:
    network = tiny_network("llama").to("meta")
    with pytest.raises(PrunelensError, match=r"embed_tokens.*missing.*load"):
        wrap(network)


def test_without_accelerate(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(PrunelensError, match="pip install accelerate"):
        load(checkpoint, device="auto")
    with pytest.raises(PrunelensError, match="pip install accelerate"):
        load(checkpoint, device={"": "disk"})


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
@pytest.mark.parametrize("where", ["from_pretrained", "find_anatomy"])
def test_a_model_that_fits_nowhere(
    checkpoint: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, where: str
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    inside = "prunelens.models.opening.loading" if where == "find_anatomy" else "transformers.AutoModelForCausalLM"
    monkeypatch.setattr(f"{inside}.{where}", fail)
    with pytest.raises(PrunelensError, match=r"does not fit into cpu.*--device auto"):
        load(checkpoint, device="cpu")
    with pytest.raises(PrunelensError, match=r"does not fit.*even alone.*--dtype"):
        load(checkpoint, device="auto")
    assert list((cache / "offload").iterdir()) == []


def test_a_full_disk_is_one_sentence(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    memory(monkeypatch, 60_000)
    monkeypatch.setattr(planning, "save_file", full)
    with pytest.raises(PrunelensError, match="No space left on device"):
        load(write_gguf(tmp_path / "tiny.gguf", tiny_network("llama")), device="auto")
    assert list((cache / "offload").iterdir()) == []
