"""The CUDA search, run from the PTX that nvcc makes of its kernels.

The host's half is that of `tests/kernels/emulation`, whose launches come here: what is launched
there as C++ for the CPU is found here by its name, as nvcc compiled it.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

from tests.kernels.emulation import emulated
from tests.kernels.ptx import ptx

SOURCES = [emulated.CSRC / "kernels" / "cuda" / name for name in ("search.cu", "states.cu")]
TAKE_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_bool, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint, ctypes.c_size_t, ctypes.c_int,
    ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_size_t),
)  # fmt: skip


def compile_to_ptx(source: Path, target: Path, architecture: int = 90) -> str:
    """Return the PTX of a CUDA source, with its lines."""
    subprocess.run(
        ["nvcc", "-std=c++20", "-O3", f"-arch=sm_{architecture}", "-ptx", "-lineinfo",
         f"-I{emulated.CSRC}", str(source), "-o", str(target)],
        check=True,
    )  # fmt: skip
    return target.read_text(encoding="utf-8")


def demangled(names: list[str]) -> list[str]:
    """Return C++ names as they are written; a file's anonymous namespace is the same in all."""
    result = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True,
                            check=True)  # fmt: skip
    return result.stdout.splitlines()


class PtxSearch:
    """Runs what an emulated library launches from PTX instead, and counts its instructions."""

    def __init__(self, library: ctypes.CDLL, folder: Path) -> None:
        """Compile the kernels in `folder`; the library is one that `emulated.build` made."""
        self.emulator = library
        self.counts: dict[str, list[tuple[ptx.Line, int]]] = {}  # by kernel: issued by all warps
        self._error: BaseException | None = None
        self._kernels = {}
        for source in SOURCES:
            kernels = ptx.parse(compile_to_ptx(source, folder / f"{source.stem}.ptx"))
            for mangled, name in zip(kernels.parts, demangled(list(kernels.parts)), strict=True):
                self._kernels[name] = (kernels, mangled)
        symbols = subprocess.run(["nm", library._name], capture_output=True, text=True, check=True)
        found = re.findall(r"^([0-9a-f]+) [tT] (\S+)$", symbols.stdout, re.M)
        addresses = {name: int(address, 16) for address, name in found}
        anchor = ctypes.cast(library.set_take_launch, ctypes.c_void_p).value
        assert anchor is not None
        moved = anchor - addresses["set_take_launch"]
        names = list(addresses)
        self._names = {addresses[symbol] + moved: name
                       for symbol, name in zip(names, demangled(names), strict=True)}  # fmt: skip
        self._take = TAKE_LAUNCH(self._launch)

    def __enter__(self) -> PtxSearch:
        self.emulator.set_take_launch(self._take)
        return self

    def __exit__(self, *_: Any) -> None:
        self.emulator.set_take_launch(TAKE_LAUNCH(0))
        if self._error is not None:
            raise self._error

    def _launch(self, kernel: int, blocks: int, threads: int, shared: int, count: int,
                arguments: Any, sizes: Any) -> bool:  # fmt: skip
        try:
            name = self._names[kernel]
            kernels, mangled = self._kernels[name]
            code = kernels[mangled]
            given = [ctypes.string_at(arguments[i], sizes[i]) for i in range(count)]
            issued = code.run(given, blocks, threads, shared)
            before = self.counts.get(name)
            totals = issued if before is None else issued + [n for _, n in before]
            self.counts[name] = list(zip(code.lines, (int(n) for n in totals), strict=True))
        except BaseException as error:  # a callback can't raise: the caller gets it at the end
            self._error = self._error or error
        return True


def by_function(lines: list[tuple[ptx.Line, int]]) -> Counter[str]:
    """Sum counts over the functions that instructions come from, inlined ones by their own name."""
    totals: Counter[str] = Counter()
    for line, count in lines:
        totals[line.function] += count
    names = demangled(list(totals))
    readable: Counter[str] = Counter()
    for mangled, name in zip(list(totals), names, strict=True):
        name = name.replace("(anonymous namespace)::", "")
        while name != (shorter := re.sub(r"<[^<>]*>", "", name)):
            name = shorter
        name = name.split("(")[0].split("::")[-1].split(" ")[-1]
        readable[name or "the kernel itself"] += totals[mangled]
    return readable
