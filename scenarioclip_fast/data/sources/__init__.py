"""Data set formats that `pack` reads: one file per format, and a registry of their names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from scenarioclip_fast.lazy import attach

if TYPE_CHECKING:
    from scenarioclip_fast.data.sources.base import (
        TRAINVAL,
        Reader,
        Scan,
        Source,
        SourceFormat,
        SourceOptions,
        SplitOf,
        by_split,
        fingerprint_files,
    )
    from scenarioclip_fast.data.sources.registry import format_names, open_source, register
else:
    __getattr__, __dir__ = attach(
        __name__,
        {
            "base": [
                "TRAINVAL",
                "Reader",
                "Scan",
                "Source",
                "SourceFormat",
                "SourceOptions",
                "SplitOf",
                "by_split",
                "fingerprint_files",
            ],
            "registry": ["format_names", "open_source", "register"],
        },
    )

__all__ = [
    "TRAINVAL",
    "Reader",
    "Scan",
    "Source",
    "SourceFormat",
    "SourceOptions",
    "SplitOf",
    "by_split",
    "fingerprint_files",
    "format_names",
    "open_source",
    "register",
]
