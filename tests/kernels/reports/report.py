"""What nvcc says of the CUDA kernels: registers, stack, spills; and their disassembly where a
disassembler is found.

`python tests/kernels/report.py --out FOLDER` compiles for every architecture that is built by
default, prints a table, and writes the machine code's listing and its counts of instructions.
"""

from __future__ import annotations

import argparse
import collections
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[3]
SOURCES = [ROOT / "csrc" / "kernels" / "cuda" / name for name in ("search.cu", "states.cu")]
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
COUNTED = ("FFMA", "HMMA", "MUFU", "SHFL", "LDS", "STS", "LDG", "STG", "LDL", "STL", "BAR")


class Kernel(NamedTuple):
    """One kernel's line of the report; sizes in bytes."""

    name: str
    registers: int
    stack: int
    spills: int
    static_shared: int


def compile_for(architecture: int, source: Path, target: Path) -> list[Kernel]:
    """Compile one file to machine code and return what ptxas says of its kernels."""
    command = ["nvcc", "-std=c++20", "-O3", f"-arch=sm_{architecture}", "-cubin", "-Xptxas=-v",
               "-Werror=all-warnings", f"-I{ROOT / 'csrc'}", str(source), "-o",
               str(target)]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
    return parse(result.stderr + result.stdout)


def parse(report: str) -> list[Kernel]:
    """Read the report of `-Xptxas=-v`."""
    kernels = []
    for part in report.split("Compiling entry function '")[1:]:
        stack = int(_found(r"(\d+) bytes stack frame", part))
        spills = sum(map(int, re.findall(r"(\d+) bytes spill", part)))
        registers = int(_found(r"Used (\d+) registers", part))
        shared = re.search(r"(\d+) bytes smem", part)
        static_shared = int(shared[1]) if shared else 0
        kernels.append(
            Kernel(_readable(part.split("'")[0]), registers, stack, spills, static_shared)
        )
    return kernels


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"no {pattern!r} in what ptxas says:\n{text}")
    return match[1]


def _readable(mangled: str) -> str:
    """Return a kernel's name and template arguments: search_warps<Exact, 4, resident>."""
    name = next(n for n in ("search_warps", "pack_scores", "multiply_rows", "step_cells",
                            "end_round", "make_room", mangled) if n in mangled)  # fmt: skip
    arguments = [s for s in ("Exact", "Fast") if f"{s}Scores" in mangled]
    capacity = re.search(r"Li(\d+)ELb([01])", mangled)
    if capacity:
        arguments += [capacity[1], "resident" if capacity[2] == "1" else "streamed"]
    return f"{name}<{', '.join(arguments)}>" if arguments else name


def within_bounds(kernel: Kernel, architecture: int) -> bool:
    """Whether a kernel keeps to what its header promises.

    Two blocks of 256 threads of the search, three of the product, fit the 65,536 registers of a
    multiprocessor; of the search one on 8.6 and 8.9, which have shared memory for one, as all have
    for banks. Streamed panels may spill a few registers on 8.0.
    """
    one = architecture in (86, 89) or ", 32, " in kernel.name
    blocks = (1 if one else 2) if kernel.name.startswith("search_warps") else 3
    most = min(255, 65536 // (256 * blocks) // 8 * 8)
    spills = 40 if "streamed" in kernel.name else 0
    return kernel.registers <= most and kernel.stack <= spills and kernel.spills <= spills


def disassembler() -> str | None:
    """Return the path of cuobjdump: CUDA's own or the one that Triton's package brings."""
    found = shutil.which("cuobjdump")
    if found is None:
        for folder in map(Path, sys.path):
            at = folder / "triton" / "backends" / "nvidia" / "bin" / "cuobjdump"
            if at.is_file():
                return str(at)
    return found


def count_instructions(listing: str) -> dict[str, collections.Counter[str]]:
    """Count what is counted in each kernel of a disassembly."""
    counts = {}
    for part in listing.split("Function : ")[1:]:
        mnemonics = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+ )?([A-Z0-9]+)", part, re.M)
        counts[_readable(part.split()[0])] = collections.Counter(mnemonics)
    return counts


def main() -> int:
    """Print the report; exit status 1 where a kernel passes its bounds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the listings")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    tool = disassembler()
    print(f"disassembler: {tool or 'none found'}")
    print(f"{'':4}{'kernel':38}{'regs':>5}{'stack':>6}{'spill':>6}{'instructions':>13}  of them")
    failed = False
    for architecture in ARCHITECTURES:
        for source in SOURCES:
            binary = out / f"{source.stem}.sm_{architecture}.cubin"
            kernels = compile_for(architecture, source, binary)
            counts = {}
            if tool is not None:
                listing = subprocess.run(
                    [tool, "--dump-sass", str(binary)], capture_output=True, text=True, check=True
                ).stdout
                binary.with_suffix(".sass").write_text(listing, encoding="utf-8")
                counts = count_instructions(listing)
            for k in kernels:
                of_it = counts.get(k.name, collections.Counter())
                shown = " ".join(f"{name} {of_it[name]}" for name in COUNTED if of_it[name])
                total = sum(of_it.values()) if of_it else "-"
                print(f"{architecture:<4}{k.name:38}{k.registers:5}{k.stack:6}{k.spills:6}"
                      f"{total!s:>13}  {shown}")  # fmt: skip
                failed |= not within_bounds(k, architecture)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
