"""One process at a time in a folder: the holder is named, and a dead one holds nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from cnnrnn.machine.lock import HOLDER_FILE, InUseError, alone_in

HOLD = """
import os, sys, time
from pathlib import Path
from cnnrnn.machine.lock import alone_in
with alone_in(Path(sys.argv[1]), "a test"):
    if len(sys.argv) > 2 and os.fork() == 0:  # a worker, that lives on for a while
        time.sleep(float(sys.argv[2]))
        os._exit(0)
    print("held", flush=True)
    time.sleep(60)
"""


def held(folder: Path, *words: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), *words], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_the_second_process_is_told_who_is_there(tmp_path: Path) -> None:
    process = held(tmp_path)
    with (
        pytest.raises(InUseError, match=rf"in use by a test, process {process.pid} on .*, since 2"),
        alone_in(tmp_path, "another"),
    ):
        pass
    process.send_signal(signal.SIGINT)
    process.wait()
    with alone_in(tmp_path, "another"):
        pass


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL and fork")
def test_a_killed_process_holds_nothing(tmp_path: Path) -> None:
    process = held(tmp_path, "1.5")
    process.kill()
    process.wait()
    assert (tmp_path / HOLDER_FILE).exists()
    began = time.perf_counter()
    with alone_in(tmp_path, "the next"):
        assert time.perf_counter() - began < 5  # its worker has ended, or never held it
    assert not (tmp_path / HOLDER_FILE).exists()


def test_threads_of_one_process(tmp_path: Path) -> None:
    told: list[str] = []

    def come() -> None:
        try:
            with alone_in(tmp_path, "the second"):
                told.append("in")
        except InUseError as error:
            told.append(str(error))

    with alone_in(tmp_path, "the first"):
        thread = threading.Thread(target=come)
        thread.start()
        thread.join()
    assert len(told) == 1 and f"in use by the first, process {os.getpid()}" in told[0]


def test_broken_words_of_a_holder(tmp_path: Path) -> None:
    for text in (b"", b"\xff\xfe", b"[1]", b'{"process": 1e400}', b'{"process": -1}'):
        (tmp_path / HOLDER_FILE).write_bytes(text)
        with alone_in(tmp_path, "a test"):
            pass
