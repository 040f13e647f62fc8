"""The machine code of the CUTLASS kernels of contrastive_loss, on which their speed depends; no GPU is needed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

KERNELS = ("sums", "gradients")
LOGITS = 128  # of each thread in an epilogue

Code = dict[str, tuple[str, str]]

_INSTRUCTION = re.compile(
    r"^\s+/\*(?P<address>[0-9a-f]{4,6})\*/\s+(?P<predicate>@!?U?P[0-9T]+\s+)?(?P<name>[A-Z][A-Z0-9_.a-z]*)(?P<rest>[^;]*);",
    re.M,
)


@dataclass(frozen=True)
class Instruction:
    address: int
    conditional: bool
    name: str  # with modifiers
    operands: str

    @property
    def operation(self) -> str:
        return self.name.partition(".")[0]

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        found = re.search(r"0x([0-9a-f]+)\s*$", self.operands)
        return int(found[1], 16) if self.operation in ("BRA", "BSSY") and found else None


@dataclass
class Block:
    instructions: list[Instruction]
    successors: list[int] = field(default_factory=list)  # numbers of blocks

    def count(self, *operations: str) -> int:
        return sum(i.operation in operations for i in self.instructions)


def blocks_of(text: str) -> list[Block]:
    """The basic blocks of a kernel, as cuobjdump prints it, in the order of their addresses."""
    instructions = [
        Instruction(int(m["address"], 16), bool(m["predicate"]), m["name"], m["rest"].strip())
        for m in _INSTRUCTION.finditer(text)
    ]
    starts = {i.target for i in instructions}
    blocks: list[Block] = []
    numbers: dict[int, int] = {}
    ends = True
    for instruction in instructions:
        if ends or instruction.address in starts:
            numbers[instruction.address] = len(blocks)
            blocks.append(Block([]))
        blocks[-1].instructions.append(instruction)
        ends = instruction.operation in ("BRA", "EXIT", "RET", "BRX", "BSYNC")
    for number, block in enumerate(blocks):
        last = block.instructions[-1]
        if last.operation == "BRA" and last.target is not None:
            block.successors.append(numbers[last.target])
        # The condition of a branch may also be an operand.
        conditional = last.conditional or re.match(r"!?U?P\d", last.operands) or ".DIV" in last.name
        if (last.operation not in ("EXIT", "RET", "BRA") or conditional) and number + 1 < len(blocks):
            block.successors.append(number + 1)
    return blocks


def main_path(blocks: list[Block]) -> list[Instruction]:
    """The longest way of a consumer through its epilogue, without rarely executed blocks.

    It begins after the wait for the other warp group's epilogue and ends where that group is told to go on. Rare are
    the search for positives, and the gradients of tiles that take two exponentials; both are long and straight.
    """
    exponentials = [n for n, block in enumerate(blocks) if block.count("MUFU") > LOGITS // 2]
    main = min(exponentials, key=lambda n: len(blocks[n].instructions))
    rare = {n for n, block in enumerate(blocks) if n != main and block.count("MUFU", "ISETP", "FSEL") > LOGITS // 2}
    products = [n for n, block in enumerate(blocks) if block.count("HGMMA") and n < main]
    best: dict[int, list[int]] = {products[-1] + 1: []}
    done = []
    for number in range(products[-1] + 1, len(blocks)):
        if number not in best or number in rare:
            continue
        path = [*best[number], number]
        if main in path and any(i.name.startswith("SYNCS.ARRIVE") for i in blocks[number].instructions):
            done = path
            break
        for following in blocks[number].successors:
            if following > number and _length(blocks, path) >= _length(blocks, best.get(following, [])):
                best[following] = path
    assert main in done
    instructions = [i for number in done for i in blocks[number].instructions]
    begin = next(n for n, i in enumerate(instructions) if i.name.startswith("SYNCS.PHASECHK"))
    end = max(n for n, i in enumerate(instructions) if i.name.startswith("SYNCS.ARRIVE"))
    return instructions[begin + 1 : end]


def _length(blocks: list[Block], path: list[int]) -> int:
    return sum(len(blocks[number].instructions) for number in path)


def all_instructions(blocks: list[Block]) -> Iterator[Instruction]:
    return (i for block in blocks for i in block.instructions)


@pytest.mark.parametrize("kernel", KERNELS)
def test_products_are_not_serialised(hopper_code: Code, kernel: str) -> None:
    log, text = hopper_code[kernel]
    assert "C7510" not in log and "serialized" not in log, log
    blocks = blocks_of(text)
    counts = Counter(i.operation for i in all_instructions(blocks))
    assert counts["CALL"] == 0
    # A step multiplies 128 x 64 by 64 x 128 with instructions of 64 x 128 x 16, all in one batch, waited for once.
    batches = [block for block in blocks if block.count("HGMMA")]
    assert [block.count("HGMMA") for block in batches] == [8, 8]  # the first step of a tile, and the others
    for block in batches:
        names = [i.name for i in block.instructions]
        first = names.index(next(name for name in names if name.startswith("HGMMA")))
        last = len(names) - 1 - names[::-1].index(next(name for name in reversed(names) if name.startswith("HGMMA")))
        assert not any(name.startswith(("WARPGROUP.DEPBAR", "BRA")) for name in names[first:last])


@pytest.mark.parametrize("kernel", KERNELS)
def test_loads_are_multicast(hopper_code: Code, kernel: str) -> None:
    """Each operand is read from L2 by one block of a cluster for two."""
    names = [i.name for i in all_instructions(blocks_of(hopper_code[kernel][1])) if i.name.startswith("UTMALDG")]
    assert len(names) == 2 and all(name.endswith("MULTICAST") for name in names), names


@pytest.mark.parametrize("kernel", KERNELS)
def test_resources(hopper_code: Code, kernel: str) -> None:
    log, text = hopper_code[kernel]
    # The registers of a launch of 384 threads; a consumer gets more at run time.
    assert re.search(r"Used 168 registers", log), log
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in log, log
    counts = Counter(i.operation for i in all_instructions(blocks_of(text)))
    assert counts["LDL"] == counts["STL"] == 0


@pytest.mark.parametrize("kernel", KERNELS)
def test_instructions_per_logit(hopper_code: Code, kernel: str) -> None:
    path = main_path(blocks_of(hopper_code[kernel][1]))
    counts = Counter(i.operation for i in path)
    assert counts["MUFU"] == LOGITS  # one exponential a logit
    assert len(path) <= 7 * LOGITS, counts
    if kernel == "gradients":
        assert counts["STSM"] == LOGITS // 8 and counts["UTMASTG"] == 2  # 16 bytes of each lane; half a tile
