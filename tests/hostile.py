"""Files that somebody made wrong, by accident or on purpose."""

import io
import pickle
import tarfile
import time

import pytest
from PIL import Image

from jaxblip.cli import main
from jaxblip.data.samples import SKIP_REASONS, BadSample
from jaxblip.data.sources import open_source


def encoded(image=None, kind="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    (image or Image.new("RGB", (8, 6), (200, 30, 30))).save(buffer, kind, **options)
    return buffer.getvalue()


PNG = encoded()


def opened(spec, **options):
    """A source as a worker gets it."""
    return pickle.loads(pickle.dumps(open_source(str(spec), image_size_px=8, **options)))


def bad_sample(source, index, reason: str) -> str:
    """The detail of the error that an example raises, soon."""
    begin = time.monotonic()
    with pytest.raises(BadSample) as caught:
        source[index]
    assert time.monotonic() - begin < 5
    assert caught.value.reason == reason and reason in SKIP_REASONS
    return caught.value.detail


def inspected(spec, capsys, *options: str) -> tuple[int, str]:
    """The exit status of `jaxblip data inspect` and what it prints, never a traceback."""
    capsys.readouterr()
    status = main(["data", "inspect", str(spec), *options])
    printed = capsys.readouterr()
    assert printed.err.count("\n") == (status != 0)  # one sentence
    assert printed.err.startswith("jaxblip: error: ") == (status != 0)
    assert "Traceback" not in printed.out
    return status, printed.err or printed.out


def member(name: str, content: bytes = b"", **fields) -> bytes:
    """A file in a tar, with odd values in its header where they are given."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.GNU_FORMAT) + content + b"\0" * (-len(content) % tarfile.BLOCKSIZE)


END = b"\0" * 1024  # of a tar
