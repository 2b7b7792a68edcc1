"""Commands that are stopped, killed or starved, and models without numbers: real processes on tiny checkpoints.

Most are forked from a process that has imported everything (`forked.py`); fresh ones run where the start or the end of
the interpreter is what is tested.
"""

import errno
import json
import math
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import prunelens.cli.main
import prunelens.report.pages.compare
from conftest import COMMON, text_network, text_tokenizer, tiny_network, tiny_tokenizer, without_progress, words
from forked import Forked, Forker, forker, heed_signals
from prunelens.api import compare
from prunelens.cli.options import print_json
from prunelens.errors import PrunelensError
from prunelens.locks import HeldError, locked
from prunelens.memory import is_out_of_memory, memory_sentence
from prunelens.models.opening.loading import wrap
from prunelens.report.pages.rerender import render_again
from prunelens.report.terminal.benchmark import speeds_as_json
from prunelens.report.terminal.compare import print_result
from prunelens.results import Comparison
from prunelens.study.benchmark.record import Speed, SpeedSettings, Spread
from prunelens.study.compare.schemas import RUN

SOURCE = str(Path(prunelens.__file__).parents[1])
PRUNELENS = [sys.executable, "-c", "from prunelens.cli.main import main; main()"]


def wait_for(condition: Callable[[], Any], process: Any) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


@pytest.fixture
def place(checkpoint: Path) -> Path:
    """A folder with the checkpoint, prompts enough to be stopped among them, and a study."""
    lines = [words(3 + row % 90, 4 + row % 80) for row in range(3000)]
    (checkpoint.parent / "prompts.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return checkpoint.parent


@pytest.fixture(scope="module")
def commands() -> Iterator[Forker]:
    with forker() as found:
        yield found


def start(commands: Forker, place: Path, *argv: str, **more: str) -> Forked:
    """A command, forked."""
    return commands.start(place, *argv, PRUNELENS_CACHE=str(place / "cache"), **more)


def start_fresh(place: Path, *argv: str, **more: Any) -> subprocess.Popen[str]:
    """A command in an interpreter of its own."""
    environment = os.environ | {"PRUNELENS_CACHE": str(place / "cache"), "PYTHONPATH": SOURCE}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | more
    return subprocess.Popen([*PRUNELENS, *argv], cwd=place, env=environment, **pipes)


LONG_COMPARE = ["compare", "checkpoint", "drop-mlp:1", "--prompts", "prompts.txt", "--no-chat-template"]
LONG_COMPARE += ["--max-new-tokens", "100", "-o", "deep/run"]


# --- signals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "fresh"),
    [(signal.SIGTERM, False), (signal.SIGHUP, False), (signal.SIGINT, False), (signal.SIGINT, True)],
)
def test_a_signal_stops_a_command_in_order(commands: Forker, place: Path, number: signal.Signals, fresh: bool) -> None:
    before = {path.name for path in place.iterdir()}
    process = (
        start_fresh(place, *LONG_COMPARE, preexec_fn=heed_signals) if fresh else start(commands, place, *LONG_COMPARE)
    )
    lock = place / "deep" / ".run.lock"
    wait_for(lambda: lock.exists() and lock.read_text(), process)
    process.send_signal(number)
    process.send_signal(number)  # schedulers send it to the group and to the leader
    stdout, stderr = process.communicate()
    stderr = without_progress(stderr)
    assert (process.returncode, stdout, without_progress(stderr)) == (128 + number, "", "prunelens: stopped\n")
    assert {path.name for path in place.iterdir()} - {"cache"} == before


PRUNE_STEPS = ("save_weights", "write_companions", "logits_on_reopening", "checked_difference")


@pytest.mark.parametrize("step", PRUNE_STEPS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("earlier", [False, True])
def test_a_signal_while_a_checkpoint_is_written_leaves_what_was_there(
    commands: Forker, place: Path, number: signal.Signals, step: str, earlier: bool
) -> None:
    """The process stops itself after a step of the export, when half of the checkpoint is on the disk."""
    if earlier:
        start(commands, place, "prune", "checkpoint", "drop-mlp@1", "-o", "pruned").communicate()
        assert (place / "pruned" / "config.json").is_file()
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file() and "cache" not in path.parts}
    code = f"""
import os, time
import prunelens.cli.main
from prunelens.models.saving import export
done = export.{step}
def stopped(*args, **more):
    done(*args, **more)
    os.kill(os.getpid(), {int(number)})
    time.sleep(60)
export.{step} = stopped
prunelens.cli.main.main()
"""
    process = start(commands, place, "prune", "checkpoint", "drop-mlp@2", "-o", "pruned", code=code)
    stdout, stderr = process.communicate()
    assert (process.returncode, stdout, without_progress(stderr)) == (128 + number, "", "prunelens: stopped\n")
    after = {path: path.read_bytes() for path in place.rglob("*") if path.is_file() and "cache" not in path.parts}
    assert after == before
    assert (place / "pruned").exists() == earlier
    assert not list(place.glob(".pruned*"))


def test_a_signal_that_is_ignored_stays_so(place: Path) -> None:
    """As under nohup."""
    process = start_fresh(
        place, "inspect", "checkpoint", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)
    )
    wait_for(lambda: "torch" in Path(f"/proc/{process.pid}/maps").read_text(), process)
    process.send_signal(signal.SIGHUP)
    assert without_progress(process.communicate()[1]) == ""
    assert process.returncode == 0


def test_a_sweep_that_is_stopped_ends_its_workers(commands: Forker, place: Path) -> None:
    recipes = [f"drop-{part}@{layer}" for part in ("mlp", "attention", "block") for layer in range(4)]
    study = {"model": "checkpoint", "recipes": recipes, "compare": {"prompts": "prompts.txt", "chat_template": False}}
    (place / "study.yaml").write_text(json.dumps(study), encoding="utf-8")
    process = start(commands, place, "sweep", "study.yaml", "-o", "swept")
    workers: list[psutil.Process] = []

    def has_workers() -> bool:
        workers[:] = psutil.Process(process.pid).children(recursive=True)
        return len(workers) >= 3  # the fork server, the tracker, a worker

    wait_for(has_workers, process)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate()
    stderr = without_progress(stderr)
    assert (process.returncode, stderr) == (143, "prunelens: stopped\n")
    assert not psutil.wait_procs(workers, timeout=30)[1]
    assert not (place / "swept").exists()  # no cell was made


def test_nobody_reads_on(place: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    process = start_fresh(place, "inspect", "checkpoint", "--json", stdout=writer)
    os.close(writer)
    assert without_progress(process.communicate()[1]) == ""
    assert process.returncode in (1, 141)


@pytest.mark.parametrize("stream", ["stdin", "stdout", "stderr"])
def test_a_standard_stream_may_be_closed(commands: Forker, place: Path, stream: str) -> None:
    """The interpreter leaves None in the place of a stream whose descriptor is closed at its start."""
    number = ("stdin", "stdout", "stderr").index(stream)
    code = f"import os, sys; os.close({number}); sys.{stream} = None; from prunelens.cli.main import main; main()"
    process = start(commands, place, "inspect", "checkpoint", code=code)
    stdout, stderr = process.communicate()
    assert (process.returncode, "Traceback" in stderr) == (0, False), stderr
    assert ("self_attn" in stdout) == (stream != "stdout")


def test_all_standard_streams_may_be_closed(place: Path) -> None:
    command = " ".join(f"'{part}'" for part in (*PRUNELENS, "inspect", "checkpoint"))
    environment = os.environ | {"PYTHONPATH": SOURCE}
    shell = ["bash", "-c", f"{command} <&- >&- 2>&-"]
    done = subprocess.run(shell, cwd=place, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a full disk")
def test_a_full_disk_behind_stdout_is_told(place: Path) -> None:
    with open("/dev/full", "w") as full:
        process = start_fresh(place, "inspect", "checkpoint", "--json", stdout=full)
        _, stderr = process.communicate()
        stderr = without_progress(stderr)
    assert process.returncode == 2
    assert stderr.startswith("prunelens: ")
    assert "No space left" in stderr
    assert stderr.count("\n") == 1


# --- two writers, and what a killed one leaves -------------------------------------------------------------------


def test_a_second_writer_is_told_who_is_at_work_and_a_dead_one_is_no_hindrance(commands: Forker, place: Path) -> None:
    process = start(commands, place, *LONG_COMPARE)
    lock = place / "deep" / ".run.lock"
    wait_for(lambda: lock.exists() and lock.read_text(), process)
    for command in ("compare", "evaluate"):
        second = start(commands, place, command, "checkpoint", "drop-mlp:1", "-o", "deep/run")
        stdout, stderr = second.communicate()
        stderr = without_progress(stderr)
        assert (second.returncode, stdout) == (2, "")
        assert f"deep/run is being written by process {process.pid} on " in stderr
        assert stderr.count("\n") == 1
    process.kill()
    process.communicate()
    assert lock.exists()
    RUN.probe_target(place / "deep" / "run")
    assert list((place / "deep").iterdir()) == []


def test_a_second_sweep_touches_nothing_of_the_first(commands: Forker, place: Path) -> None:
    study = {"model": "checkpoint", "recipes": ["drop-mlp@1"], "compare": {"num_prompts": 2}}
    (place / "study.yaml").write_text(json.dumps(study), encoding="utf-8")
    living = place / "swept" / "cells" / ".0123456789abcdef.00000000.aaaaaaaa"
    living.mkdir(parents=True)
    (place / "swept" / "study.json").write_text("{}")
    with locked(place / "swept" / ".lock", "the first"):
        process = start(commands, place, "sweep", "study.yaml", "-o", "swept")
        _, stderr = process.communicate()
        stderr = without_progress(stderr)
    assert process.returncode == 2
    assert f"swept is being written by process {os.getpid()} on " in stderr
    assert living.is_dir()
    assert (place / "swept" / "study.json").read_text() == "{}"


def test_a_lock_is_held_by_one_process_and_once_more_by_the_same(tmp_path: Path) -> None:
    path = tmp_path / ".x.lock"
    with locked(path, "x") as first, locked(path, "x") as again:
        assert (first, again) == (True, False)
        child = os.fork()
        if child == 0:
            try:
                with locked(path, "x"):
                    os._exit(1)
            except HeldError:
                os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert list(tmp_path.iterdir()) == []


def test_without_locks_work_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*args: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", unknown)
    with locked(tmp_path / ".x.lock", "x") as alone:
        assert not alone
    assert list(tmp_path.iterdir()) == []


# --- refused before anything -------------------------------------------------------------------------------------


@pytest.mark.parametrize("output", ["checkpoint", "checkpoint/run", "."])
@pytest.mark.parametrize("command", [("compare",), ("evaluate",), ("prune",), ("advise", "--for", "retrieval")])
def test_no_output_in_or_around_the_model(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    output: str,
    command: tuple[str, ...],
) -> None:
    monkeypatch.chdir(place)
    recipe = [] if command[0] == "advise" else ["drop-mlp:1"]
    monkeypatch.setattr(sys, "argv", ["prunelens", command[0], "checkpoint", *recipe, *command[1:], "-o", output])
    before = sorted(place.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        prunelens.cli.main.main()
    assert stop.value.code == 2
    assert without_progress(capsys.readouterr().err).count("\n") == 1
    assert sorted(place.rglob("*")) == before


STUDY: dict[str, Any] = {"model": "checkpoint", "recipes": ["drop-mlp@1"], "compare": {"num_prompts": 2}}
BAD_OPENINGS = [
    ("dtype", "float128"),
    ("dtype", "int8"),
    ("dtype", ""),
    ("device", "cuda:99"),
    ("device", "gpu"),
    ("device", "cpu:"),
    ("device", "meta"),
    ("device", "cuda:-1"),
]


def refuses(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The sentence of a command that must read no model and leave nothing."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("PRUNELENS_CACHE", str(place / "cache"))
    monkeypatch.setattr("prunelens.models.opening.sources.resolve_name", lambda name: pytest.fail("a model is read"))
    for reader in ("fingerprint", "loading"):
        monkeypatch.setattr(
            f"prunelens.models.opening.{reader}.resolve_name", lambda name: pytest.fail("a model is read")
        )
    monkeypatch.setattr(sys, "argv", ["prunelens", *argv])
    before = sorted(place.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        prunelens.cli.main.main()
    said = capsys.readouterr()
    assert (stop.value.code, said.out, without_progress(said.err).count("\n")) == (2, "", 1), said.err
    assert sorted(place.rglob("*")) == before
    return said.err.removeprefix("prunelens: ").rstrip("\n")


@pytest.mark.parametrize(("name", "value"), BAD_OPENINGS)
@pytest.mark.parametrize("command", ["sweep", "advise"])
def test_a_dtype_or_device_is_refused_before_a_model_is_read(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    name: str,
    value: str,
) -> None:
    (place / "study.yaml").write_text(json.dumps(STUDY | {name: value}), encoding="utf-8")
    argv = ["study.yaml"] if command == "sweep" else ["checkpoint", "--for", "retrieval", f"--{name}", value]
    said = refuses(place, monkeypatch, capsys, command, *argv, "-o", "deep/out")
    expected = (
        "a device such as"
        if value == "meta"
        else {"dtype": "a dtype of", "device": "auto or an available device"}[name]
    )
    assert said.startswith(f"expected {expected}")


@pytest.mark.parametrize(
    "options",
    [("--seed", "4294967296"), ("--long-tokens", "0"), ("--limit", "1"), ("--keep", "nan"), ("--budget", "inf")],
)
def test_advice_is_refused_before_a_model_is_read(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: tuple[str, ...]
) -> None:
    argv = ["advise", "checkpoint", "--for", "retrieval", *options, "-o", "deep/out"]
    assert refuses(place, monkeypatch, capsys, *argv).startswith("expected ")


@pytest.mark.parametrize(
    "address", ["127.0.0.1:{port}", "ray://127.0.0.1:{port}", "nowhere", "127.0.0.1:99999", "[::1"]
)
def test_no_ray_is_refused_before_a_model_is_read(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], address: str
) -> None:
    (place / "study.yaml").write_text(json.dumps(STUDY), encoding="utf-8")
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        asked = address.format(port=unheard.getsockname()[1])
        argv = ["sweep", "study.yaml", "--executor", "ray", "--address", asked, "-o", "deep/out"]
        assert refuses(place, monkeypatch, capsys, *argv).startswith(f"expected Ray at {asked}, found no way to it (")


def test_an_address_without_ray_is_refused(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "study.yaml").write_text(json.dumps(STUDY), encoding="utf-8")
    said = refuses(place, monkeypatch, capsys, "sweep", "study.yaml", "--address", "auto", "-o", "deep/out")
    assert said == "expected --executor ray with --address, found local; leave --address out"


@pytest.mark.parametrize("change", [{"model": "nowhere"}, {"recipes": ["drop-block:9"]}])
def test_a_refused_sweep_leaves_nothing(commands: Forker, place: Path, change: dict[str, Any]) -> None:
    (place / "study.yaml").write_text(json.dumps(STUDY | change), encoding="utf-8")
    process = start(commands, place, "sweep", "study.yaml", "-o", "deep/swept")
    _, stderr = process.communicate()
    stderr = without_progress(stderr)
    if "recipes" in change:  # a cell that failed is a result
        assert process.returncode == 0
        return
    assert (process.returncode, stderr.count("\n")) == (2, 1), stderr
    assert not (place / "deep").exists()


# --- models without numbers --------------------------------------------------------------------------------------


def nothing(network: Any) -> None:
    pass


def zero(network: Any) -> None:
    for weight in network.parameters():
        weight.data.zero_()


def zero_head(network: Any) -> None:
    network.lm_head.weight.data.zero_()


def zero_norm(network: Any) -> None:
    network.model.norm.weight.data.zero_()


def huge_head(network: Any) -> None:
    network.lm_head.weight.data.mul_(1e30)


def half_head(network: Any) -> None:
    network.lm_head.weight.data[48:] = 0


def ends_at_once(network: Any) -> None:
    network.generation_config.eos_token_id = network.config.eos_token_id = list(range(97))


FULL = {"attribute": True, "draft": True, "noise_dtype": "bfloat16", "lens": "both", "lens_steps": 50}


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize("more", [{}, FULL, FULL | {"max_new_tokens": 1}], ids=["plain", "full", "one token"])
@pytest.mark.parametrize(
    ("dense", "compressed"),
    [
        (nothing, nothing),
        (nothing, zero),
        (nothing, zero_norm),
        (nothing, half_head),
        (nothing, huge_head),
        (zero, nothing),
        (zero_head, nothing),
        (huge_head, nothing),
        (ends_at_once, nothing),
        (zero, zero),
    ],
)
def test_a_degenerate_model_is_compared_to_the_end(
    tmp_path: Path, dense: Callable[[Any], None], compressed: Callable[[Any], None], more: dict[str, Any]
) -> None:
    models = []
    for name, change in (("dense", dense), ("compressed", compressed)):
        network = tiny_network("llama")
        change(network)
        models.append(wrap(network, tiny_tokenizer(), name=name))
    (tmp_path / "prompts.txt").write_text(f"{words(3, 4, 5)}\n{words(6, 7, 9, 10)}\n")
    settings = {"max_new_tokens": 6, "chat_template": False, "prompts": tmp_path / "prompts.txt"} | more
    result = compare(models[0], models[1], **settings)
    page = result.report(tmp_path / "run")
    print_result(result.tables, result.info)
    info = json.loads(page.with_name("run.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert render_again(tmp_path / "run") == page.read_text(encoding="utf-8")
    summary = info["summary"][0]
    vectors = np.array(
        result.tables["steps"].filter(pa.compute.equal(result.tables["steps"]["trace"], "greedy"))["hidden_cosine"]
    )
    is_undefined = zero in (dense, compressed) or zero_norm in (dense, compressed)
    assert (summary["cosines"]["h"] is None) == is_undefined
    assert np.isnan(vectors).all() == is_undefined
    if is_undefined:
        assert any("hidden_cosine" in name for name in info["nulls"])
    if dense is compressed:
        assert summary["kl"]["max"] == pytest.approx(0, abs=1e-9)
    if compressed is zero and dense is nothing:  # the compressed model says 1/97 to every token
        entropies = result.tables["steps"]["entropy_compressed"].to_numpy()
        assert entropies == pytest.approx(math.log(97))


def test_a_huge_seed_is_refused_before_anything_runs() -> None:
    for seed in (2**63, 2**70, 10**4000, -1):
        with pytest.raises(PrunelensError, match=r"expected a seed of at (least 0|most 4294967295), ") as refused:
            compare("nowhere", "drop-mlp:1", seed=seed)
        assert len(str(refused.value)) < 200


def test_a_page_that_cannot_be_made_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrap(tiny_network("llama"), tiny_tokenizer(), name="dense")
    (tmp_path / "prompts.txt").write_text(words(3, 4, 5) + "\n")
    result = compare(model, "drop-mlp:1", prompts=tmp_path / "prompts.txt", max_new_tokens=3, chat_template=False)
    with monkeypatch.context() as patch:
        patch.setattr(prunelens.report.pages.compare, "render_page", lambda run: 1 / 0)
        with pytest.raises(PrunelensError, match=r"the page could not be made \(ZeroDivisionError.*prunelens report"):
            result.report(tmp_path / "run")
    assert Comparison.open(tmp_path / "run").summary == result.summary
    assert "<html" in render_again(tmp_path / "run")


PAGES = {
    "evaluate": "pages.evaluate.render_evaluation",
    "sweep": "pages.sweep.render_sweep",
}


@pytest.mark.parametrize("command", PAGES)
def test_no_page_that_cannot_be_made_loses_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PRUNELENS_CACHE", str(tmp_path / "cache"))
    text_network().save_pretrained("model")
    text_tokenizer().save_pretrained("model")
    study = {"model": "model", "recipes": ["drop-mlp@1"], "tasks": ["core_letters"], "evaluate": {"limit": 4}}
    Path("study.yaml").write_text(json.dumps(study | {"compare": None}), encoding="utf-8")
    capsys.readouterr()
    argv = {
        "evaluate": ["model", "drop-mlp@1", "--tasks", "core_letters", "--limit", "4", "-o", "out"],
        "sweep": ["study.yaml", "-o", "out"],
    }[command]
    with monkeypatch.context() as patch:
        patch.setattr(f"prunelens.report.{PAGES[command]}", lambda run: 1 / 0)
        patch.setattr(sys, "argv", ["prunelens", command, *argv])
        with pytest.raises(SystemExit) as stop:
            prunelens.cli.main.main()
    said = without_progress(capsys.readouterr().err)
    folder = Path("out")
    assert (stop.value.code, said.count("\n")) == (2, 1), said
    assert (
        "the page could not be made (ZeroDivisionError: division by zero); the tables and run.json are in out" in said
    )
    assert not (folder / "report.html").exists()
    assert (folder / "run.json").is_file()
    assert "<html" in render_again(folder)


@pytest.mark.parametrize("failing", ["summarise", "describe_run", "noise_summary"])
def test_a_summary_that_cannot_be_made_loses_no_table(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], failing: str
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("PRUNELENS_CACHE", str(place / "cache"))
    options = ["--prompts", "few.txt", "--no-chat-template", "--max-new-tokens", "3", "-o", "deep/run"]
    Path("few.txt").write_text(words(3, 4, 5) + "\n", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["prunelens", "compare", "checkpoint", "drop-mlp:1", *options])
    with monkeypatch.context() as patch:
        patch.setattr(f"prunelens.study.compare.stages.{failing}", lambda *given: 1 / 0)
        with pytest.raises(SystemExit) as stop:
            prunelens.cli.main.main()
    said = without_progress(capsys.readouterr().err)
    assert (stop.value.code, said.count("\n")) == (2, 1), said
    assert "the summary could not be made (ZeroDivisionError: division by zero); the tables" in said
    steps = pq.read_table("deep/run/steps.parquet")
    assert {path.stem for path in Path("deep/run").glob("*.parquet")} == set(RUN.schemas)
    with pytest.raises(PrunelensError, match="is damaged"):
        Comparison.open("deep/run")
    with pytest.raises(SystemExit) as stop:  # the next run takes the place
        prunelens.cli.main.main()
    assert stop.value.code == 0
    assert Comparison.open("deep/run").tables["steps"].equals(steps)


@pytest.mark.parametrize("recipe", ["drop-mlp@1", "wanda:0.5"])
def test_a_model_card_that_cannot_be_made_loses_no_checkpoint(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], recipe: str
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("PRUNELENS_CACHE", str(place / "cache"))
    Path("few.txt").write_text(words(*range(3, 40)) + "\n", encoding="utf-8")
    argv = ["prunelens", "prune", "checkpoint", recipe, "--calibration", "few.txt", "-o", "new"]
    monkeypatch.setattr(sys, "argv", argv)
    trees = []
    for fails in (True, False):
        with monkeypatch.context() as patch:
            if fails:
                patch.setattr("prunelens.study.prune.prune.model_card", lambda *given: 1 / 0)
            with pytest.raises(SystemExit) as stop:
                prunelens.cli.main.main()
        said = without_progress(capsys.readouterr().err)
        assert (stop.value.code, said.count("\n")) == ((2, 1) if fails else (0, 0)), said
        trees.append({path.name: path.read_bytes() for path in Path("new").iterdir()})
        if fails:
            assert "the model card could not be made (division by zero); the checkpoint in new is whole" in said
    assert trees[0] == {name: content for name, content in trees[1].items() if name != "README.md"}
    assert len(trees[1]) == len(trees[0]) + 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_json_on_stdout_holds_no_number_that_json_does_not_know(
    capsys: pytest.CaptureFixture[str], value: float
) -> None:
    odd, sound = Spread(value, 1.0, value), Spread(2.0, 1.0, 3.0)
    settings = SpeedSettings(1, 4, 2, 1)
    speed = Speed("dense", settings, "cpu", "float32", sound, odd, None, None, 1, None, 1.0, 0.0, 1, 1, value, ("n",))
    print_json(speeds_as_json([speed]))
    found = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(name))["models"][0]
    assert found["decode_tokens_per_second"] == {"median": None, "low": 1.0, "high": None}
    assert (found["label"], found["zero_fraction"]) == ("dense", None)


# --- memory ------------------------------------------------------------------------------------------------------


def torch_full() -> None:
    torch.empty(2**60)


def torch_overflow() -> None:
    torch.empty(2**62, 2**62)


def numpy_full() -> None:
    np.empty(2**60)


def arrow_full() -> None:
    pa.allocate_buffer(2**60)


def system_full() -> None:
    raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))


def wrapped() -> None:
    try:
        np.empty(2**60)
    except MemoryError as error:
        raise ValueError("a library's own words") from error


@pytest.mark.parametrize("work", [torch_full, torch_overflow, numpy_full, arrow_full, system_full, wrapped])
def test_full_memory_is_known_in_every_library_s_words(work: Callable[[], None]) -> None:
    with pytest.raises(Exception) as fault:  # noqa: PT011
        work()
    assert is_out_of_memory(fault.value)
    said = memory_sentence(fault.value)
    assert said.startswith("out of memory (")
    assert "lower --batch-size" in said
    assert len(said) < 300


@pytest.mark.parametrize(
    "error", [ValueError("out of range"), OSError(errno.ENOSPC, "full"), RuntimeError("bug"), None]
)
def test_other_faults_are_not_memory(error: Exception | None) -> None:
    assert not is_out_of_memory(error)


@pytest.mark.parametrize("size", [10**9, 10**15])
@pytest.mark.parametrize("argv", [("benchmark", "--context", "48"), ("compare",), ("evaluate",)])
def test_a_batch_of_a_billion_ends_in_one_sentence_or_well(
    commands: Forker, place: Path, argv: tuple[str, ...], size: int
) -> None:
    (place / "prompts.txt").write_text(words(3, 4, 5) + "\n")
    options = {"compare": ["--prompts", "prompts.txt", "--no-chat-template", "--max-new-tokens", "3"]}.get(argv[0], [])
    if argv[0] == "evaluate":
        options = ["--tasks", "core_retrieval", "--limit", "1"]
    options += ["--batch-size", str(size)]
    process = start(commands, place, argv[0], "checkpoint", "drop-mlp@1", *argv[1:], *options)
    _, stderr = process.communicate()
    stderr = without_progress(stderr)
    assert "Traceback" not in stderr
    if argv[0] == "benchmark":
        assert (process.returncode, stderr.count("\n")) == (2, 1), stderr
        assert ("lower --batch-size" if size == 10**9 else "--batch-size of at most") in stderr
    else:
        assert process.returncode == 0 or stderr.count("\n") == 1, stderr


def limited(megabytes: int) -> Callable[[], None]:
    """As `ulimit -v` does it: so much may a process map."""
    return lambda: resource.setrlimit(resource.RLIMIT_AS, (megabytes * 2**20, megabytes * 2**20))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the address space")
@pytest.mark.parametrize("argv", [("inspect", "checkpoint", "--json"), ("compare", "checkpoint", "drop-mlp:1")])
def test_no_memory_to_load_libraries_is_one_sentence(place: Path, argv: tuple[str, ...]) -> None:
    before = sorted(place.rglob("*"))
    process = start_fresh(place, *argv, preexec_fn=limited(150))
    stdout, stderr = process.communicate()
    stderr = without_progress(stderr)
    assert (process.returncode, stdout, without_progress(stderr).count("\n")) == (2, "", 1), stderr
    assert stderr.startswith("prunelens: out of memory (")
    assert sorted(place.rglob("*")) == before


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 320 MiB."""
    folder = tmp_path_factory.mktemp("large") / "large"
    config = LlamaConfig(**COMMON | {"vocab_size": 320_000, "hidden_size": 128, "tie_word_embeddings": False})
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the address space")
@pytest.mark.parametrize(
    "argv", [("inspect", "--json"), ("compare", "drop-mlp:1"), ("prune", "drop-mlp:1", "-o", "new")]
)
def test_no_memory_in_the_middle_is_one_sentence(
    commands: Forker, place: Path, large: Path, argv: tuple[str, ...]
) -> None:
    """Under a limit that lets all libraries load."""
    before = {path.name for path in place.iterdir()}
    limit = "import resource; resource.setrlimit(resource.RLIMIT_AS, (used() + 2**28,) * 2)"
    used = "used = lambda: int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()"
    code = f"import resource; {used}; {limit}; from prunelens.cli.main import main; main()"
    process = start(commands, place, argv[0], str(large), *argv[1:], code=code)
    stdout, stderr = process.communicate()
    assert (process.returncode, stdout, without_progress(stderr).count("\n")) == (2, "", 1), stderr
    assert any(words in stderr for words in ("out of memory", "does not fit into cpu")), stderr
    assert {path.name for path in place.iterdir()} - {"cache"} == before
