"""One job at a time on an output, on a disk or in a store, however the last job ended."""

import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pyarrow.fs
import pytest
from fsspec.implementations.arrow import ArrowFSWrapper

from flashvl.data.ledger import lock
from flashvl.data.ledger.lock import held
from flashvl.data.storage import Location, locate
from flashvl.errors import ConfigError

FASTER = (
    "import flashvl.data.ledger.lock as lock;lock.RENEW_S, lock.EXPIRES_S, lock.SETTLE_S = {times};"
)
HOLD = """
import sys, time
from tests.data.ledger.test_lock import PLACES
with lock.held(PLACES[sys.argv[1]](sys.argv[2])):
    print("held", flush=True)
    time.sleep(600)
"""
TIMES = (0.2, 2.0, 0.5)
PLACES: dict[str, Callable[[str], Location]] = {
    "disk": locate,
    # As in an object store, there are only whole files.
    "store": lambda path: Location(ArrowFSWrapper(pyarrow.fs.LocalFileSystem()), path),
}


@pytest.fixture(autouse=True)
def faster(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(("RENEW_S", "EXPIRES_S", "SETTLE_S"), TIMES, strict=True):
        monkeypatch.setattr(lock, name, value)


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> str:
    return request.param


def holder(place: str, folder: Path) -> subprocess.Popen[str]:
    """A process that holds the lock of the folder."""
    code = FASTER.format(times=TIMES) + HOLD
    line = [sys.executable, "-c", code, place, str(folder)]
    root = Path(__file__).parents[3]
    process = subprocess.Popen(line, cwd=root, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


@pytest.mark.long
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_another_process_is_kept_out_until_it_is_killed(
    place: str, end: signal.Signals, tmp_path: Path
) -> None:
    folder = PLACES[place](str(tmp_path / "out"))
    process = holder(place, tmp_path / "out")
    with pytest.raises(ConfigError, match="another job is running on output"), held(folder):
        pass
    process.send_signal(end)
    process.wait(timeout=10)
    with held(folder):
        pass


def test_of_many_at_once_one_has_it(place: str, tmp_path: Path) -> None:
    folder = PLACES[place](str(tmp_path / "out"))
    begin, all_came = threading.Barrier(8), threading.Barrier(8)
    ends = []

    def come() -> None:
        begin.wait()
        try:
            with held(folder):
                ends.append("held")
                all_came.wait(timeout=30)
        except ConfigError:
            ends.append("refused")
            all_came.wait(timeout=30)

    threads = [threading.Thread(target=come) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(ends) == ["held"] + 7 * ["refused"]


@pytest.mark.long
def test_a_holder_that_was_away_for_too_long_is_stopped(tmp_path: Path) -> None:
    process = holder("store", tmp_path / "out")
    process.send_signal(signal.SIGSTOP)  # as a machine that hangs, or a network that is down
    with held(PLACES["store"](str(tmp_path / "out"))):
        process.send_signal(signal.SIGCONT)
        assert process.wait(timeout=10) == -signal.SIGTERM
        assert (tmp_path / "out" / lock.LOCK).exists()
    assert not (tmp_path / "out" / lock.LOCK).exists()
