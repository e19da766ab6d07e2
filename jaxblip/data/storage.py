"""Bytes of files, local or on storage that fsspec reads; what fails for a while is tried again."""

from __future__ import annotations

import contextlib
import errno
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

    Opened anew each time, so that threads and workers share no position.

    Args:
      most: of a local file; a longer one is an OSError (EFBIG). 0 for no limit.

    Raises:
      OSError: it cannot be read, not for some seconds either.
    """

    def read() -> bytes:
        with open_file(path) as file, _errors_of_storage():
            if most and not is_url(path):
                _check_size(file, path, most)
            file.seek(start)
            return file.read(length)

    return retry(read)


def _check_size(file, path: str, most: int) -> None:
    size = os.fstat(file.fileno()).st_size
    if size > most:
        raise OSError(errno.EFBIG, f"it has {size >> 20} MiB, more than {most >> 20}", path)


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
