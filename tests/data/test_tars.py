from __future__ import annotations

import io
import random
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from scenarioclip_fast.data.tars import read_members

BLOCK, RECORD = 512, 10_240
FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)


def archive(names: Iterable[str], size: int = 700, format: int = tarfile.GNU_FORMAT) -> bytes:
    """A tar padded to a record. The data of each member are the last letter of its name, `size` times."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as tar:
        for name in names:
            add(tar, name, name[-1].encode() * size)
    return file.getvalue()


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def body(data: bytes) -> bytes:
    """A tar without its end marker."""
    return data[: -(-len(data.rstrip(b"\0")) // BLOCK) * BLOCK]


def sealed(header: bytearray) -> bytes:
    """A header with its checksum."""
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def changed(data: bytes, at: int, new: bytes) -> bytes:
    """The tar with `new` in the header at 0, at position `at` of that header."""
    header = bytearray(data[:BLOCK])
    header[at : at + len(new)] = new
    return sealed(header) + data[BLOCK:]


def read(path: Path, data: bytes) -> tuple[list[tuple[str, bytes]], list[str]]:
    """The members and the damage."""
    path.write_bytes(data)
    damage: list[str] = []
    found = []
    with path.open("rb") as file:
        for member in read_members(file, damage.append):
            found.append((member.name, data[member.offset_data : member.offset_data + member.size]))
            file.seek(0)  # callers may move the position
    return found, damage


A, AB, CD = archive("a"), archive("ab"), archive("cd")
MEMBER = 3 * BLOCK  # a header and 700 bytes
END = b"\0" * (2 * BLOCK)

SOUND: dict[str, tuple[str, bytes]] = {
    "one archive": ("ab", AB),
    "end marker of one block": ("ab", body(AB) + b"\0" * BLOCK),
    "end marker of less than a block": ("ab", body(AB) + b"\0" * 100),
    "padded further": ("ab", AB + b"\0" * 100_000),
    "no members": ("", b"\0" * RECORD),
    "concatenated": ("abcd", AB + CD),
    "concatenated, padded further": ("abcdab", AB + b"\0" * RECORD + CD + b"\0" * (3 * RECORD) + AB),
    "concatenated without records": ("abcd", body(AB) + END + body(CD) + END),
    "concatenated after one block": ("abcd", body(AB) + b"\0" * BLOCK + CD),
    "concatenated without end marker": ("abcd", body(AB) + CD),
    "after an archive without members": ("ab", b"\0" * RECORD + AB),
}


@pytest.mark.parametrize("case", SOUND)
def test_sound_tars(tmp_path: Path, case: str) -> None:
    names, data = SOUND[case]
    assert read(tmp_path / "a.tar", data) == ([(name, name.encode() * 700) for name in names], [])


DAMAGED: dict[str, tuple[str, str, bytes]] = {
    "empty": ("", "byte 0: the file ends without an end marker", b""),
    "text": ("", "byte 0: invalid header", b"hello" * 200),
    "short text": ("", "byte 0: truncated header", b"hello"),
    "no end marker": ("ab", f"byte {2 * MEMBER}: the file ends without an end marker", body(AB)),
    "ends in padding": ("ab", f"byte {2 * MEMBER}: unexpected end of data", body(AB)[:-1]),
    "ends in data": ("a", f"byte {MEMBER}: b extends past the end of the file, at byte 2747", body(AB)[:-325]),
    "ends after a header": (
        "a",
        f"byte {MEMBER}: b extends past the end of the file, at byte 2048",
        AB[: MEMBER + BLOCK],
    ),
    "ends in a header": ("a", f"byte {MEMBER}: no header", AB[: MEMBER + 100]),
    "garbage after the end": ("ab", f"byte {RECORD}: no header", AB + b"rubbish"),
    "garbage after many zeros": ("ab", f"byte {11 * RECORD}: no header", AB + b"\0" * (10 * RECORD + 500) + b"rubbish"),
    "wrong checksum": ("a", f"byte {MEMBER}: no header", AB[:MEMBER] + b"B" + AB[MEMBER + 1 :]),
    "wrong checksum in the first header": ("", "byte 0: bad checksum", b"B" + AB[1:]),
    "zeroed header": ("a", f"byte {MEMBER + BLOCK}: no header", AB[:MEMBER] + b"\0" * BLOCK + AB[MEMBER + BLOCK :]),
    "zeroed first header": ("", f"byte {BLOCK}: no header", b"\0" * BLOCK + AB[BLOCK:]),
    "zeroed member": (
        "acd",
        f"byte {MEMBER}: 1536 zero bytes, where members may be missing",
        A[:MEMBER] + b"\0" * MEMBER + CD,
    ),
    "zero-filled": (
        "ab",
        f"byte {2 * MEMBER}: 1000000 zero bytes, where members may be missing",
        body(AB) + b"\0" * 1_000_000,
    ),
    "concatenated after a cut": ("a", f"byte {MEMBER}: no header", AB[: MEMBER + 100] + CD),
    "attributes without a member": (
        "ab",
        f"byte {2 * MEMBER}: end of file header",
        body(AB) + archive("é", format=tarfile.PAX_FORMAT)[: 2 * BLOCK] + END,
    ),
    "negative size": ("", "byte 0: a: negative size in the header", changed(A, 124, b"\xff" * 11 + b"\0")),
    "size of terabytes": (
        "",
        f"byte 0: a extends past the end of the file, at byte {RECORD}",
        changed(A, 124, b"\x80" + b"\0" * 5 + b"\1" * 6),
    ),
    "sparse map past the end": (
        "",
        "byte 0: malformed header (index out of range)",
        sealed(bytearray(changed(A, 156, b"S")[:482] + b"\1" + A[483:BLOCK])),
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_tars(tmp_path: Path, case: str) -> None:
    names, detail, data = DAMAGED[case]
    found, (damage,) = read(tmp_path / "a.tar", data)
    assert found == [(name, name.encode() * 700) for name in names]
    assert damage == detail


LONG = "directory/" * 30 + "name"


def v7(data: bytes) -> bytes:
    return sealed(bytearray(data[:257].ljust(BLOCK, b"\0"))) + data[BLOCK:]


def size_in_attributes(data: bytes) -> bytes:
    """A pax header gives the size, and the member's own header none."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        member = tarfile.TarInfo("a")
        member.pax_headers = {"size": "700"}
        tar.addfile(member)
    return body(file.getvalue()) + data[BLOCK:]


HEADERS: dict[str, Callable[[bytes], bytes]] = {
    "v7": v7,
    "base-256 size": lambda data: changed(data, 124, b"\x80" + (700).to_bytes(11, "big")),
    "size in attributes": size_in_attributes,
}


@pytest.mark.parametrize("kind", HEADERS)
def test_kinds_of_headers(tmp_path: Path, kind: str) -> None:
    data = HEADERS[kind](A[:MEMBER]) + CD
    assert read(tmp_path / "a.tar", data) == ([(name, name.encode() * 700) for name in "acd"], [])


@pytest.mark.parametrize("format", FORMATS)
def test_long_names_and_global_attributes(tmp_path: Path, format: int) -> None:
    name = LONG if format != tarfile.USTAR_FORMAT else LONG[-200:]
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format, pax_headers={"uname": "x"}) as tar:
        add(tar, name, b"1" * 600)
        add(tar, "é", b"2" * 600)
    found, damage = read(tmp_path / "a.tar", file.getvalue() + A)
    assert not damage and found == [(name, b"1" * 600), ("é", b"2" * 600), ("a", b"a" * 700)]


def test_contradictory_sizes(tmp_path: Path) -> None:
    """tarfile applies a size in global attributes without skipping the data of that size."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"size": "2000"}) as tar:
        add(tar, "a", b"a" * 700)
        add(tar, "b", b"b" * 700)
    found, (damage,) = read(tmp_path / "a.tar", file.getvalue())
    assert found == [] and damage == "byte 0: a: its headers have two different sizes"


@pytest.mark.parametrize("format", FORMATS)
def test_no_member_is_lost_silently(tmp_path: Path, format: int) -> None:
    """Cut or overwritten anywhere but in the members' data, a tar has all its members, or its damage is reported."""
    prefix = {tarfile.USTAR_FORMAT: "", tarfile.GNU_FORMAT: LONG, tarfile.PAX_FORMAT: "é"}[format]
    good = archive([prefix + c for c in "abcdefgh"], format=format)
    whole, none = read(tmp_path / "a.tar", good)
    assert len(whole) == 8 and not none
    blocks = range(len(body(good)) // BLOCK)
    headers = [b for b in blocks if all(good[b * BLOCK :][:40] != data[:40] for _, data in whole)]
    assert len(headers) == (8 if format == tarfile.USTAR_FORMAT else 24)
    rng = random.Random(0)
    for _ in range(300):
        block = rng.choice(headers)
        kind = rng.randrange(4)
        at = block * BLOCK + rng.randrange(BLOCK)
        bad = bytearray(good)
        if kind == 0:
            del bad[rng.randrange(1, len(body(good))) :]
        elif kind == 1:
            bad[block * BLOCK : (block + 1) * BLOCK] = bytes(BLOCK)
        elif kind == 2:
            bad[at] = rng.randrange(256)
        else:
            bad[block * BLOCK : (block + 1) * BLOCK] = rng.randbytes(BLOCK)
        found, damage = read(tmp_path / "a.tar", bytes(bad))
        assert damage or len(found) == 8, (kind, at)


def test_padding_is_read_in_large_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Headers are read without the data between them, and padding without parsing every block of it."""
    path = tmp_path / "a.tar"
    path.write_bytes(archive("ab", 50_000_000) + b"\0" * 20_000_000)
    reads: list[int] = []

    class Counted(io.BufferedReader):
        def read(self, size: int | None = -1, /) -> bytes:
            reads.append(len(data := super().read(size)))
            return data

    with Counted(io.FileIO(path)) as file:
        damage: list[str] = []
        assert [member.name for member in read_members(file, damage.append)] == ["a", "b"] and len(damage) == 1
    assert len(reads) < 400 and sum(reads) < 21_000_000
