"""Tar shards that are damaged, or made to do harm."""

import gzip
import tarfile
import time

import pytest

from hostile import END, PNG, bad_sample, inspected, member, opened
from jaxblip.errors import UserError


def write(path, *members: bytes, end: bytes = END):
    path.write_bytes(b"".join(members) + end)
    return path


def sample(key: str, text: str) -> bytes:
    return member(f"{key}.png", PNG) + member(f"{key}.txt", text.encode())


def captions(source):
    return [source[index]["captions"] for index in range(len(source))]


KINDS = (
    tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE,
    tarfile.DIRTYPE, tarfile.GNUTYPE_SPARSE,
)  # fmt: skip


def test_what_is_no_plain_file_is_left_out_and_counted(tmp_path, capsys):
    odd = [
        member(f"{number}.png", type=kind, linkname="/etc/passwd")
        for number, kind in enumerate(KINDS)
    ]
    path = write(tmp_path / "a.tar", *odd, sample("good", "a"))
    source = opened(path)
    assert captions(source) == [["a"]]
    assert source.problems == [f"links, devices and the like, left out of {path}: 7, such as 0.png"]
    assert source.problems[0] in inspected(path, capsys)[1]


def test_members_of_a_sample_need_not_stand_side_by_side(tmp_path):
    pieces = [sample(key, text) for key, text in (("1", "one"), ("b/2", "two"), ("3", "three"))]
    images, texts = zip(*((piece[:1024], piece[1024:]) for piece in pieces))
    assert len(PNG) < 512
    source = opened(write(tmp_path / "a.tar", *images, *reversed(texts)))
    assert captions(source) == [["one"], ["two"], ["three"]]
    assert all(source[index]["image"] == PNG for index in range(3)) and not source.problems


def test_a_second_image_or_text_of_a_sample_is_left_out_and_counted(tmp_path, capsys):
    path = write(
        tmp_path / "a.tar", sample("1", "first"), sample("1", "second"), member("1.JPG", b"x")
    )
    source = opened(path)
    assert captions(source) == [["first"]] and source[0]["image"] == PNG
    assert source.problems == [
        f"members that are a second image of a sample, left out of {path}: 2, such as 1.png",
        f"members that are a second caption of a sample, left out of {path}: 1, such as 1.txt",
    ]
    assert "second image" in inspected(path, capsys)[1]


def test_the_same_key_in_two_shards_is_two_samples(tmp_path):
    for name in "ab":
        write(tmp_path / f"{name}.tar", sample("1", name))
    assert captions(opened(tmp_path / "{a,b}.tar")) == [["a"], ["b"]]


def test_endings_in_any_case_and_names_with_several_dots(tmp_path):
    path = write(
        tmp_path / "a.tar",
        member("1.JPG", PNG), member("1.Txt", b"a"),
        member("2.JpEg", PNG), member("2.Json", b'{"caption": "b"}'),
        member("v1.2.jpg", PNG), member("._1.jpg", b"of a Mac"), member("1.cls", b"3"),
    )  # fmt: skip
    source = opened(path)
    assert captions(source) == [["a"], ["b"]]
    assert source.problems == [
        f"members with several dots in their names, left out of {path}: 1, such as v1.2.jpg"
    ]


def lengthened(header: bytes, size: int) -> bytes:
    """The header with a size in the form for numbers that octal digits do not hold."""
    size %= 256**12
    made = bytearray(header)
    made[124:136] = size.to_bytes(12, "big") if size >> 95 else b"\x80" + size.to_bytes(11, "big")
    made[148:156] = b" " * 8
    made[148:156] = b"%06o\0 " % sum(made[:512])
    return bytes(made)


FIRST = sample("1", "one")
DAMAGED = {
    "a header": (FIRST + b"\xff" * 512 + sample("2", "two") + END, "what follows is no header"),
    "no end mark": (FIRST, "it has no end mark"),
    "joined files": (FIRST + END + sample("2", "two") + END, "another file follows"),
    "a size below zero": (
        FIRST + lengthened(member("2.png"), -512) + END, "unexpected end of data",
    ),
    "a size beyond the end": (
        FIRST + lengthened(member("2.png"), 2**70) + END, "unexpected end of data",
    ),
    "the same in a file that is not read": (
        FIRST + lengthened(member("2.bin"), 2**40) + END, "unexpected end of data",
    ),
    "a long name of no length": (
        FIRST + lengthened(member("x", type=tarfile.GNUTYPE_LONGNAME), -512) + END,
        "impossible length",
    ),
    "a long name of all memory": (
        FIRST + lengthened(member("x", type=tarfile.GNUTYPE_LONGNAME), 2**45) + END,
        "impossible length",
    ),
    "headers of headers": (FIRST + member("x", b"4 x\n", type=b"x") * 3000 + END, ""),
    "a number without end": (
        FIRST + member("x", b"1" * 30_000, type=tarfile.XHDTYPE) + sample("2", "two") + END,
        "impossible number",
    ),
    "a map of holes without end": (
        FIRST
        + member("x", b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n", type=tarfile.XHDTYPE)
        + member("2.png", b"99999999\n1\n"),
        "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_shard_gives_what_is_whole(case, tmp_path, capsys):
    data, said = DAMAGED[case]
    path = tmp_path / "a.tar"
    path.write_bytes(data)
    begin = time.monotonic()
    source = opened(path)
    assert time.monotonic() - begin < 5
    assert captions(source) == [["one"]]
    [problem] = source.problems
    assert problem.startswith(f"{path} is cut off or damaged behind sample 1: ") and said in problem
    assert problem in inspected(path, capsys)[1]


@pytest.mark.parametrize("make", [lambda data: b"", gzip.compress, lambda data: b"PK\3\4" + data])
def test_a_file_that_is_no_plain_tar(make, tmp_path, capsys):
    path = tmp_path / "a.tar"
    path.write_bytes(make(FIRST * 100 + END))
    with pytest.raises(UserError, match=r"a\.tar is no plain tar file: .*; unpack it"):
        opened(path)
    assert inspected(path, capsys)[0] == 2


def test_the_json_of_a_sample(tmp_path, capsys):
    entries = [
        b"{", b"[" * 100_000, b"[1]", b'{"caption": "a", "caption": "b"}', b'{"caption": 1}',
        b'"' + b" " * (1 << 20) + b'"', b'{"caption": "\xff"}', b"",
    ]  # fmt: skip
    shards = [member(f"{n}.png", PNG) + member(f"{n}.json", each) for n, each in enumerate(entries)]
    path = write(tmp_path / "a.tar", *shards, sample("good", "a"))
    source = opened(path)  # though the first samples are bad
    assert source[8]["captions"] == ["a"]
    reasons = [
        "Expecting property name", "nested too deeply", "no object", "stands twice",
        '"caption" is 1', "its json has 1 MiB", "not UTF-8", "Expecting value",
    ]  # fmt: skip
    for index, reason in enumerate(reasons):
        detail = bad_sample(source, index, "bad row")
        assert reason in detail and f"a.tar, sample {index}" in detail
    assert "bad row: 8, such as example 0" in inspected(path, capsys)[1]
    path = write(tmp_path / "b.tar", *shards)
    with pytest.raises(UserError, match=r"b\.tar, sample 0: its \.json"):
        opened(path)


def test_a_shard_that_changes_or_vanishes_when_it_is_open(tmp_path):
    path = write(tmp_path / "a.tar", FIRST, sample("2", "two"))
    source = opened(path)
    path.write_bytes(path.read_bytes()[:3000])
    assert source[0]["captions"] == ["one"]
    assert "sample 2" in bad_sample(source, 1, "truncated shard")
    path.unlink()
    assert "No such file" in bad_sample(source, 0, "unreadable row")


def test_an_image_of_impossible_length_is_not_read(tmp_path):
    path = tmp_path / "a.tar"
    size = (1 << 28) + 512
    with path.open("wb") as file:  # with a hole in it
        file.write(lengthened(member("1.png"), size))
        file.seek(size, 1)
        file.write(member("1.txt", b"a") + sample("2", "b") + END)
    source = opened(path)
    assert "256 MiB" in bad_sample(source, 0, "gigantic image")
    assert source[1]["captions"] == ["b"]


def test_captions_of_no_encoding(tmp_path):
    """A text in another encoding is still a text, as nothing says which."""
    path = write(
        tmp_path / "a.tar", member("1.png", PNG), member("1.txt", "caf\xe9".encode("latin-1"))
    )
    assert captions(opened(path)) == [["caf\ufffd"]]
