"""views.bin: how many object and relation views each scene has, a byte a scene, in the order of the index.

Larger numbers are stored as 255. By these numbers, scenes are distributed over the ranks of a run (see `shares`).
Packs of earlier versions have no such file.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

from scenarioclip_fast.errors import UserError
from scenarioclip_fast.files import Mapped

NAME = "views.bin"
_MOST = 255


def count_views(objects: int, relations: int) -> int:
    """What the file says of a scene."""
    return min(objects + relations, _MOST)


def parse_views(data: Mapped, scenes: int, sha256: str, where: str) -> npt.NDArray[np.uint8]:  # [scenes]
    """Return the numbers of all scenes.

    Raises:
        UserError: the file is damaged.
    """
    if len(data) != scenes or hashlib.sha256(data).hexdigest() != sha256:
        got = f"got {len(data)} bytes, expected {scenes}" if len(data) != scenes else "the checksum differs"
        raise UserError(f"{where}: damaged ({got}); copy the data set again, or train with data.balance=false")
    return np.frombuffer(data, np.uint8)
