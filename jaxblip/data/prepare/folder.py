"""The folder that is written to, local or on storage that fsspec writes; no file is ever half."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import json
import os
import tempfile
import uuid
from collections.abc import Iterator
from typing import Any

import fsspec
import numpy as np

from jaxblip.data import storage
from jaxblip.errors import UserError

_TEMPORARY = ".tmp"


@dataclasses.dataclass(frozen=True)
class Folder:
    """Files by their names, written under another name first and then renamed.

    Attributes:
      path: of the folder, absolute or a URL.
    """

    path: str

    def __truediv__(self, name: str) -> Folder:
        return Folder(f"{self.path}/{name}")

    @contextlib.contextmanager
    def new(self, name: str) -> Iterator[str]:
        """A local path to write to; what was written stands under `name` afterwards."""
        files, root = self._open()
        with self._told():
            if storage.is_url(self.path):
                with tempfile.TemporaryDirectory() as local:
                    yield f"{local}/new"
                    files.put_file(f"{local}/new", f"{root}/{name}")
                return
            path = f"{self.path}/{name}.{uuid.uuid4().hex}{_TEMPORARY}"
            try:
                yield path
                os.replace(path, f"{self.path}/{name}")
            finally:
                with contextlib.suppress(OSError):
                    os.remove(path)

    def write(self, name: str, content: bytes) -> None:
        with self.new(name) as path, open(path, "wb") as file:
            file.write(content)

    def read(self, name: str, start: int = 0, length: int = -1) -> bytes:
        return storage.read_bytes(f"{self.path}/{name}", start, length)

    def write_json(self, name: str, content: Any) -> None:
        self.write(name, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())

    def read_json(self, name: str) -> Any:
        return json.loads(self.read(name))

    def write_array(self, name: str, array: np.ndarray) -> None:
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=False)
        self.write(name, buffer.getvalue())

    def read_array(self, name: str) -> np.ndarray:
        return np.load(io.BytesIO(self.read(name)), allow_pickle=False)

    def make(self) -> None:
        files, root = self._open()
        with self._told():
            files.makedirs(root, exist_ok=True)

    def names(self) -> set[str]:
        """Of the files and folders in it, none where it does not exist."""
        files, root = self._open()
        files.invalidate_cache()
        try:
            if files.isfile(root):
                raise UserError(f"{self.path} is a file: name a folder with --to.")
            found = {os.path.basename(path.rstrip("/")) for path in files.ls(root, detail=False)}
        except FileNotFoundError:
            return set()
        except OSError as error:
            raise UserError(f"cannot look into {self.path} ({error.strerror or error}).") from error
        return {name for name in found if name and not name.endswith(_TEMPORARY)}

    def sweep(self) -> None:
        """Removes what killed processes have left half written."""
        if not storage.is_url(self.path) and os.path.isdir(self.path):
            for name in os.listdir(self.path):
                if name.endswith(_TEMPORARY):
                    with self._told():
                        os.remove(f"{self.path}/{name}")

    def remove(self) -> None:
        files, root = self._open()
        with self._told():
            if files.exists(root):
                files.rm(root, recursive=True)

    def _open(self) -> tuple[fsspec.AbstractFileSystem, str]:
        try:
            return fsspec.core.url_to_fs(self.path)
        except (ImportError, ValueError) as error:
            raise UserError(f"cannot write to {self.path}: {error}.") from error

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(unwritable(self.path, error)) from error
        except RuntimeError as error:  # which array_record raises whatever is wrong
            if os.strerror(errno.ENOSPC) not in str(error):
                raise
            raise UserError(unwritable(self.path, OSError(errno.ENOSPC, ""))) from error


def unwritable(path: str, error: OSError) -> str:
    """What to say where a folder cannot be written to."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"no space is left for {path}: make room and run the same command again, what is "
            "finished stays."
        )
    return f"cannot write to {path} ({error.strerror or error}): name another folder with --to."
