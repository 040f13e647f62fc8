"""Reads machine code as cuobjdump prints it: instructions, basic blocks, and the cheapest path through some of them."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

_INSTRUCTION = re.compile(
    r"^\s+/\*(?P<address>[0-9a-f]{4,6})\*/\s+(?P<predicate>@!?U?P[0-9T]+\s+)?(?P<name>[A-Z][A-Z0-9_.a-z]*)(?P<rest>[^;]*);",
    re.M,
)


@dataclass(frozen=True)
class Instruction:
    address: int
    conditional: bool
    name: str  # with its modifiers
    operands: str

    @property
    def operation(self) -> str:
        return self.name.partition(".")[0]

    @property
    def target(self) -> int | None:
        """The address that a branch goes to."""
        found = re.search(r"0x([0-9a-f]+)\s*$", self.operands)
        return int(found[1], 16) if self.operation in ("BRA", "BSSY", "CALL") and found else None


@dataclass
class Block:
    instructions: list[Instruction]
    successors: list[int] = field(default_factory=list)  # positions of blocks

    def count(self, *operations: str) -> int:
        return sum(i.operation in operations for i in self.instructions)


class Kernel:
    """The basic blocks of one kernel, in the order of their addresses."""

    def __init__(self, text: str) -> None:
        self.instructions = [
            Instruction(int(m["address"], 16), bool(m["predicate"]), m["name"], m["rest"].strip())
            for m in _INSTRUCTION.finditer(text)
        ]
        starts = {self.instructions[0].address}
        for this, following in zip(self.instructions, self.instructions[1:], strict=False):
            if this.operation in ("BRA", "EXIT", "RET", "BRX", "BSYNC"):
                starts.add(following.address)
            if this.operation == "BRA" and this.target is not None:
                starts.add(this.target)
            if this.operation == "BSSY" and this.target is not None:
                starts.add(this.target)
        self.blocks: list[Block] = []
        at: dict[int, int] = {}
        for instruction in self.instructions:
            if instruction.address in starts:
                at[instruction.address] = len(self.blocks)
                self.blocks.append(Block([]))
            self.blocks[-1].instructions.append(instruction)
        for position, block in enumerate(self.blocks):
            last = block.instructions[-1]
            if last.operation == "BRA" and last.target is not None:
                block.successors.append(at[last.target])
            # A predicate may also be an operand: BRA.U !UP0, or BRA P0.
            plain = not last.conditional and not re.match(r"!?U?P\d", last.operands) and ".DIV" not in last.name
            ends = last.operation in ("EXIT", "RET") or last.operation == "BRA"
            if not (ends and plain) and position + 1 < len(self.blocks):
                block.successors.append(position + 1)

    def count(self, *operations: str) -> int:
        return sum(block.count(*operations) for block in self.blocks)

    def named(self, prefix: str) -> list[Instruction]:
        return [i for i in self.instructions if i.name.startswith(prefix)]

    def longest(self, start: int, goal: int, rare: set[int]) -> list[int]:
        """The blocks with the most instructions from `start` to `goal`, excluding `rare`, without going backwards."""
        best: dict[int, tuple[int, list[int]]] = {start: (0, [])}
        for position in range(start, goal):
            if position not in best or position in rare:
                continue
            cost, path = best[position]
            item = (cost + len(self.blocks[position].instructions), [*path, position])
            for following in self.blocks[position].successors:
                if following > position:
                    best[following] = max(item, best.get(following, (-1, [])), key=lambda x: x[0])
        assert goal in best, f"no path from block {start} to {goal}"
        return best[goal][1]

    def operations(self, path: list[int]) -> Counter[str]:
        return Counter(i.operation for position in path for i in self.blocks[position].instructions)
