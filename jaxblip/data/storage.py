"""Bytes of files, local or on storage that fsspec reads; what fails for a while is tried again."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import fsspec

from jaxblip.errors import UserError

_PAUSES_S = (0.1, 1.0, 5.0)  # before the second, third and fourth try
_LASTING = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
T = TypeVar("T")


def is_url(path: str) -> bool:
    return "://" in path


def join(folder: str, path: str) -> str:
    """`path`, where it is relative, in `folder`."""
    return path if is_url(path) else os.path.join(folder, path)


def absolute(path: str | os.PathLike) -> str:
    path = os.fspath(path)
    return path if is_url(path) else os.path.abspath(path)


def open_file(path: str):
    """A file to read bytes from, seekable.

    Raises:
      OSError: it cannot be opened, or the package for such URLs is not installed.
    """
    if not is_url(path):
        return open(path, "rb")
    try:
        return fsspec.open(path, "rb").open()
    except (ImportError, ValueError) as error:  # of the protocol, which will not pass
        raise FileNotFoundError(str(error)) from error


def unreadable(path: str, error: OSError) -> UserError:
    """What to raise where a file that the user named cannot be read."""
    return UserError(f"cannot read {path} ({error.strerror or error}): check the path.")


def read_bytes(path: str, start: int = 0, length: int = -1) -> bytes:
    """`length` bytes from `start` on, of a file; all by default.

    Opened anew each time, so that threads and workers share no position.

    Raises:
      OSError: it cannot be read, not for some seconds either.
      ValueError: the path can be none.
    """

    def read() -> bytes:
        with open_file(path) as file:
            file.seek(start)
            return file.read(length)

    return retry(read)


def retry(read: Callable[[], T]) -> T:
    """What `read` returns, tried again after errors of storage that may pass."""
    for pause in _PAUSES_S:
        try:
            return read()
        except _LASTING:
            raise
        except OSError:
            time.sleep(pause)
    return read()


def files(spec: str | os.PathLike) -> Sequence[str]:
    """The absolute paths that a path or a glob names, sorted.

    Raises:
      UserError: there is no such file.
    """
    spec = absolute(spec)
    if not any(character in spec for character in "*?["):
        return [spec]
    try:
        filesystem, path = fsspec.core.url_to_fs(spec)
        found = sorted(filesystem.glob(path))
    except (ImportError, ValueError, OSError) as error:
        raise UserError(f"cannot list {spec} ({error}): check the path.") from error
    if not found:
        raise UserError(f"no file is called {spec}: check the path, or quote it for the shell.")
    return [filesystem.unstrip_protocol(name) if is_url(spec) else name for name in found]
