"""Bytes of files, local or on storage that fsspec reads; what fails for a while is tried again."""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import os
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import fsspec

from jaxblip.errors import UserError

_PAUSES_S = (0.1, 1.0, 5.0)  # before the second, third and fourth try
_LASTING = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
_LASTING_NUMBERS = (errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL, errno.ENXIO, errno.EFBIG)
_KEPT_FILES = 32  # that stay open in each process, of those that are read in parts
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
      OSError: it cannot be opened, is no regular file (a pipe would be waited for without end), or
        the package for such URLs is not installed.
    """
    path = path.removeprefix("file://")
    with _errors_of_storage():
        if not is_url(path):
            return open(path, "rb", opener=_open_regular)
        return io.BufferedReader(fsspec.open(path, "rb").open())


@contextlib.contextmanager
def _errors_of_storage() -> Iterator[None]:
    """Whatever is raised becomes an OSError."""
    try:
        yield
    except OSError:
        raise
    except (ImportError, ValueError) as error:  # of the protocol or the path, which will not pass
        raise FileNotFoundError(str(error)) from error
    except Exception as error:  # clients of storage have errors of their own
        raise OSError(f"{type(error).__name__}: {error}") from error


def _open_regular(path: str, flags: int) -> int:
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    kind = os.fstat(descriptor).st_mode
    if stat.S_ISREG(kind) or stat.S_ISDIR(kind):  # `open` refuses folders itself
        return descriptor
    os.close(descriptor)
    raise FileNotFoundError(errno.ENXIO, "it is a pipe, a device or the like", path)


def unreadable(path: str, error: OSError) -> UserError:
    """What to raise where a file that the user named cannot be read."""
    return UserError(f"cannot read {shown(path)} ({phrase(error)}): check the path.")


def read_bytes(path: str, start: int = 0, length: int = -1, most: int = 0) -> bytes:
    """`length` bytes from `start` on, of a file; all by default.

    Threads and workers share no position. A local file of which a part is read stays open for the
    next part, as long as its path still leads to it.

    Args:
      most: of a local file that is read to its end; a longer one is an OSError (EFBIG). 0 for no
        limit.

    Raises:
      OSError: it cannot be read, not for some seconds either.
    """
    local = path.removeprefix("file://")
    if is_url(local):
        return retry(lambda: _read_url(path, start, length))
    if length < 0:
        return retry(lambda: _read_whole(local, start, most))
    return retry(lambda: _read_part(local, start, length))


def _read_url(path: str, start: int, length: int) -> bytes:
    with open_file(path) as file, _errors_of_storage():
        file.seek(start)
        return file.read(length)


def _read_whole(path: str, start: int, most: int) -> bytes:
    file = _LocalFile(path)
    if most and file.size > most:
        message = f"it has {file.size >> 20} MiB, more than {most >> 20}"
        raise OSError(errno.EFBIG, message, path)
    return file.read(start, file.size - start)


def _read_part(path: str, start: int, length: int) -> bytes:
    try:
        file = _kept_file(path)
        if not file.is_still(path):
            _kept_file.cache_clear()
            file = _kept_file(path)
        return file.read(start, length)
    except OSError:
        _kept_file.cache_clear()  # the next try opens it anew
        raise


class _LocalFile:
    """A regular file that is open for reading at any position; a fork of the process may go on.

    It is closed when nothing refers to it: not while another thread still reads.

    Raises:
      OSError: as `open_file` does.
    """

    def __init__(self, path: str):
        try:
            self._descriptor = _open_regular(path, os.O_RDONLY | os.O_CLOEXEC)
        except ValueError as error:  # of the path
            raise FileNotFoundError(str(error)) from error
        status = os.fstat(self._descriptor)
        self.size, self._identity = status.st_size, (status.st_dev, status.st_ino)

    def __del__(self):
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def is_still(self, path: str) -> bool:
        """Whether `path` leads to this file, not to another one that has taken its place."""
        status = os.stat(path)
        return (status.st_dev, status.st_ino) == self._identity

    def read(self, start: int, length: int) -> bytes:
        """Fewer bytes where the file ends before."""
        parts = []
        while length > 0 and (part := os.pread(self._descriptor, length, start)):
            parts.append(part)
            start, length = start + len(part), length - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


_kept_file = functools.lru_cache(maxsize=_KEPT_FILES)(_LocalFile)


def retry(read: Callable[[], T]) -> T:
    """What `read` returns, tried again after errors of storage that may pass."""
    for pause in _PAUSES_S:
        try:
            return read()
        except OSError as error:
            if isinstance(error, _LASTING) or error.errno in _LASTING_NUMBERS:
                raise
            time.sleep(pause)
    return read()


def shown(text: str) -> str:
    """A path or the like for messages: what would break or turn the line is escaped."""
    return text if text.isprintable() else repr(text)[1:-1]


def phrase(error: Exception) -> str:
    """What an error says, in a line of a few hundred characters at most."""
    said = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return shown(" ".join(said.split())[:300].rstrip("."))


def files(spec: str | os.PathLike) -> Sequence[str]:
    """The absolute paths that a path or a glob names, sorted.

    Raises:
      UserError: there is no such file.
    """
    spec = absolute(spec)
    if not any(character in spec for character in "*?[") or os.path.exists(spec):
        return [spec]
    try:
        filesystem, path = fsspec.core.url_to_fs(spec)
        found = sorted(filesystem.glob(path))
    except (ImportError, ValueError, OSError) as error:
        message = f"cannot list {shown(spec)} ({phrase(error)}): check the path."
        raise UserError(message) from error
    if not found:
        message = f"no file is called {shown(spec)}: check the path, or quote it for the shell."
        raise UserError(message)
    return [filesystem.unstrip_protocol(name) if is_url(spec) else name for name in found]
