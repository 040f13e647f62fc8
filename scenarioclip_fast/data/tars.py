"""Read the headers of untrusted, uncompressed tars, and report damage that may have lost members.

v7, ustar, GNU and pax headers are read, with long names, base-256 sizes, and sizes in attributes. Reading goes on after
an end marker, as with `tar --ignore-zeros`, so that concatenated tars are read as a whole.

| the file | members read | reported |
|---|---|---|
| ends with zeros, or is all zeros, up to 256 KiB | all | |
| tars one after the other (`cat a.tar b.tar`), each padded with 1 or 2 blocks of zeros or to 10,240 bytes | all | |
| zeros of another length before a header: perhaps padding, perhaps members that became zeros | all others | yes |
| more than 256 KiB of zeros anywhere, as in an incomplete download | all others | yes |
| no end marker, as in an incomplete copy; also an empty file | all | yes |
| ends in the padding after a member's data | all | yes |
| ends in a member's data, or the size in a header exceeds the file | those before that member | yes |
| ends in a header | those before | yes |
| no header: a wrong checksum, data after a zeroed header, anything else after an end marker | those before | yes |
| a header with a negative size, or two sizes that differ | those before | yes |
| a name or attributes of more than 1 MiB, or attributes without a member | those before | yes |

1 or 2 blocks of zeros have no room for an image, let alone for an image and its record. After damage no other header is
searched for: the data of a member may look like one. Members that became zeros up to a multiple of 10,240 bytes, at
most 256 KiB, look like padding and cannot be detected.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable, Iterator
from typing import Any

_MAX_HEADER = 1 << 20  # bytes of all headers of one member: its name and attributes
_MAX_PADDING = 1 << 18  # GNU tar pads to 10 KiB by default, and for tapes to 256 KiB
_READ = 1 << 16  # bytes of padding per read
_SPECIAL = {
    tarfile.SYMTYPE: "symbolic link",
    tarfile.LNKTYPE: "hard link",
    tarfile.FIFOTYPE: "pipe",
    tarfile.CHRTYPE: "device",
    tarfile.BLKTYPE: "device",
}


def read_members(file: io.BufferedReader, on_damage: Callable[[str], None]) -> Iterator[tarfile.TarInfo]:
    """Yield the members of a tar in order. The position of `file` may be changed between them.

    The data of a regular file that is yielded lie within `file`, at `offset_data`.

    Args:
        on_damage: called with a description, including the byte offset, of everything that may have lost members.
    """
    size = file.seek(0, os.SEEK_END)
    begin = offset = 0
    try:
        while offset < size:  # one archive after another
            zeros, offset = offset, _skip_zeros(file, offset)
            padding = offset - zeros
            usual = padding <= 2 * tarfile.BLOCKSIZE or (offset - begin) % tarfile.RECORDSIZE == 0 or offset == size
            if padding > _MAX_PADDING or not usual:
                on_damage(f"byte {zeros}: {padding} zero bytes, where members may be missing")
            if offset == size:
                return
            begin = file.seek(offset)
            headers = _HeaderFile(file)
            tar: Any = tarfile.TarFile(fileobj=headers)  # type: ignore[arg-type]
            while (member := tar.next()) is not None:
                # tarfile trusts the sizes in headers, and would loop forever on a negative one.
                if member.size < 0 or tar.offset <= offset:
                    raise tarfile.ReadError(f"{member.name}: negative size in the header")
                end = member.offset_data + member.size
                if member.isreg() and not member.issparse() and end > tar.offset:
                    raise tarfile.ReadError(f"{member.name}: its headers have two different sizes")
                if tar.offset > size and end > size:
                    raise tarfile.ReadError(f"{member.name} extends past the end of the file, at byte {size}")
                offset = tar.offset
                yield member
                tar.members.clear()  # tarfile would keep every member in memory
                headers.left = _MAX_HEADER
            if offset == begin:
                raise tarfile.ReadError("no header")
    except (tarfile.TarError, LookupError, RecursionError, ValueError) as error:
        on_damage(f"byte {offset}: {error if isinstance(error, tarfile.TarError) else f'malformed header ({error})'}")
    else:
        on_damage(f"byte {size}: the file ends without an end marker")


def special_kind(member: tarfile.TarInfo) -> str | None:
    """What a member is, such as "symbolic link"; None for a regular file or a directory."""
    if (member.isreg() and not member.issparse()) or member.isdir():
        return None
    return "sparse file" if member.isreg() else _SPECIAL.get(member.type, "special file")


def _skip_zeros(file: io.BufferedReader, offset: int) -> int:
    """The offset of the first block from `offset` on that is not all zeros, or the end of the file."""
    file.seek(offset)
    while data := file.read(_READ):
        if rest := data.lstrip(b"\0"):
            return offset + (len(data) - len(rest)) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
        offset += len(data)
    return offset


class _HeaderFile:
    """A file that limits what is read of it, since tarfile trusts the sizes in headers."""

    def __init__(self, file: io.BufferedReader) -> None:
        self._file, self.seek, self.tell = file, file.seek, file.tell
        self.left = _MAX_HEADER  # bytes of the current header

    def read(self, size: int) -> bytes:
        if not 0 <= size <= self.left:
            raise tarfile.ReadError(f"got a header of {size} bytes, expected at most {_MAX_HEADER}")
        self.left -= size
        return self._file.read(size)
