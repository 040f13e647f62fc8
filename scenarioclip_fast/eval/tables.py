"""Format results as aligned text for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from scenarioclip_fast.terminal import printable

TASKS: dict[str, str] = {"global": "action", "object": "object", "relation": "relation"}  # level -> task


def text_table(head: Sequence[str], body: Sequence[Sequence[str]], names: int) -> str:
    """Format aligned columns: the first `names` are left-aligned text, the others right-aligned numbers."""
    head, *body = ([printable(cell) for cell in line] for line in (head, *body))
    widths = [max(len(line[column]) for line in (head, *body)) for column in range(len(head))]

    def text(line: Sequence[str]) -> str:
        cells = [
            cell.ljust(width) if column < names else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return "\n".join([text(head), "  ".join("-" * width for width in widths), *map(text, body)])


def percent(fraction: float) -> str:
    """Format a fraction in [0, 1] as "12.3 %"."""
    return f"{100 * fraction:.1f} %"
