"""Progress where stderr is no terminal: a line once a stage has lasted two seconds, then one now and then."""

import subprocess
import sys
import time

import pytest

from prunelens.report.terminal import progress as shown
from prunelens.report.terminal.progress import ProgressLog


class Clock:
    """Seconds that pass when told to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_what_takes_less_than_two_seconds_says_nothing(clock: Clock) -> None:
    lines: list[str] = []
    log = ProgressLog(lines.append, clock)
    for _ in range(50):
        log.begin("a stage", 10)(10)
        clock.now += 1.9
        log.tick()
    assert lines == []


def test_a_long_stage_says_how_far_it_is_every_fifteen_seconds(clock: Clock) -> None:
    lines: list[str] = []
    log = ProgressLog(lines.append, clock)
    advance = log.begin("writing", 100)
    for _ in range(40):
        clock.now += 1
        advance(2)
        log.tick()
    assert lines == [
        "[   2 s] writing: 4 %, about 48 s left",
        "[  17 s] writing: 34 %, about 33 s left",
        "[  32 s] writing: 64 %, about 18 s left",
    ]


def test_a_stage_of_unknown_length_promises_nothing(clock: Clock) -> None:
    lines: list[str] = []
    log = ProgressLog(lines.append, clock)
    clock.now += 3
    log.tick()
    log.begin("opening \x1b[31mmodel\nX", 1)
    clock.now += 3
    log.tick()
    assert lines == ["[   3 s] starting …", "[   6 s] opening \N{REPLACEMENT CHARACTER}[31mmodel X …"]


def test_the_stage_that_advances_is_the_one_that_is_told(clock: Clock) -> None:
    lines: list[str] = []
    log = ProgressLog(lines.append, clock)
    first = log.begin("first", 4)
    log.begin("second", 4)
    clock.now += 2
    first(9)
    log.tick()
    assert lines == ["[   2 s] first: 100 %, about 0 s left"]


def test_lines_go_to_stderr_while_a_library_says_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shown, "QUIET_SECONDS", 0.02)
    monkeypatch.setattr(shown, "TICK_SECONDS", 0.01)
    told = ""
    with shown.progress() as reporter:
        reporter("opening a model", 1)
        while not told:
            time.sleep(0.02)
            printed = capsys.readouterr()
            assert printed.out == ""
            told = printed.err if "opening a model …" in printed.err else ""
    assert not [thread for thread in sys.modules["threading"].enumerate() if thread.name == "prunelens progress"]


def test_the_first_stage_is_told_at_once_where_it_is_known_to_be_slow(clock: Clock) -> None:
    lines: list[str] = []
    log = ProgressLog(lines.append, clock, first_at_once=True)
    clock.now += 0.4
    log.begin("loading a library", 1)
    assert lines == ["[   0 s] loading a library …"]
    log.tick()
    clock.now += 3
    log.begin("opening a model", 1)
    log.tick()
    assert len(lines) == 1
    clock.now += 2
    log.tick()
    assert lines[1:] == ["[   5 s] opening a model …"]


def test_a_command_says_that_it_loads_libraries_before_it_does() -> None:
    """Asked of a process whose PyTorch cannot be imported: the line is there all the same, and first."""
    code = (
        "import sys\n"
        "class Refusing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch': raise ImportError('torch is loaded')\n"
        "sys.meta_path.insert(0, Refusing())\n"
        "sys.argv = ['prunelens', 'inspect', 'nowhere']\n"
        "from prunelens.cli.main import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.startswith("[   0 s] loading PyTorch and transformers …\n"), done.stderr
    assert done.stderr.rstrip().endswith("torch is loaded")
