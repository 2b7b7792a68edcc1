"""The name of a model's content: the same for the same numbers, another for any change, remembered safely."""

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import tiny_network
from prunelens.models.opening import fingerprint
from prunelens.models.opening.fingerprint import fingerprint_files, fingerprint_model, fingerprinting

CONFIG = {"model_type": "tiny", "hidden_size": 4, "rope": {"theta": 1e4}}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("PRUNELENS_CACHE", str(folder))
    return folder


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(4, 6, generator=generator) for name in ("b.weight", "a.weight", "c.weight")}


def written(folder: Path, *parts: dict[str, torch.Tensor]) -> list[Path]:
    """One safetensors file for each part, in a new folder."""
    folder.mkdir(parents=True)
    paths = [folder / f"part-{number}.safetensors" for number in range(len(parts))]
    for path, part in zip(paths, parts, strict=True):
        save_file(part, path, metadata={"format": "pt"})
    return paths


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    return written(tmp_path / "model", tensors())


def forget(cache: Path) -> None:
    for path in (cache / "fingerprints").iterdir():
        path.unlink()


def test_a_fingerprint_is_a_hash(files: list[Path]) -> None:
    found = fingerprint_files(files, CONFIG)
    assert len(found) == 64
    assert int(found, 16) >= 0


def test_shards_and_their_order_do_not_matter(files: list[Path], tmp_path: Path) -> None:
    every = tensors()
    first = {"c.weight": every["c.weight"]}
    second = {"a.weight": every["a.weight"], "b.weight": every["b.weight"]}
    expected = fingerprint_files(files, CONFIG)
    shards = written(tmp_path / "sharded", first, second)
    assert fingerprint_files(shards, CONFIG) == expected
    assert fingerprint_files(shards[::-1], CONFIG) == expected
    assert fingerprint_files(written(tmp_path / "three", *({key: every[key]} for key in every)), CONFIG) == expected


def test_the_place_and_the_metadata_of_the_file_do_not_matter(files: list[Path], tmp_path: Path) -> None:
    expected = fingerprint_files(files, CONFIG)
    other = tmp_path / "elsewhere.safetensors"
    save_file(tensors(), other, metadata={"format": "pt", "made": "today"})
    assert fingerprint_files([other], CONFIG) == expected


def one_bit(every: dict[str, torch.Tensor]) -> None:
    every["b.weight"].view(torch.uint8).view(-1)[17] ^= 1


def another_name(every: dict[str, torch.Tensor]) -> None:
    every["d.weight"] = every.pop("c.weight")


def swapped(every: dict[str, torch.Tensor]) -> None:
    every["a.weight"], every["b.weight"] = every["b.weight"], every["a.weight"]


def another_shape(every: dict[str, torch.Tensor]) -> None:
    every["b.weight"] = every["b.weight"].view(6, 4).contiguous()


def another_dtype(every: dict[str, torch.Tensor]) -> None:
    every["b.weight"] = every["b.weight"].view(torch.int32)


def one_more(every: dict[str, torch.Tensor]) -> None:
    every["d.weight"] = torch.zeros(0)


def one_less(every: dict[str, torch.Tensor]) -> None:
    del every["b.weight"]


@pytest.mark.parametrize("change", [one_bit, another_name, swapped, another_shape, another_dtype, one_more, one_less])
def test_any_change_of_the_tensors_shows(
    files: list[Path], tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None]
) -> None:
    changed = tensors()
    change(changed)
    other = written(tmp_path / "changed", changed)
    assert fingerprint_files(other, CONFIG) != fingerprint_files(files, CONFIG)


@pytest.mark.parametrize(
    "changes",
    [{"hidden_size": 5}, {"model_type": "other"}, {"more": None}, {"rope": {"theta": 1e5}}, {"hidden_size": "4"}],
)
def test_any_change_of_the_configuration_shows(files: list[Path], changes: dict[str, Any]) -> None:
    assert fingerprint_files(files, CONFIG | changes) != fingerprint_files(files, CONFIG)


@pytest.mark.parametrize(
    "changes",
    [{"transformers_version": "9.9"}, {"_name_or_path": "/some/where"}, {"dtype": "bfloat16"}, {"torch_dtype": "x"}],
)
def test_what_depends_on_the_place_or_the_library_does_not_show(files: list[Path], changes: dict[str, Any]) -> None:
    expected = fingerprint_files(files, CONFIG)
    assert fingerprint_files(files, CONFIG | changes) == expected
    reordered = dict(reversed([*(CONFIG | changes).items()]))
    assert fingerprint_files(files, reordered) == expected


def fail(*args: Any) -> None:
    raise AssertionError("the weights were read again")


def test_the_second_time_nothing_is_read(files: list[Path], cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = fingerprint_files(files, CONFIG)
    assert len(list((cache / "fingerprints").iterdir())) == 1
    monkeypatch.setattr(fingerprint, "_tensors", fail)
    assert fingerprint_files(files, CONFIG) == expected
    with pytest.raises(AssertionError, match="read again"):
        fingerprint_files(files, CONFIG | {"hidden_size": 5})
    forget(cache)
    with pytest.raises(AssertionError, match="read again"):
        fingerprint_files(files, CONFIG)


def flip_a_bit(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-3, os.SEEK_END)
        byte = file.read(1)
        file.seek(-3, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))


def test_a_file_changed_in_place_is_read_again(files: list[Path]) -> None:
    before, status = fingerprint_files(files, CONFIG), files[0].stat()
    flip_a_bit(files[0])
    os.utime(files[0], ns=(status.st_atime_ns, status.st_mtime_ns))  # as `cp --preserve` and `rsync --inplace` do
    same = ("st_size", "st_ino", "st_mtime_ns")
    assert [getattr(files[0].stat(), name) for name in same] == [getattr(status, name) for name in same]
    assert fingerprint_files(files, CONFIG) != before


def test_what_changes_while_it_is_read_is_not_remembered(
    files: list[Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = fingerprint._tensors

    def changing(paths: list[Path]) -> Any:
        yield from read(paths)
        flip_a_bit(files[0])

    monkeypatch.setattr(fingerprint, "_tensors", changing)
    fingerprint_files(files, CONFIG)
    assert not (cache / "fingerprints").exists()


@pytest.mark.parametrize("final", [CONFIG, CONFIG | {"dtype": "float16"}, CONFIG | {"hidden_size": 5}])
def test_a_fingerprint_made_while_loading_is_that_of_what_was_loaded(
    files: list[Path], cache: Path, final: dict[str, Any]
) -> None:
    with fingerprinting(files, CONFIG) as fingerprint_of:
        found = fingerprint_of(final)
    forget(cache)
    assert found == fingerprint_files(files, final)


def test_loading_that_fails_does_not_wait_for_the_fingerprint(
    files: list[Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, failed = fingerprint._tensors, threading.Event()

    def waiting(paths: list[Path]) -> Any:
        assert failed.wait(60)
        yield from read(paths)

    def loading() -> None:
        with fingerprinting(files, CONFIG):
            threading.Timer(0.05, failed.set).start()
            raise RuntimeError("damaged")

    monkeypatch.setattr(fingerprint, "_tensors", waiting)
    with pytest.raises(RuntimeError, match="damaged"):
        loading()
    assert not (cache / "fingerprints").exists()


def test_a_file_put_in_its_place_is_read_again(files: list[Path], tmp_path: Path) -> None:
    """Size and time may be the same: a copy keeps them."""
    before, status = fingerprint_files(files, CONFIG), files[0].stat()
    other = tmp_path / "other"
    shutil.copy2(files[0], other)
    flip_a_bit(other)
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    os.replace(other, files[0])
    assert fingerprint_files(files, CONFIG) != before


def test_a_link_that_points_elsewhere_is_read_again(files: list[Path], tmp_path: Path) -> None:
    """As the snapshots of the hub are: links to files named by their content."""
    link, other = tmp_path / "link.safetensors", tmp_path / "other"
    link.symlink_to(files[0])
    before = fingerprint_files([link], CONFIG)
    shutil.copy2(files[0], other)
    flip_a_bit(other)
    link.unlink()
    link.symlink_to(other)
    assert fingerprint_files([link], CONFIG) != before


def test_a_cache_that_cannot_be_written_costs_time_only(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = fingerprint_files(files, CONFIG)
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("PRUNELENS_CACHE", str(tmp_path / "file" / "cache"))
    assert fingerprint_files(files, CONFIG) == expected
    assert fingerprint_files(files, CONFIG) == expected
    monkeypatch.setenv("PRUNELENS_CACHE", str(tmp_path / "full"))
    monkeypatch.setattr("tempfile.mkstemp", full)
    assert fingerprint_files(files, CONFIG) == expected
    assert not list((tmp_path / "full" / "fingerprints").iterdir())


def full(*args: Any, **kwargs: Any) -> None:
    raise OSError(28, "No space left on device")


def test_what_is_remembered_appears_whole(files: list[Path], cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "replace", full)
    expected = fingerprint_files(files, CONFIG)
    assert not list((cache / "fingerprints").iterdir())
    monkeypatch.undo()
    monkeypatch.setenv("PRUNELENS_CACHE", str(cache))
    assert fingerprint_files(files, CONFIG) == expected
    assert [path.read_text(encoding="utf-8") for path in (cache / "fingerprints").iterdir()] == [expected]


# --- in memory ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_model_in_memory(dtype: torch.dtype) -> None:
    network = tiny_network("llama", dtype)
    before = fingerprint_model(network)
    assert fingerprint_model(tiny_network("llama", dtype)) == before
    weight = network.model.layers[3].mlp.down_proj.weight.data.view(torch.uint8).view(-1)
    weight[5] ^= 1
    assert fingerprint_model(network) != before
    weight[5] ^= 1
    assert fingerprint_model(network) == before
    network.config.rms_norm_eps *= 2
    assert fingerprint_model(network) != before


def test_the_dtype_of_a_model_in_memory_shows() -> None:
    assert fingerprint_model(tiny_network("llama")) != fingerprint_model(tiny_network("llama", torch.bfloat16))


def test_strides_do_not_show() -> None:
    network = tiny_network("llama")
    before = fingerprint_model(network)
    weight = network.model.layers[0].mlp.up_proj.weight
    weight.data = weight.data.T.contiguous().T
    assert not weight.is_contiguous()
    assert fingerprint_model(network) == before


def test_fingerprints_hold_no_order_of_numpy(files: list[Path]) -> None:
    """The bytes of a tensor are those of the file: an independent hash over the same convention agrees."""
    digest = hashlib.sha256(json.dumps(CONFIG, sort_keys=True).encode())
    for name, tensor in sorted(load_file(files[0]).items()):
        digest.update(f"\0{name}\0F32\0{tuple(tensor.shape)}\0".encode())
        digest.update(np.ascontiguousarray(tensor.numpy()).tobytes())
    assert fingerprint_files(files, CONFIG) == digest.hexdigest()
