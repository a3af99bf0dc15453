"""Checks and times the CUDA search on the GPU that is here, and writes one JSON: `make gpu-check`.

Needs Python with torch, numpy and pytest, cmake, ninja and nvcc; no network and no installation.
1. builds for this GPU, in build/gpu;
2. runs tests/gpu and the kernels' shared functions on the device;
3. runs a program without torch under compute-sanitizer's tools; one that does not work here is
   recorded as such;
4. times the search, benchmarks/search/gpu.py;
5. writes benchmarks/results/<GPU>.json with GPU, driver, torch, commit and every figure.
`cnnrnn.search.device.MEASURED_GPUS` follows the files that are committed, see `is_earned`.
Exit status 1 where a test fails or a tool finds an error; the JSON is written all the same.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import torch
from torch.utils.cpp_extension import include_paths, library_paths

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))
from build_backend import find_nvcc  # noqa: E402  # of this source tree

BUILD = ROOT / "build" / "gpu"
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


def say(line: str) -> None:
    print(f"gpu-check: {line}", flush=True)


def build() -> None:
    """Build `cnnrnn._C` in the source tree, and the program for compute-sanitizer."""
    os.environ["CNNRNN_CUDA"] = "1"
    nvcc = find_nvcc()
    major, minor = torch.cuda.get_device_capability()
    configure = [
        "cmake", "-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DCNNRNN_TORCH_INCLUDE_DIRS={';'.join(include_paths())}",
        f"-DCNNRNN_TORCH_LIBRARY_DIRS={';'.join(library_paths())}",
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={ROOT / 'cnnrnn'}",
        "-DCNNRNN_CUDA=ON",
        f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DCNNRNN_CUDA_ARCHITECTURES={major}{minor}",
    ]  # fmt: skip
    subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["cmake", "--build", str(BUILD), "--target", "_C", "gpu_sanitized"], check=True)
    release = torch.__version__.split("+")[0]
    record = (
        f'"""Written by the build: what cnnrnn._C was built against."""\n\nTORCH = "{release}"\n'
    )
    (ROOT / "cnnrnn" / "_build_info.py").write_text(record, encoding="utf-8")


def run(command: list[str], seconds: int) -> tuple[int | None, str]:
    """Run a command; return its exit status, None where it was stopped, and what it printed."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    try:
        result = subprocess.run(
            command, cwd=ROOT, env=environment, text=True, timeout=seconds,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        return result.returncode, result.stdout
    except subprocess.TimeoutExpired as stopped:
        printed = stopped.stdout or b""
        return None, printed.decode(errors="replace") if isinstance(printed, bytes) else printed


def run_tests(searches: int) -> dict[str, Any]:
    """Run the tests; return their counts and what they print of their figures."""
    report = BUILD / "tests.xml"
    report.unlink(missing_ok=True)  # of an earlier run
    command = [
        sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "tests/kernels/gpu",
        "tests/kernels/test_maths.py", f"--searches={searches}", f"--junitxml={report}",
    ]  # fmt: skip
    status, printed = run(command, 180)
    print(printed[-6000:], flush=True)
    counts: dict[str, int] = {}
    if report.exists():
        suite = xml.etree.ElementTree.parse(report).getroot().find("testsuite")
        if suite is not None:
            names = ("tests", "failures", "errors", "skipped")
            counts = {name: int(suite.get(name, "0")) for name in names}
    figures = re.findall(r"^\.*(.*(?:excused|changed)[^\n]*)$", printed, re.M)
    return {"passed": status == 0, "exit_status": status, **counts, "said": figures}


def run_sanitizers() -> dict[str, dict[str, Any]]:
    """Run the program alone and under each tool."""
    program = str(BUILD / "gpu_sanitized")
    runs: dict[str, list[str]] = {"alone": [program]}
    tool = shutil.which("compute-sanitizer")
    found: dict[str, dict[str, Any]] = {}
    for name in TOOLS:
        if tool is None:
            found[name] = {"outcome": "no compute-sanitizer here"}
        else:
            runs[name] = [tool, "--tool", name, "--error-exitcode", "9", program]
    for name, command in runs.items():
        status, printed = run(command, 40)
        outcome = (
            "not done after 40 s" if status is None
            else "nothing found" if status == 0
            else "does not work here" if "not supported" in printed
            else "errors"
        )  # fmt: skip
        found[name] = {"outcome": outcome, "last_lines": printed.strip().splitlines()[-6:]}
        say(f"{name}: {outcome}")
    return found


def run_benchmarks() -> dict[str, Any]:
    """Time the search; what was measured is kept where a later case fails."""
    figures = BUILD / "figures.json"
    figures.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.search.gpu", "--out", str(figures)]
    status, printed = run(command, 240)
    print(printed[-6000:], flush=True)
    rows = json.loads(figures.read_text(encoding="utf-8")) if figures.exists() else []
    return {"ended": status == 0, "figures": rows}


def is_earned(results: dict[str, Any]) -> bool:
    """Whether `search_device="auto"` is to search on the GPU of these results.

    Every step ran, every test passed and no tool found an error; and on images that it has not
    seen, the search was faster than the CPU's, which copies them from the GPU.
    """
    tests, tools = results.get("tests", {}), results.get("compute-sanitizer", {})
    benchmarks = results.get("benchmarks", {})
    if not (tests.get("passed") and tools and benchmarks.get("ended")):
        return False
    speeds = {
        row["implementation"]: row["images_per_second"]
        for row in benchmarks["figures"] if row["case"] == "warm"
    }  # fmt: skip
    faster = "CPU search" in speeds and speeds.get("exact", 0.0) > speeds["CPU search"]
    return faster and all(tool["outcome"] != "errors" for tool in tools.values())


def driver_version() -> str:
    """Return what nvidia-smi says of the driver."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.splitlines()[0]
    except (OSError, IndexError):
        return "unknown"


def main() -> int:
    """Run everything and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--commit", required=True, help="of the sources, for the record")
    parser.add_argument("--out", type=Path, help="JSON to write")
    parser.add_argument("--searches", type=int, default=300, help="random searches of the tests")
    steps = ("tests", "compute-sanitizer", "benchmarks")
    parser.add_argument("--only", nargs="+", choices=steps, default=steps, help="of the steps")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        say("torch sees no GPU here; this check needs one")
        return 1
    gpu = torch.cuda.get_device_name()
    name = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    out = arguments.out or ROOT / "benchmarks" / "results" / f"{name}.json"
    began = time.perf_counter()
    seconds: dict[str, float] = {}
    results: dict[str, Any] = {
        "gpu": gpu, "driver": driver_version(), "torch": torch.__version__,
        "cuda": torch.version.cuda, "commit": arguments.commit, "seconds": seconds,
    }  # fmt: skip

    def step(key: str, work: Any) -> Any:
        say(key)
        begin = time.perf_counter()
        results[key] = work()
        seconds[key] = round(time.perf_counter() - begin, 1)
        out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        return results[key]

    step("build", build)
    works = {
        "tests": lambda: run_tests(arguments.searches),
        "compute-sanitizer": run_sanitizers,
        "benchmarks": run_benchmarks,
    }
    for key, work in works.items():
        if key in arguments.only:
            step(key, work)
    say(f"{time.perf_counter() - began:.0f} s; figures in {out}")
    if is_earned(results):
        say(f"once these are committed, cnnrnn.search.device.MEASURED_GPUS holds {gpu!r}")
    tests, tools = results.get("tests", {}), results.get("compute-sanitizer", {})
    right = tests.get("passed", True) and results.get("benchmarks", {}).get("ended", True)
    return 0 if right and all(tool["outcome"] != "errors" for tool in tools.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
