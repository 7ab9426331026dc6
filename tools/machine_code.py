"""What is in the machine code of compiled kernels: registers, spills, and how many instructions a tile takes.

The instructions of a tile are those of the shortest path through its code, which is the path of a tile without special
cases (positives, edges): nearly every tile. They are counted, not timed.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);", re.M)
MATRIX = re.compile(r"(?:[HQID]G?MMA|UTC\w*MMA)\b")  # Ampere's, Hopper's and Blackwell's matrix instructions
STORE = re.compile(r"(?:STG|UTMASTG)\b")


class Instruction(NamedTuple):
    """One line of SASS."""

    name: str  # with its suffixes, as STG.E.128
    next: tuple[int, ...]  # the instructions that may follow, as positions in the code
    ends: bool  # the program may end here


def parse(sass: str) -> list[Instruction]:
    """The instructions of the first function in the output of ``cuobjdump -sass``."""
    sass = sass.split("Function :", 2)[1] if "Function :" in sass else sass
    lines = LINE.findall(sass)
    positions = {int(address, 16): i for i, (address, *_) in enumerate(lines)}
    code = []
    for i, (_, guard, name, operands) in enumerate(lines):
        after = (i + 1,) if i + 1 < len(lines) else ()
        base = name.split(".")[0]
        # A guard, or a predicate among the operands, may let the program go on here. PT and UPT are true.
        guarded = guard not in ("", "PT", "UPT") or re.search(r"\bU?P\d|\bUR(\d+|Z),", operands)
        if guard in ("!PT", "!UPT"):
            code.append(Instruction(name, after, False))
        elif base in ("BRA", "JMP"):
            target = re.search(r"0x([0-9a-f]+)\s*$", operands)
            if target is None or int(target[1], 16) not in positions:
                raise ValueError(f"{name} {operands}: expected an address in the code")
            to = (positions[int(target[1], 16)],)
            code.append(Instruction(name, (*to, *after) if guarded else to, False))
        elif base in ("EXIT", "RET", "KILL", "BRX", "JMX"):  # beyond a computed branch nothing is known
            code.append(Instruction(name, after if guarded else (), base == "EXIT"))
        else:  # a call goes on too; the only ones are in special tiles, and are not counted
            code.append(Instruction(name, after, False))
    return code


def _distances(starts: Iterable[int], following: Callable[[int], Iterable[int]]) -> dict[int, int]:
    """How many instructions it takes from a start to each that can be reached, counting both."""
    found = dict.fromkeys(starts, 1)
    queue = deque(found)
    while queue:
        at = queue.popleft()
        for to in following(at):
            if to not in found:
                found[to] = found[at] + 1
                queue.append(to)
    return found


def _innermost_loop(code: list[Instruction], at: int) -> set[int]:
    """The loop around an instruction, its side paths included; the instruction alone where there is none."""
    before: list[list[int]] = [[] for _ in code]
    for i, instruction in enumerate(code):
        for to in instruction.next:
            before[to].append(i)
    ahead = _distances(code[at].next, lambda i: code[i].next)
    if at not in ahead:
        return {at}
    # Follow the shortest cycle backwards. Its lowest address is the head of the loop, which is entered nowhere else.
    cycle = [at]
    while ahead[cycle[-1]] > 1:
        cycle.append(next(i for i in before[cycle[-1]] if ahead.get(i) == ahead[cycle[-1]] - 1))
    head = min(cycle)
    last = cycle[(cycle.index(head) + 1) % len(cycle)]  # the cycle runs backwards
    return set(_distances([last], lambda i: () if i == head else before[i])) | {head}


class FastPath(NamedTuple):
    """The fewest instructions that a warp issues, without those of the loop over D."""

    before: int | None  # from the beginning to that loop; None for a kernel that makes no products
    again: int | None  # from it to the jump back to the next tile; None for a kernel of one tile
    last: int  # from it to the end

    def of_tile(self, tiles: int = 1) -> float:
        """Instructions of one tile, after its products, in a program that walks ``tiles`` tiles in turn."""
        if self.again is None:
            return self.last
        return ((tiles - 1) * self.again + self.last) / tiles


def fast_path(sass: str) -> FastPath:
    """The cheapest way through a kernel; through one without matrix instructions, from its start by a store to its end.

    Raises: ValueError where there is no such way.
    """
    code = parse(sass)
    ends = [i for i, instruction in enumerate(code) if instruction.ends]
    start = _distances([0], lambda i: code[i].next)
    products = [i for i in start if MATRIX.match(code[i].name)]  # nearest first
    if not products:
        stores = [i for i in start if STORE.match(code[i].name)]
        ways = [start[s] - 1 + way for s in stores if (way := _shortest(_distances([s], lambda i: code[i].next), ends))]
        if not ways:
            raise ValueError("no way from the start to an end that stores something")
        return FastPath(None, None, min(ways))
    loop = _innermost_loop(code, products[0])  # products further away are those of a special tile, made again
    if len(loop) == 1:
        loop = {products[-1]}
    after = {to for i in loop for to in code[i].next} - loop
    outside = _distances(after, lambda i: [to for to in code[i].next if to not in loop])
    before, last = _shortest(start, loop), _shortest(outside, ends)
    if before is None or last is None:
        raise ValueError("no way from the start through the loop over D to an end")
    # A loop over tiles jumps from behind the loop over D to before it, and from there leads to it.
    leads = {i for i in outside if i < min(loop)}
    jumps = [i for i in outside if i > min(loop) and leads.intersection(code[i].next)]
    again = _shortest(outside, jumps)
    return FastPath(before - 1, again, last)


def _shortest(distances: dict[int, int], to: Iterable[int]) -> int | None:
    return min((distances[i] for i in to if i in distances), default=None)


def _dump(cubin: bytes) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return "".join(
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """A kernel's argument, or the fields of one that is a tuple."""
    if not isinstance(value, tuple):
        yield name, value
        return
    for field, item in zip(getattr(value, "_fields", range(len(value))), value, strict=True):
        yield from _leaves(f"{name}.{field}", item)


def count(kernel: Any, arch: str) -> dict[str, Any]:
    """What a compiled kernel is made of."""
    dump, function = _dump(kernel.asm["cubin"]), kernel.src.fn
    names = Counter(instruction.name for instruction in parse(dump))
    types = dict(leaf for argument in kernel.src.signature.items() for leaf in _leaves(*argument))
    constants = {function.arg_names[path[0]]: v for path, v in kernel.src.constants.items() if len(path) == 1}
    tile = constants.get("TILE")
    warps = kernel.metadata.num_warps
    found: dict[str, Any] = {
        "kernel": function.__name__,
        "arch": arch,
        "tensors": {name: kind for name, kind in types.items() if kind.startswith(("*", "tensordesc"))},
        "options": {name: str(value) for name, value in constants.items() if value is not None},
        "warps": warps,
        "registers": int(re.search(r"REG:(\d+)", dump)[1]),
        "spilled": sum(number for name, number in names.items() if name.startswith("STL")),
        "shared": kernel.metadata.shared,
        "instructions": names.total(),
        "matrix_instructions": sum(number for name, number in names.items() if MATRIX.match(name)),
        "stores": {name: number for name, number in sorted(names.items()) if STORE.match(name)},
    }
    try:
        path = fast_path(dump)
    except ValueError as error:
        return {**found, "fast_path": str(error)}
    found["fast_path"] = path._asdict()
    strip = getattr(tile, "strip", 1)
    if hasattr(tile, "block_m") and (path.before is not None or strip == 1):  # else the way leads past all tiles
        found["instructions_per_logit"] = round(path.of_tile(strip) / (tile.block_m * tile.block_n / (32 * warps)), 2)
    return found
