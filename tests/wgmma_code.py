"""Machine code with warpgroup products (HGMMA): what is in it, and whether it keeps away from registers in flight."""

import re
import subprocess
from collections import Counter
from dataclasses import dataclass

from aot import tool

Groups = tuple[frozenset[int], ...]  # registers of the products in flight, by committed group, the open one last


@dataclass(frozen=True)
class Code:
    """One kernel.   lines: its instructions. at: the place in lines of every address."""

    name: str
    lines: list[str]
    at: dict[int, int]

    @property
    def instructions(self) -> Counter[str]:
        """By opcode without its modifiers."""
        return Counter(_bare(line).split()[0].split(".")[0] for line in self.lines)

    @property
    def products(self) -> Counter[str]:
        """By shape, "64x200x16"."""
        return Counter(_bare(line).split(".")[1] for line in self.lines if "HGMMA" in line)

    @property
    def copies(self) -> Counter[str]:
        """Asynchronous ones, by the width that their last modifier gives."""
        return Counter(_bare(line).split()[0].split(".")[-1] for line in self.lines if "LDGSTS" in line)

    def touched_in_flight(self) -> set[str]:
        """The instructions that read or write a register of a product not yet waited for, on any path through the code.

        A later product may add to the results of one in flight; its other registers may not be among them.
        """
        found: set[str] = set()
        seen: set[tuple[int, Groups]] = set()
        paths: list[tuple[int, Groups]] = [(0, (frozenset(),))]
        while paths:
            place, groups = paths.pop()
            while place < len(self.lines) and (place, groups) not in seen:
                seen.add((place, groups))
                line = self.lines[place]
                bare = _bare(line)
                if bare.startswith("HGMMA"):
                    results, weights = _of_product(bare)
                    if weights & frozenset().union(*groups):
                        found.add(line)
                    groups = (*groups[:-1], groups[-1] | results | weights)
                    groups = (*groups, frozenset()) if "gsb0" in bare else groups
                elif bare.startswith("WARPGROUP.DEPBAR"):
                    groups = groups[-1 - int(bare.rsplit("0x", 1)[1], 16) :]
                elif _touched(bare) & frozenset().union(*groups):
                    found.add(line)
                branch = re.match(r"BRA.*(0x[0-9a-f]+)$", bare)
                if bare.startswith(("EXIT", "RET")) and bare == line:
                    break
                if branch is not None and bare == line:
                    place = self.at[int(branch[1], 16)]
                    continue
                if branch is not None:
                    paths.append((self.at[int(branch[1], 16)], groups))
                place += 1
        return found


def read(cubin: str) -> list[Code]:
    """Every kernel of a cubin."""
    sass = subprocess.run([tool("cuobjdump"), "-sass", cubin], capture_output=True, text=True, check=True).stdout
    found = []
    for part in sass.split("Function : ")[1:]:
        code = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", part)
        places = {int(address, 16): place for place, (address, _) in enumerate(code)}
        found.append(Code(part.split()[0], [line for _, line in code], places))
    return found


def _bare(line: str) -> str:
    """Without the predicate."""
    return re.sub(r"^@!?U?P\w+ ", "", line)


def _of_product(line: str) -> tuple[frozenset[int], frozenset[int]]:
    """The registers of its results, and of its left operand where that is in registers."""
    found = re.match(r"HGMMA\.64x(\d+)x16\S* R(\d+), (?:R(\d+)|gdesc)", line)
    assert found is not None, line
    first, left = int(found[2]), found[3]
    results = frozenset(range(first, first + int(found[1]) // 2))
    return results, frozenset(range(int(left), int(left) + 4)) if left else frozenset()


def _touched(line: str) -> set[int]:
    registers = {int(number) for number in re.findall(r"\bR(\d+)\b", line)}
    first = re.match(r"\S+ R(\d+)", line)
    if first is not None and re.match(r"\S*(\.64|WIDE)", line):
        registers.add(int(first[1]) + 1)
    return registers
