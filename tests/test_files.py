"""A folder is written whole or not at all, and what is not ours is left alone."""

import errno
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prunelens import files as folders
from prunelens.errors import PrunelensError
from prunelens.files import check_target, new_folder, probe_target, recover

MARK = "ours.txt"


def is_ours(folder: Path) -> bool:
    return (folder / MARK).is_file()


def fill(folder: Path, text: str) -> None:
    (folder / MARK).write_text(text)
    (folder / "part").mkdir()
    (folder / "part" / "data").write_text(text * 2)


def store(target: Path, text: str = "first") -> Path:
    with new_folder(target, is_ours, "thing") as temporary:
        fill(temporary, text)
    return target


def probe(target: Path) -> None:
    probe_target(target, is_ours, "thing")


def check(target: Path) -> None:
    check_target(target, is_ours, "thing")


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes() for path in folder.rglob("*")}


class StoppedError(Exception):
    """Any fault in the middle of writing."""


def test_the_folder_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "run"
    with new_folder(target, is_ours, "thing") as temporary:
        assert temporary.is_dir()
        assert temporary.parent == target.parent
        assert not target.exists()
        (temporary / MARK).write_text("{}")
    assert [path.name for path in target.parent.iterdir()] == ["run"]
    assert (target / MARK).read_text() == "{}"
    assert target.stat().st_mode & 0o777 == 0o755


def store_until(target: Path, fault: BaseException) -> None:
    with new_folder(target, is_ours, "thing") as temporary:
        fill(temporary, "second")
        raise fault


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("fault", [StoppedError("bug"), KeyboardInterrupt(), OSError(errno.ENOSPC, "no space")])
def test_a_fault_while_writing_leaves_everything_as_it_was(tmp_path: Path, earlier: bool, fault: BaseException) -> None:
    target = tmp_path / "a" / "run"
    if earlier:
        store(target)
    before = tree(tmp_path)
    expected = PrunelensError if isinstance(fault, OSError) else type(fault)
    with pytest.raises(expected):
        store_until(target, fault)
    assert tree(tmp_path) == before


def failing(nth: int, fault: BaseException, lasting: bool = False) -> Callable[..., None]:
    """os.rename that fails on its nth call, or on every call from then on."""
    rename, calls = os.rename, 0

    def sometimes(source: Any, target: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == nth or (lasting and calls > nth):
            raise fault
        rename(source, target)

    return sometimes


@pytest.mark.parametrize(
    ("nth", "fault"),
    [
        (1, OSError(errno.EACCES, "no rights")),
        (2, OSError(errno.ENOSPC, "no space")),
        (1, KeyboardInterrupt()),
        pytest.param(2, KeyboardInterrupt()),
    ],
)
def test_an_earlier_folder_survives_a_swap_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth: int, fault: BaseException
) -> None:
    target = store(tmp_path / "run")
    before = tree(tmp_path)
    monkeypatch.setattr(folders, "_exchanged", lambda one, other: False)
    monkeypatch.setattr(os, "rename", failing(nth, fault))
    with pytest.raises((PrunelensError, KeyboardInterrupt)), new_folder(target, is_ours, "thing") as temporary:
        fill(temporary, "second")
    assert tree(tmp_path) == before


def test_an_earlier_folder_is_never_deleted_before_the_new_one_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When it cannot even be put back, it must at least be found beside its place."""
    target = store(tmp_path / "run")
    earlier = (target / MARK).read_bytes(), (target / "part" / "data").read_bytes()
    monkeypatch.setattr(folders, "_exchanged", lambda one, other: False)
    monkeypatch.setattr(os, "rename", failing(2, OSError(errno.EIO, "disk gone"), lasting=True))
    with pytest.raises(PrunelensError), new_folder(target, is_ours, "thing") as temporary:
        fill(temporary, "second")
    kept = [path.parent for path in tmp_path.rglob(MARK)]
    assert earlier in [((path / MARK).read_bytes(), (path / "part" / "data").read_bytes()) for path in kept]


# --- where it may go ----------------------------------------------------------------------------------------


def holds_a_file(path: Path) -> None:
    path.mkdir()
    (path / "thesis.txt").touch()


def holds_a_hidden_file(path: Path) -> None:
    path.mkdir()
    (path / ".git").touch()


@pytest.mark.parametrize(
    "make",
    [
        holds_a_file,
        holds_a_hidden_file,
        lambda path: path.write_text("a file"),
        lambda path: path.symlink_to("nowhere"),
        lambda path: path.symlink_to("/"),
    ],
)
@pytest.mark.parametrize("look", [check, probe, store])
def test_what_is_not_ours_is_left_alone(tmp_path: Path, make: Callable[[Path], Any], look: Callable[..., Any]) -> None:
    target = tmp_path / "run"
    make(target)
    before = {path: path.lstat().st_mtime_ns for path in (tmp_path, target)}
    with pytest.raises(PrunelensError, match=r"new folder or an earlier thing .*run, which is neither; name another"):
        look(target)
    assert {path: path.lstat().st_mtime_ns for path in (tmp_path, target)} == before
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("name", ["run", "a/b/run", "with space/ä"])
def test_a_probe_leaves_no_trace(tmp_path: Path, name: str) -> None:
    probe(tmp_path / name)
    assert list(tmp_path.iterdir()) == []
    store(tmp_path / name)
    before = tree(tmp_path)
    probe(tmp_path / name)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("look", [probe, store])
@pytest.mark.parametrize("name", ["file/run", "file/a/run", "n" * 300])
def test_a_place_that_cannot_be_is_refused(tmp_path: Path, look: Callable[..., Any], name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PrunelensError, match=r"cannot be written to .*choose a folder"):
        look(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("look", [probe, store])
def test_a_folder_without_rights_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, look: Callable[..., Any]
) -> None:
    def denied(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("tempfile.mkdtemp", denied)
    with pytest.raises(PrunelensError, match=r"Permission denied.*choose a folder"):
        look(tmp_path / "a" / "b" / "run")
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_cannot_be_looked_into_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(self: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    (tmp_path / "run").mkdir()
    monkeypatch.setattr(Path, "iterdir", denied)
    with pytest.raises(PrunelensError, match="Permission denied"):
        probe(tmp_path / "run")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("I/O error: No space left on device (os error 28)"), "No space left on device"),
        (Exception("File too large (os error 27)"), "File too large"),
        (RuntimeError("cannot write: No space left on device"), "No space left on device"),
    ],
)
def test_a_fault_of_the_disk_in_other_words_is_told_too(tmp_path: Path, error: Exception, said: str) -> None:
    with pytest.raises(PrunelensError, match=rf"thing cannot be written to .*\({said}\); free space"):
        store_until(tmp_path / "run", error)
    assert list(tmp_path.iterdir()) == []


def test_what_the_body_says_itself_is_not_reworded(tmp_path: Path) -> None:
    with pytest.raises(PrunelensError, match=r"^of my own \(os error 28\)$"):
        store_until(tmp_path / "run", PrunelensError("of my own (os error 28)"))


# --- killed, or not alone -----------------------------------------------------------------------------------


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


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_kill_at_any_moment_loses_neither_result_for_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchanges: bool
) -> None:
    if not exchanges:
        monkeypatch.setattr(folders, "_exchanged", lambda one, other: False)
    gone = 0
    for event in range(1, 100):
        place = tmp_path / str(event)
        target = store(place / "run")
        if not killed_at(event, place, lambda target=target: store(target, "second")):
            break
        gone += not target.exists()
        recover(target)
        assert (target / MARK).read_text() * 2 == (target / "part" / "data").read_text()
        assert (target / MARK).read_text() in ("first", "second")
        store(target, "third")
        assert [path.name for path in place.iterdir()] == ["run"]
        assert (target / MARK).read_text() == "third"
    assert event > 15
    assert (gone > 0) == (not exchanges)


def test_leftovers_of_other_machines_and_living_writers_stay(tmp_path: Path) -> None:
    foreign = tmp_path / ".run.00000000.abcdefgh"
    foreign.mkdir()
    with new_folder(tmp_path / "run", is_ours, "thing") as living:
        fill(living, "living")
        child = os.fork()
        if child == 0:
            try:
                probe(tmp_path / "run")
                os._exit(1)
            except PrunelensError as error:
                os._exit(0 if f"process {os.getppid()} on" in str(error) else 2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert (living / MARK).is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == [foreign.name, "run"]


@pytest.mark.parametrize("name", ["n" * 255, "ä" * 127, "n" * 246])
def test_a_name_as_long_as_a_name_may_be_works(tmp_path: Path, name: str) -> None:
    probe(tmp_path / name)
    store(tmp_path / name)
    store(tmp_path / name, "second")
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name / MARK).read_text() == "second"
