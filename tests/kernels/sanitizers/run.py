"""Build the search with sanitizers, run it, and show that planted bugs are caught.

`make sanitize` runs this. Everything lands in build/sanitize: the installed package is not touched.
Ends with status 1, and the report, where a sanitizer finds something or misses what was planted.
Linux and GCC only: AddressSanitizer comes into Python by LD_PRELOAD.
"""

from __future__ import annotations

import ctypes
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "build" / "sanitize"
PACKAGE = FOLDER / "package" / "cnnrnn"
ADDR_NO_RANDOMIZE = 0x0040000  # linux/personality.h

# The options also hold for the planted bugs, so that what is shown there holds for the tests.
OPTIONS = {
    # Python and torch keep memory until the process ends; only the kernels are instrumented.
    "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1:second_deadlock_stack=1",
}


class Planted(NamedTuple):
    """What the report on a planted bug must say: the kind, and a kernels' line in its stack."""

    kind: str
    where: str


OVERFLOW = "heap-buffer-overflow"
# GCC's AddressSanitizer does not classify a wide access that begins inside its buffer.
WIDE_OVERFLOW = f"({OVERFLOW}|unknown-crash)"
KERNELS = r"loops_impl\.h"

PLANTED = {
    "address": {
        "short-image": Planted(OVERFLOW, rf"activate_sum .*{KERNELS}"),
        "short-panels": Planted(WIDE_OVERFLOW, rf"product_tile.*{KERNELS}"),
        "short-sums": Planted(WIDE_OVERFLOW, rf"product_tile.*{KERNELS}"),
        "freed-head": Planted("heap-use-after-free", r"beam_search_cpu.*cpu/search\.cpp"),
        "evicted-state": Planted("heap-use-after-free", rf"activate_sum .*{KERNELS}"),
        "wide-beam": Planted("index 16 out of bounds", rf"select.*{KERNELS}"),
        "invalid-bool": Planted("load of value 2, which is not", r"finish_step.*cpu/search\.cpp"),
        "misaligned-weights": Planted("load of misaligned address", r"panels .*cpu/head\.cpp"),
        "huge-width": Planted("signed integer overflow", rf"product .*{KERNELS}"),
    },
    "thread": {
        "shared-output": Planted("data race", r"beam_search_cpu.*cpu/search\.cpp"),
        # Only the later access of a race is sure to have its stack; which one it is, is chance.
        "written-state": Planted("data race", rf"(product_tile|activate_sum).*{KERNELS}"),
        "find-without-stay": Planted(
            "(data race|heap-use-after-free)", r"PrefixTable::(find|evict).*prefix_table\.cpp"
        ),
    },
}

# `python -c` code: the tests with the sanitized module, and with no other.
RUN_TESTS = """
import sys, pytest, cnnrnn._C
expected = sys.argv.pop(1)
assert cnnrnn._C.__file__ == expected, f"imported {cnnrnn._C.__file__}, not {expected}"
sys.exit(pytest.main(sys.argv[1:]))
"""

# A bug planted in front of the module: a tensor whose memory is a float shorter than its shape.
SEARCH_A_SHORT_TENSOR = """
import sys, torch, cnnrnn._C
from cnnrnn.network.head import Head, ImageEmbedding
from cnnrnn.search import beam_search
assert cnnrnn._C.__file__ == sys.argv[1]
head, joint = Head(5, 4, joint_dim=16, hidden_dim=8).eval(), torch.zeros(3, 16)
beam_search(head, ImageEmbedding(joint))
print("searched rightly")
joint.untyped_storage().resize_(4 * 3 * 16 - 4)
beam_search(head, ImageEmbedding(joint))
"""


def main() -> None:
    """Build and run everything; leave at the first thing that is wrong."""
    if sys.platform != "linux":
        sys.exit(f"sanitizers: these builds need Linux and GCC, this is {sys.platform}")
    started = time.perf_counter()
    # Commands inherit it: GCC 12's ThreadSanitizer does not start among addresses as random as some
    # systems make them. Where that is refused, they may still do.
    ctypes.CDLL(None).personality(ADDR_NO_RANDOMIZE)
    compiler = os.environ.get("CXX") or "g++"
    copy_package()
    build("address", "address;undefined", compiler, ["_C"])
    build("thread", "thread", compiler, [])
    for sanitizer in PLANTED:
        announce(f"{sanitizer}: planted bugs")
        run_planted(sanitizer)
        announce(f"{sanitizer}: threads that share a head")
        run([str(FOLDER / sanitizer / "sanitizers_threads")])
    run_tests(compiler)
    print(f"sanitizers: all is well, after {time.perf_counter() - started:.0f} s")


def announce(what: str) -> None:
    """Say what comes next, before its own output."""
    print(f"sanitizers: {what}", flush=True)


def run(command: list[str], **environment: str) -> None:
    """Run a command that must succeed."""
    status = subprocess.run(
        command, cwd=ROOT, env=os.environ | OPTIONS | environment, check=False
    ).returncode
    if status != 0:
        sys.exit(f"sanitizers: exit status {status} of {shlex.join(command)}")


def tool(name: str) -> str:
    """Find a build tool beside this Python or on PATH."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    found = shutil.which(name, path=path)
    if found is None:
        sys.exit(f"sanitizers: {name} was not found; run `{sys.executable} -m pip install {name}`")
    return found


def copy_package() -> None:
    """Copy the package's Python files to where the sanitized module will lie."""
    shutil.rmtree(PACKAGE, ignore_errors=True)
    shutil.copytree(
        ROOT / "cnnrnn", PACKAGE, ignore=shutil.ignore_patterns("__pycache__", "*.so", "*.pyd")
    )


def build(name: str, sanitizers: str, compiler: str, targets: list[str]) -> None:
    """Build the programs and `targets` with these sanitizers in a folder of their own."""
    from torch.utils.cpp_extension import include_paths, library_paths

    announce(f"building with {sanitizers}")
    folder = str(FOLDER / name)
    run(
        [
            tool("cmake"), "-S", str(ROOT), "-B", folder, "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCNNRNN_SANITIZE={sanitizers}",
            f"-DCNNRNN_TORCH_INCLUDE_DIRS={';'.join(include_paths())}",
            f"-DCNNRNN_TORCH_LIBRARY_DIRS={';'.join(library_paths())}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={PACKAGE}",
        ],
        CXX=compiler,
    )  # fmt: skip
    programs = ["sanitizers_planted", "sanitizers_threads"]
    run([tool("cmake"), "--build", folder, "--target", *programs, *targets])


def run_planted(sanitizer: str) -> None:
    """Commit every planted bug with every instruction set; each must be reported, rightly."""
    program = str(FOLDER / sanitizer / "sanitizers_planted")
    listed = subprocess.run([program], capture_output=True, text=True, check=True)
    for instruction_set in listed.stdout.split():
        run([program, "none", instruction_set])
        for bug, planted in PLANTED[sanitizer].items():
            must_be_caught([program, bug, instruction_set], planted)
            print(f"  caught {bug} ({instruction_set})", flush=True)


def must_be_caught(command: list[str], planted: Planted, **environment: str) -> str:
    """Run a command that commits a bug, and check what is reported; return its output."""
    result = subprocess.run(
        command, cwd=ROOT, env=os.environ | OPTIONS | environment, capture_output=True, text=True
    )
    kind = re.search(rf"(ERROR: AddressSanitizer|runtime error|ThreadSanitizer): {planted.kind}",
                     result.stderr)  # fmt: skip
    where = re.search(rf"^ +#\d+ .*{planted.where}:\d+", result.stderr, re.MULTILINE)
    if result.returncode == 0 or not kind or not where:
        sys.exit(
            f"sanitizers: expected a report of {planted.kind} in {planted.where}, got exit status "
            f"{result.returncode} of {shlex.join(command)} and:\n{result.stderr}"
        )
    return result.stdout


def run_tests(compiler: str) -> None:
    """Run the tests of the search with the sanitized module in the place of the installed one."""
    module = str(PACKAGE / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}")
    environment = {
        # The runtime must come before all that allocates, and must find libstdc++ when it starts.
        "LD_PRELOAD": " ".join(runtime(compiler, f"lib{name}.so") for name in ("asan", "stdc++")),
        "PYTHONPATH": str(PACKAGE.parent),
        "PYTHONSAFEPATH": "1",  # or `cnnrnn` would be the one in the current folder
        "CUDA_VISIBLE_DEVICES": "",  # CUDA maps memory where AddressSanitizer keeps its own
    }
    announce("address: a bug planted in front of the Python module")
    command = [sys.executable, "-c", SEARCH_A_SHORT_TENSOR, module]
    planted = Planted(OVERFLOW, r"all_finite .*cpu/row_scorer\.cpp")
    if "searched rightly" not in must_be_caught(command, planted, **environment):
        sys.exit("sanitizers: the report came before the bug")
    announce("address: tests of the search")
    # Reports go to the standard error of the process, which only `sys` leaves alone.
    # GCC's AddressSanitizer may hold its allocator's lock at a fork: a child would wait for ever.
    options = ["-q", "--capture=sys", "-p", "no:cacheprovider", "-k", "not forked_child"]
    # Fewer random searches where labels are known: those cost more.
    for searches, names in (
        (1000, ("test_search.py", "test_prefix_table.py", "test_op.py")),
        (300, ("test_evidence.py", "test_exact.py")),
    ):
        tests = [str(ROOT / "tests" / "search" / name) for name in names]
        command = [sys.executable, "-c", RUN_TESTS, module, *options, f"--searches={searches}"]
        run([*command, *tests], **environment)


def runtime(compiler: str, library: str) -> str:
    """Find a library of the compiler's."""
    found = subprocess.run(
        [*compiler.split(), f"-print-file-name={library}"], capture_output=True, text=True
    ).stdout.strip()
    if not Path(found).is_absolute():
        sys.exit(f"sanitizers: {compiler} has no {library}; use a GCC that has it, as CXX=g++")
    return str(Path(found).resolve())


if __name__ == "__main__":
    main()
