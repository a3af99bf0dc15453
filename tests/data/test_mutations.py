"""Valid files of every format, mutated by hypothesis: they load, or say in a sentence why not."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cnnrnn.data import DataError, load_dataset
from cnnrnn.data.report import check_source
from tests.data import sources

for module in ("defusedxml", "pycocotools", "sklearn"):
    pytest.importorskip(module)

SOURCES: dict[str, Callable[[Path], str]] = {
    "coco": lambda root: f"coco:{sources.write_coco(root)}",
    "voc": lambda root: f"voc:{sources.write_voc(root)}",
    "concepts": lambda root: f"nuswide:{sources.write_nuswide(root)}",
    "tags": lambda root: f"nuswide:{sources.write_nuswide(root)},labels=tags",
    "csv": lambda root: f"csv:{sources.write_csv(root)}",
    "columns": lambda root: f"csv:{sources.write_columns(root)}",
    "jsonl": lambda root: f"jsonl:{sources.write_json_lines(root)}",
    "svmlight": lambda root: f"features:{sources.write_svmlight(root)}",
    "npz": lambda root: f"features:{sources.write_npz(root / 'f.npz')}",
}

# What a careless or hostile writer would put in.
PIECES = [
    b"", b"\0", b"\n", b"\r\n", b" ", b",", b";", b'"', b"'", b"{", b"[", b"]}", b"<", b"</a>",
    b"&a;", b"..", b"/", b"\\", b"../../etc/passwd", b"/etc/passwd", b"C:\\x", b"http://h/x.png",
    b"data:,x", b"-1", b"0", b"1", b"2", b"1e400", b"9" * 400, b"-0.0", b"NaN", b"nan",
    b"Infinity", b"null", b"true", b"\xff\xfe", b"\xed\xa0\x80", b"\xef\xbb\xbf", "é".encode(),
    b"\\ud800", b"[" * 2000, b"<a>" * 2000,
    b'<!DOCTYPE a [<!ENTITY a "b">]>', b"id", b"1:1", b"PK\x05\x06",
]  # fmt: skip

Edit = tuple[str, float, float, bytes]
EDITS = st.lists(
    st.tuples(
        st.sampled_from(["insert", "replace", "delete", "truncate", "repeat", "flip", "swap"]),
        st.floats(0, 1), st.floats(0, 1),
        st.sampled_from(PIECES) | st.binary(max_size=4),
    ),
    min_size=1, max_size=3,
)  # fmt: skip


def mutated(data: bytes, edits: list[Edit]) -> bytes:
    for kind, where, until, piece in edits:
        start, end = sorted((int(where * len(data)), int(until * len(data))))
        end = min(end, start + 40)
        if kind == "insert":
            data = data[:start] + piece + data[start:]
        elif kind == "replace":
            data = data[:start] + piece + data[start + len(piece) :]
        elif kind == "delete":
            data = data[:start] + data[end:]
        elif kind == "truncate":
            data = data[:start]
        elif kind == "repeat":
            data = data[:end] + data[start:end] + data[end:]
        elif kind == "flip" and start < len(data):
            data = data[:start] + bytes([data[start] ^ 1 << len(piece) % 8]) + data[start + 1 :]
        elif kind == "swap":
            middle = (start + end) // 2
            data = data[:start] + data[middle:end] + data[start:middle] + data[end:]
    return data


@pytest.mark.parametrize("name", SOURCES)
def test_mutated_files(name: str, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """Loading raises DataError or nothing, and the report agrees with it and raises nothing."""
    spec = SOURCES[name](tmp_path / "source")
    whole = {file: file.read_bytes() for file in sorted((tmp_path / "source").rglob("*.*"))
             if file.is_file()}  # fmt: skip
    unused = {"tags": ("Groundtruth", "Concepts"), "concepts": ("TrainTest", "NUS_WID_Tags")}
    for part in unused.get(name, ()):
        whole = {file: data for file, data in whole.items() if part not in str(file)}
    assert check_source(spec).problems == []
    outcomes: Counter[str] = Counter()

    @settings(
        max_examples=-(-pytestconfig.getoption("mutations") // len(SOURCES)), deadline=None,
        derandomize=True, database=None, suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(file=st.sampled_from(list(whole)), edits=EDITS)
    def run(file: Path, edits: list[Edit]) -> None:
        file.write_bytes(mutated(whole[file], edits))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                outcomes[_read(spec, tmp_path)] += 1
        finally:
            file.write_bytes(whole[file])

    run()
    print(f"\n{name}: {sum(outcomes.values())} files, {dict(outcomes)}")
    assert outcomes["named"] and outcomes["read"]


def _read(spec: str, folder: Path) -> str:
    error = None
    try:
        dataset = load_dataset(spec)
    except DataError as caught:
        error = str(caught)
        assert "\n" not in error and len(error) < 2000
        assert str(folder) in error
    report = check_source(spec)
    unreadable = [problem for problem in report.problems if "must be a readable image" in problem]
    assert report.unreadable == len(unreadable)
    only_checked = [problem for problem in report.problems if "must not share records" in problem]
    if error is None:
        assert len(report.problems) == len(unreadable) + len(only_checked)
        assert report.records == len(dataset)
    else:
        assert len(report.problems) > len(unreadable) + len(only_checked)
    return "named" if report.problems else "read"
