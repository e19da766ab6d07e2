"""Folders and names of every kind, what is no file, and what goes away: no hang, no silence."""

import base64
import io
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time

import pytest

from hostile import PNG, bad_sample, encoded, inspected, opened
from jaxblip.data import storage
from jaxblip.data.samples import BadSample
from jaxblip.errors import UserError

LINE = '{"image": "1.png", "caption": "a"}'


def captions(source):
    return [source[index]["captions"] for index in range(len(source))]


@pytest.fixture
def folder(tmp_path):
    """One good image with its text."""
    made = tmp_path / "pictures"
    made.mkdir()
    (made / "good.png").write_bytes(PNG)
    (made / "good.txt").write_text("good")
    return made


def test_endings_in_any_case(folder):
    for name, text in ("a.JPG", "a.TXT"), ("b.JpEg", "b.Txt"), ("c.PNG", "c.txt"):
        (folder / name).write_bytes(PNG)
        (folder / text).write_text(name)
    source = opened(folder)
    assert captions(source) == [["a.JPG"], ["b.JpEg"], ["c.PNG"], ["good"]] and not source.problems
    assert source._rows.place(0) == f"{folder}/a.JPG"


def test_pipes_are_never_waited_for(folder, capsys):
    for name in ("pipe.jpg", "other.txt"):
        os.mkfifo(folder / name)
    (folder / "pipe.txt").write_text("a pipe")
    (folder / "other.jpg").write_bytes(PNG)
    source = opened(folder)
    assert len(source) == 3
    assert "other.txt: it is a pipe, a device or" in bad_sample(source, 1, "unreadable row")
    assert "pipe.jpg: it is a pipe" in bad_sample(source, 2, "missing image")
    printed = inspected(folder, capsys)[1]
    assert "unreadable row: 1, such as example 1" in printed and "missing image: 1" in printed


@pytest.mark.parametrize(
    "name", ["pipe.jsonl", "pipe.csv", "pipe.parquet", "pipe.tar", "pipe.json"]
)
def test_a_pipe_as_a_source(name, tmp_path, capsys):
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=r"cannot read .*pipe\.\w+ \(it is a pipe, a device or the"):
        opened(tmp_path / name)
    assert inspected(tmp_path / name, capsys)[0] == 2
    (tmp_path / "data.jsonl").write_text(
        json.dumps({"image": str(tmp_path / name), "caption": "a"})
        + json.dumps({"image": "/dev/zero", "caption": "a"}).join("\n\n")
        + json.dumps({"image": f"file://{tmp_path / name}", "caption": "a"})
    )
    source = opened(tmp_path / "data.jsonl")
    for index in range(3):
        assert "it is a pipe, a device or the like" in bad_sample(source, index, "missing image")


def test_a_folder_that_is_called_like_an_image(folder):
    (folder / "x.jpg").mkdir()
    (folder / "x.txt").write_text("a folder")
    (folder / "x.jpg" / "in.png").write_bytes(PNG)
    (folder / "x.jpg" / "in.txt").write_text("inside")
    source = opened(folder)
    assert captions(source) == [["good"], ["inside"]]
    assert source.problems == [f"texts without an image, left out of {folder}: 1, such as x.txt"]
    (folder / "data.jsonl").write_text('{"image": "x.jpg", "caption": "a"}')
    detail = bad_sample(opened(folder / "data.jsonl"), 0, "missing image")
    assert "'x.jpg' in" in detail and "Is a directory" in detail


def test_links_that_lead_in_circles(folder, capsys):
    (folder / "in").mkdir()
    (folder / "in" / "back").symlink_to(folder)
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "loop.txt").write_text("round and round")
    (folder / "gone.png").symlink_to(folder / "nowhere")
    (folder / "gone.txt").write_text("nowhere")
    source = opened(folder)
    assert source.problems == [f"links to folders, left out of {folder}: 1, such as in/back"]
    assert "No such file" in bad_sample(source, 0, "missing image")
    assert source[1]["captions"] == ["good"]
    assert "symbolic links" in bad_sample(source, 2, "missing image")
    assert source.problems[0] in inspected(folder, capsys)[1]
    (folder / "round.jsonl").symlink_to(folder / "round.jsonl")
    with pytest.raises(UserError, match=r"cannot read .*round\.jsonl \(Too many levels"):
        opened(folder / "round.jsonl")
    link = folder.parent / "link"
    link.symlink_to(folder)  # the folder that is named may be one
    assert len(opened(link)) == 3


NAMES = [
    "new\nline", "tab\there", "'quotes\"", "$(echo) `x`", "\u202eltr", "猫 и кот", "%s{0}", "-dash",
    "\udcff\udcfe", "x" * 251, "é" * 125,
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name[:12]))
def test_names_of_every_kind(name, folder, capsys):
    for kind, ending, data in ("good", ".png", PNG), ("bad", ".jpg", b"no image"):
        made = folder / kind
        made.mkdir()
        (made / (name + ending)).write_bytes(data)
        (made / (name + ".txt")).write_text(kind)
    source = opened(folder)
    assert captions(source) == [["good"], ["bad"], ["good"]]
    assert source.place(1).isprintable() and source.place(1).startswith(f"{folder}/bad/")
    status, printed = inspected(folder, capsys)
    assert status == 0 and all(line.isprintable() for line in printed.splitlines())
    assert f"corrupt image: 1, such as example 1 ({source.place(1)}" in printed
    path = folder / (name[:100] + ".jsonl")
    path.write_text("{")
    with pytest.raises(UserError) as caught:
        opened(path)
    assert str(caught.value).isprintable() and ".jsonl:1: no JSON" in str(caught.value)


def test_paths_that_can_be_none(tmp_path):
    (tmp_path / "1.png").write_bytes(PNG)
    paths = ["x" * 300, "x/" * 3000, "\0", "\ud800", ".", "1.png/2.png", "nope://1.png", " "]
    lines = [json.dumps({"image": path, "caption": "a"}) for path in paths]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    source = opened(tmp_path / "data.jsonl")
    for index in range(len(paths)):
        bad_sample(source, index, "missing image")  # at once
    for spec in ("x" * 300 + ".jsonl", "\0.jsonl", "\0*.csv", "\ud800.csv", "nope://1.tar"):
        with pytest.raises(UserError) as caught:
            opened(spec)
        assert str(caught.value).isprintable()


UNREADABLE = """
import codecs, os, sys
from jaxblip.data.samples import BadSample
from jaxblip.data.sources import open_source
from jaxblip.errors import UserError
codecs.lookup("utf-8-sig")  # loaded while Python's own files can be read
if os.geteuid() == 0:  # who may read everything
    os.setgid(65534)
    os.setuid(65534)
source = open_source(sys.argv[1], image_size_px=8)
print(source.problems)
try:
    source[0]
except BadSample as bad:
    print(bad.reason, bad.detail)
print(source[1]["captions"])
try:
    open_source(sys.argv[1] + "/closed.jsonl", image_size_px=8)
except UserError as error:
    print(error)
"""


def test_what_may_not_be_read():
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        for name in ("closed.png", "open.png"):
            with open(f"{folder}/{name}", "wb") as file:
                file.write(PNG)
        for name in ("closed.txt", "open.txt", "closed.jsonl"):
            with open(f"{folder}/{name}", "w") as file:
                file.write(name)
        os.mkdir(f"{folder}/closed")
        for name, mode in (
            ("", 0o755), ("closed", 0), ("closed.png", 0), ("closed.jsonl", 0),
            ("open.png", 0o644), ("open.txt", 0o644), ("closed.txt", 0o644),
        ):  # fmt: skip
            os.chmod(f"{folder}/{name}", mode)
        ran = subprocess.run(
            [sys.executable, "-c", UNREADABLE, folder], capture_output=True, text=True
        )
        os.chmod(f"{folder}/closed", 0o755)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines() == [
        f"['folders that cannot be read, left out of {folder}: 1, such as {folder}/closed "
        "(Permission denied)']",
        f"missing image {folder}/closed.png: Permission denied",
        "['open.txt']",
        f"cannot read {folder}/closed.jsonl (Permission denied); give the path of a JSONL file "
        'with lines like {"image": "pictures/1.jpg", "caption": "a cat on a mat"}',
    ]


def test_a_glob_that_names_a_folder_too(tmp_path, capsys):
    (tmp_path / "1.png").write_bytes(PNG)
    (tmp_path / "a.jsonl").write_text(LINE)
    (tmp_path / "b.jsonl").mkdir()
    with pytest.raises(UserError, match=r"cannot read .*b\.jsonl \(Is a directory\)"):
        opened(tmp_path / "*.jsonl")
    assert inspected(tmp_path / "*.jsonl", capsys)[0] == 2


def test_a_file_whose_name_could_be_a_glob(tmp_path):
    (tmp_path / "1.png").write_bytes(PNG)
    (tmp_path / "a[1]?.jsonl").write_text(LINE)
    assert len(opened(tmp_path / "a[1]?.jsonl")) == 1


def test_files_of_no_bytes(folder, capsys):
    for name in ("empty.png", "empty.txt"):
        (folder / name).touch()
    (folder / "void.jpg").touch()
    (folder / "void.txt").write_text("an empty picture")
    source = opened(folder)
    assert captions(source) == [[""], ["good"], ["an empty picture"]]
    printed = inspected(folder, capsys)[1]
    assert f"empty caption: 1, such as example 0 ({folder}/empty.png)" in printed
    assert "zero-size image: 2, such as example 0" in printed


def test_files_that_are_too_large_are_not_read(folder):
    for name in ("huge.png", "huge.txt", "other.png"):
        with open(folder / name, "wb") as file:  # holes, which take no room
            file.truncate(300 << 20 if name != "huge.txt" else 2 << 20)
    (folder / "other.txt").write_text("a huge image")
    source = opened(folder)
    assert "huge.txt: it has 2 MiB, more than 1" in bad_sample(source, 1, "unreadable row")
    assert "other.png: it has 300 MiB, more than 256" in bad_sample(source, 2, "gigantic image")


def test_texts_in_no_encoding_or_with_a_mark(folder):
    (folder / "good.txt").write_bytes(b"\xef\xbb\xbfcaf\xe9\n")
    assert captions(opened(folder)) == [["caf\ufffd"]]


def test_images_and_texts_alone_are_counted(folder):
    (folder / "a.png").write_bytes(PNG)
    (folder / "phone.heic").write_bytes(PNG)
    (folder / "phone.txt").write_text("taken with a phone")
    source = opened(folder)
    assert captions(source) == [["good"]]
    assert source.problems == [
        f"images without a .txt beside them, left out of {folder}: 1, such as a.png",
        f"texts without an image, left out of {folder}: 1, such as phone.txt",
    ]


def test_what_vanishes_when_it_is_open(folder):
    source = opened(folder)
    (folder / "good.png").unlink()
    assert f"{folder}/good.png: No such file" in bad_sample(source, 0, "missing image")
    assert source.without_images()[0]["captions"] == ["good"]
    (folder / "good.txt").unlink()
    assert f"{folder}/good.txt: No such file" in bad_sample(source, 0, "unreadable row")


URLS = {
    "data:image/png;base64,###": "no base64",
    "data:image/png;base64,iVBOR": "no base64",
    "data:image/png;base64,ünicode": "no base64",
    "data:image/png,raw": "without ;base64, behind 'data:image/png,raw'",
    "data:": "without ;base64",
}


@pytest.mark.parametrize("url", URLS)
def test_data_urls_that_are_none(url, tmp_path):
    (tmp_path / "data.jsonl").write_text(json.dumps({"image": url, "caption": "a"}))
    detail = bad_sample(opened(tmp_path / "data.jsonl"), 0, "missing image")
    assert URLS[url] in detail and detail.startswith(f"{tmp_path}/data.jsonl:1: ")


def test_data_urls_over_lines(tmp_path):
    url = "data:image/png;base64," + base64.encodebytes(PNG).decode()
    (tmp_path / "data.jsonl").write_text(json.dumps({"image": url, "caption": "a"}))
    assert opened(tmp_path / "data.jsonl")[0]["image"] == PNG


def test_what_storage_raises_of_its_own_is_an_error_of_reading(monkeypatch, tmp_path):
    """Clients of storage have errors that are no OSError; they end no worker."""

    class Refusing(io.RawIOBase):
        def readable(self):
            return True

        def seekable(self):
            return True

        def seek(self, *place):
            return 0

        def readinto(self, buffer):
            raise LookupError("403 Forbidden")

    class Opens:
        def open(self):
            return Refusing()

    monkeypatch.setattr(storage, "_PAUSES_S", (0, 0))
    monkeypatch.setattr(storage.fsspec, "open", lambda path, mode: Opens())
    (tmp_path / "data.jsonl").write_text('{"image": "http://host/1.jpg", "caption": "a"}')
    source = opened(tmp_path / "data.jsonl")
    assert "LookupError: 403 Forbidden" in bad_sample(source, 0, "missing image")


def test_a_contact_sheet_that_cannot_be_written(folder, capsys):
    assert inspected(folder, capsys, f"--sheet={folder}")[0] == 2
    (folder / "good.png").write_bytes(encoded())
    assert inspected(folder, capsys, f"--sheet={folder}/sheet.png")[0] == 0


def test_what_is_asked_for_soon_is_said_soon(tmp_path):
    """What lasts is not tried again."""
    begin = time.monotonic()
    for path in (tmp_path, tmp_path / "no", f"{tmp_path}/{'x' * 300}", "\0", "nope://x"):
        with pytest.raises(OSError):
            storage.read_bytes(str(path))
    assert time.monotonic() - begin < 1


def test_what_libraries_say_becomes_a_line():
    bad = BadSample("corrupt image", "two\n\tlines \u202eltr" + "x" * 5000)
    assert bad.detail.startswith(r"two lines \u202eltrxx") and len(bad.detail) < 1100
    assert pickle.loads(pickle.dumps(bad)).detail == bad.detail
