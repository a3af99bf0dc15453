"""What the CUDA kernels take of a multiprocessor, as the compiler reports it."""

from __future__ import annotations

import shutil

import pytest

from tests.kernels.reports import report

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")


def test_kernels_neither_spill_nor_leave_too_few_registers(tmp_path):
    kernels = {
        kernel.name: kernel
        for source in report.SOURCES
        for kernel in report.compile_for(90, source, tmp_path / f"{source.stem}.cubin")
    }
    for precision in ("Exact", "Fast"):
        for beam in ("4", "16"):
            for panels in ("resident", "streamed"):
                assert f"search_warps<{precision}, {beam}, {panels}>" in kernels
        assert f"search_warps<{precision}, 32, streamed>" in kernels  # banks
    assert {"multiply_rows", "step_cells"} <= set(kernels)
    for kernel in kernels.values():
        assert report.within_bounds(kernel, 90), kernel
        assert kernel.stack == 0 and kernel.spills == 0, kernel


def test_spills_and_stack_frames_are_seen(tmp_path):
    source = tmp_path / "wasteful.cu"
    source.write_text(
        """
        __global__ void __launch_bounds__(1024, 2) wasteful(const float* in, float* out, int n) {
          float kept[64];
          for (int i = 0; i < 64; ++i) kept[i] = in[i * n + threadIdx.x];
          for (int i = 0; i < 64; ++i) out[i] = kept[(i * n) % 64] + kept[i];
        }
        """
    )
    (kernel,) = report.compile_for(90, source, tmp_path / "wasteful.cubin")
    assert kernel.stack >= 256 and not report.within_bounds(kernel, 90)
    wide = report.Kernel("search_warps<Fast, 4, resident>", 129, 0, 0, 0)
    assert not report.within_bounds(wide, 90)
