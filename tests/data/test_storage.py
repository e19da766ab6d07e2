"""Files that are read in parts stay open: a few, and as long as the path leads there."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from jaxblip.data import storage


@pytest.fixture(autouse=True)
def nothing_is_open():
    storage._kept_file.cache_clear()


def open_in(folder) -> list[str]:
    """The files of a folder that this process has open."""
    links = (f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd"))
    targets = [os.readlink(link) for link in links if os.path.lexists(link)]
    return [target for target in targets if target.startswith(str(folder))]


def write(path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_parts_are_read_from_a_file_that_stays_open(tmp_path):
    path = write(tmp_path / "a", "0123456789")
    assert storage.read_bytes(path, 2, 3) == b"234"
    assert storage.read_bytes(path, 8, 5) == b"89"
    assert storage.read_bytes(f"file://{path}", 0, 1) == b"0"
    assert storage.read_bytes(path, 10, 4) == storage.read_bytes(path, 12, 4) == b""
    assert open_in(tmp_path) == [path]
    assert storage.read_bytes(path) == b"0123456789" and storage.read_bytes(path, 7) == b"789"
    assert open_in(tmp_path) == [path]  # a whole one is closed


def test_few_files_stay_open(tmp_path):
    paths = [write(tmp_path / f"{i}", f"{i:04}") for i in range(3 * storage._KEPT_FILES)]
    for _ in range(2):
        for i, path in enumerate(paths):
            assert storage.read_bytes(path, 0, 4) == b"%04d" % i
            assert len(open_in(tmp_path)) <= storage._KEPT_FILES


def test_no_file_is_closed_while_another_thread_reads_it(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "_PAUSES_S", ())
    paths = [write(tmp_path / f"{i}", f"{i:04}" * 2500) for i in range(2 * storage._KEPT_FILES)]

    def read(number: int) -> bool:
        number = number * 37 % len(paths)
        return storage.read_bytes(paths[number], 400, 9000) == b"%04d" % number * 2250

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(read, range(4000)))


def test_a_path_that_leads_elsewhere_is_opened_anew(tmp_path):
    path = write(tmp_path / "a", "before")
    assert storage.read_bytes(path, 0, 6) == b"before"
    os.replace(write(tmp_path / "b", "behind"), path)
    assert storage.read_bytes(path, 0, 6) == b"behind"
    os.truncate(path, 2)
    assert storage.read_bytes(path, 0, 6) == b"be"
    os.unlink(path)
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(path, 0, 6)
    assert open_in(tmp_path) == []


@pytest.mark.parametrize("part", [(0, -1), (0, 4)])
def test_what_is_no_regular_file_is_refused(tmp_path, part):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", tmp_path):
        with pytest.raises(OSError):
            storage.read_bytes(str(path), *part)
    assert open_in(tmp_path) == []


def test_what_comes_in_pieces_is_put_together(tmp_path, monkeypatch):
    path, pread = write(tmp_path / "a", "0123456789"), os.pread
    monkeypatch.setattr(os, "pread", lambda file, length, start: pread(file, min(length, 4), start))
    assert storage.read_bytes(path) == b"0123456789"
    assert storage.read_bytes(path, 1, 6) == b"123456"


FORKING = """
import os, sys
from jaxblip.data.storage import read_bytes

def reads():
    for start in [3, 0, 7] * 50:
        assert read_bytes(sys.argv[1], start, 3) == b"0123456789"[start : start + 3]

reads()
forks = []
for _ in "ab":
    if not (fork := os.fork()):
        reads()
        os._exit(0)
    forks.append(fork)
reads()
assert all(os.waitpid(fork, 0)[1] == 0 for fork in forks)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_forks_go_on_with_the_files_of_their_parent(tmp_path):
    """In a process of its own: this one has JAX's threads, with which it must not fork."""
    path = write(tmp_path / "a", "0123456789")
    subprocess.run([sys.executable, "-c", FORKING, path], check=True)
