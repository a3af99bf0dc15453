"""How many cores a process may use."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cnnrnn.machine import devices


def groups(root: Path, text: str) -> None:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(text)


def limit(root: Path, folder: str, **files: str) -> None:
    place = root / "sys/fs/cgroup" / folder
    place.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (place / name.replace("_", ".", 1)).write_text(text)


def test_limits_of_version_2(tmp_path: Path) -> None:
    groups(tmp_path, "0::/user.slice/job\n")
    limit(tmp_path, "user.slice/job", cpu_max="max 100000\n")
    assert devices.cgroup_cores(tmp_path) is None
    limit(tmp_path, "user.slice", cpu_max="150000 100000\n")  # the one above counts too
    assert devices.cgroup_cores(tmp_path) == 1.5


def test_limits_of_a_container_that_sees_the_path_outside(tmp_path: Path) -> None:
    groups(tmp_path, "0::/docker/0123\n")
    limit(tmp_path, "", cpu_max="50000 100000\n")
    assert devices.cgroup_cores(tmp_path) == 0.5


def test_limits_of_version_1(tmp_path: Path) -> None:
    groups(tmp_path, "4:memory:/a\n3:cpu,cpuacct:/a/b\n0::/\n")
    limit(tmp_path, "cpu/a/b", cpu_cfs_quota_us="-1\n", cpu_cfs_period_us="100000\n")
    assert devices.cgroup_cores(tmp_path) is None
    limit(tmp_path, "cpu/a/b", cpu_cfs_quota_us="300000\n", cpu_cfs_period_us="100000\n")
    assert devices.cgroup_cores(tmp_path) == 3


def test_without_groups(tmp_path: Path) -> None:
    assert devices.cgroup_cores(tmp_path) is None


@pytest.mark.parametrize(("limit", "cores"), [(None, 8), (0.2, 1), (1.5, 2), (100.0, 8)])
def test_cores_and_threads(monkeypatch: pytest.MonkeyPatch, limit: float, cores: int) -> None:
    monkeypatch.setattr(devices.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(devices, "cgroup_cores", lambda: limit)
    assert devices.usable_cores() == cores
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        devices.use_usable_cores()
        assert torch.get_num_threads() == min(4, cores)
    finally:
        torch.set_num_threads(before)
