"""Find and read the files that annotations name, which may be wrong or hostile."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from scenarioclip_fast.data.check import MAX_IMAGE_BYTES, BadEntry
from scenarioclip_fast.files import open_file
from scenarioclip_fast.terminal import short

ABSOLUTE = 'file names are absolute: write them relative to the data set\'s directory, "images/0001.jpg"'
BACKSLASHES = 'file names have backslashes: write "images/0001.jpg"'


def safe_path(name: object) -> PurePosixPath:
    """Check that an annotation names a file inside the data set's directory.

    Raises:
        BadEntry: not text, absolute, or with a part "..".
    """
    if not isinstance(name, str):
        raise BadEntry("malformed_entry", f"got {short(name)}, expected a file name")
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts or re.search(r"[\\\x00]", name):
        hint = BACKSLASHES if "\\" in name else ABSOLUTE if path.is_absolute() else ""
        raise BadEntry("unsafe_path", f"{short(name)}: expected a path inside the data set's directory", hint)
    return path


class Folders:
    """The folders in which the files of a data set may be; those that do not exist are left out.

    Args:
        roots: directories, in the order in which they are searched.
        subfolders: subfolders of each root, searched before the root itself.
    """

    def __init__(self, roots: Iterable[Path], subfolders: Iterable[str] = ()) -> None:
        self._roots = list(roots)
        places = [root / subfolder for root in self._roots for subfolder in (*subfolders, "")]
        self.paths = [path for path in dict.fromkeys(places) if path.is_dir()]

    def find(self, name: object) -> Path | None:
        """Return the first existing file with this name, or with its last part; None: there is none.

        Raises:
            BadEntry: not the name of a file in a folder, see `safe_path`.
        """
        path = safe_path(name)
        for folder in self.paths:
            for candidate in (path, path.name) if len(path.parts) > 1 else (path,):
                try:
                    if (folder / candidate).exists():
                        return folder / candidate
                except OSError:  # the name is too long
                    continue
                except UnicodeEncodeError as error:
                    raise BadEntry("unsafe_path", f"{short(name)}: {error.reason}") from None
        return None

    def __str__(self) -> str:
        return " or ".join(map(str, self._roots))


def read_file(path: Path, name: str, *, missing: str = "missing_image", too_large: str = "image_too_large") -> bytes:
    """Read a file, which is called `name` in errors.

    Args:
        missing, too_large: the reasons of these errors.

    Raises:
        BadEntry: missing, not a regular file, or too large.
    """
    try:
        with open_file(path) as file:
            if (size := os.fstat(file.fileno()).st_size) > MAX_IMAGE_BYTES:
                raise BadEntry(too_large, f"{name}: got {size} bytes, expected at most {MAX_IMAGE_BYTES}")
            return bytes(file.read())
    except OSError as error:
        raise BadEntry(missing, f"{name}: {error.strerror}") from None
    except UnicodeEncodeError as error:
        raise BadEntry("unsafe_path", f"{name}: {error.reason}") from None
