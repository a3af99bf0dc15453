"""The CUDA kernels as nvcc compiles them: their PTX, executed on the CPU."""

from __future__ import annotations

import ctypes
import dataclasses
import platform
import shutil
from functools import partial

import numpy as np
import pytest
import torch

from cnnrnn.config import SearchConfig
from tests.kernels.ptx import on_ptx
from tests.kernels.ptx.on_ptx import PtxSearch, emulated, ptx
from tests.search.replay import (
    assert_search_equal,
    random_banked_case,
    random_case,
    random_embedding,
    random_head,
)

pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64")
    or emulated.compiler() is None
    or any(shutil.which(tool) is None for tool in ("nvcc", "nm", "c++filt")),
    reason="needs nvcc, a C++ compiler, nm, c++filt and x86-64",
)

LABEL_COUNTS = (1, 2, 31, 32, 80, 100, 200)
JOINT_DIMS = (3, 16, 64, 64)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> PtxSearch:
    folder = tmp_path_factory.mktemp("ptx")
    return PtxSearch(emulated.build(folder), folder)


@pytest.fixture(autouse=True)
def _defaults(compiled: PtxSearch) -> None:
    compiled.emulator.set_lane_order(0, 0)
    compiled.emulator.set_max_shared_memory(227 * 1024)


def pack(compiled: PtxSearch) -> partial[emulated.EmulatedHead]:
    return partial(emulated.EmulatedHead, compiled.emulator)


def arguments(embedding, config: SearchConfig, T: int, marginals: bool) -> tuple[object, ...]:
    return (embedding.joint, embedding.label_logits, config.beam_size, T,
            min(config.min_labels, T), config.order, config.end_takes_slot, config.stop,
            marginals)  # fmt: skip


def test_random_searches_equal_the_float64_reference(compiled, request):
    excused = searched = 0
    for seed in range(request.config.getoption("--searches") // 60):
        head, embedding, config = random_case(seed, LABEL_COUNTS, JOINT_DIMS)
        with compiled:
            excused += assert_search_equal(
                head, embedding, config, marginals=seed % 4 == 0, pack=pack(compiled)
            )
        searched += len(embedding)
    print(f"{searched} images, {excused} excused")
    assert excused <= max(1, searched // 40)
    assert {"search_warps<cnnrnn::ExactScores, 4, true>", "multiply_rows", "step_cells"} <= {
        name.split("::", 2)[-1].split("(")[0] if "search" not in name
        else name[name.index("search_warps") : name.index(">") + 1]
        for name in compiled.counts
    }  # fmt: skip


def test_random_searches_with_evidence_equal_the_float64_reference(compiled, request):
    excused = searched = 0
    for seed in range(request.config.getoption("--searches") // 120):
        case = random_banked_case(seed, LABEL_COUNTS, JOINT_DIMS, seed % 2 == 0)
        head, embedding, config, evidence = case
        with compiled:
            excused += assert_search_equal(
                head, embedding, config,
                marginals=seed % 2 == 0, pack=pack(compiled), evidence=evidence,
            )  # fmt: skip
        searched += len(embedding)
    print(f"{searched} images, {excused} excused")
    assert excused <= max(1, searched // 40)
    assert any("ExactScores, 32, false>" in name for name in compiled.counts)


def test_fast_searches_equal_those_of_the_sources_on_the_cpu(compiled):
    # Halves are multiplied and added by the instruction itself, in whichever order: some last bits.
    differ = searched = 0
    for seed in range(8):
        head, embedding, config = random_case(seed, (81, 200), (16, 64, 64, 100))
        T = min(config.max_labels, head.num_labels) if config.order != "free" else 4
        config = dataclasses.replace(config, max_labels=T, min_labels=min(config.min_labels, T))
        options = arguments(embedding, config, T, seed % 3 == 0)
        expected = pack(compiled)(head).beam_search(*options, precision="fast")
        with compiled:
            found = pack(compiled)(head).beam_search(*options, precision="fast")
        same = (found[0] == expected[0]).flatten(1).all(1)
        differ += int((~same).sum())
        searched += len(same)
        close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4, equal_nan=True)
        close(found[2][same], expected[2][same])
        if found[3] is not None:
            close(found[3][same], expected[3][same])
    print(f"{differ} of {searched} images differ")
    assert differ <= max(1, searched // 50)


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("order", ["increasing", "unique", "free"])
def test_label_logits_over_several_chunks(compiled, precision, order):
    # Paths of a tile begin in different panels of their labels, whose logits are shifted there.
    head = random_head(torch.Generator().manual_seed(7), 130, joint_dim=64, hidden_dim=6)
    embedding = random_embedding(torch.Generator().manual_seed(8), head, 6, label_logits=True)
    options = arguments(embedding, SearchConfig(beam_size=4, order=order), 3, order != "increasing")
    expected = pack(compiled)(head).beam_search(*options, precision=precision)
    with compiled:
        found = pack(compiled)(head).beam_search(*options, precision=precision)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[2], expected[2], rtol=1e-4, atol=1e-4)
    if found[3] is not None:
        torch.testing.assert_close(found[3], expected[3], rtol=1e-4, atol=1e-4)


def test_a_captured_search(compiled):
    generator = torch.Generator().manual_seed(5)
    head = random_head(generator, 60, joint_dim=16, hidden_dim=8)
    embedding = random_embedding(generator, head, 5, label_logits=True)
    options = arguments(embedding, SearchConfig(beam_size=5, order="free"), 3, True)
    expected = pack(compiled)(head).beam_search(*options)
    with compiled:
        found = pack(compiled)(head).beam_search(*options, captured=True)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[2], expected[2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[3], expected[3], rtol=1e-5, atol=1e-5)


KERNEL = """
.version 9.0
.target sm_90
.address_size 64
.visible .entry both(
  .param .u64 both_param_0
)
{{
  .reg .pred %p<3>;
  .reg .b32 %r<9>;
  .reg .b64 %rd<4>;
  ld.param.u64 %rd1, [both_param_0];
  mov.u32 %r1, %tid.x;
  mul.wide.u32 %rd2, %r1, 4;
  add.s64 %rd3, %rd1, %rd2;
  setp.lt.u32 %p1, %r1, 8;
  mov.u32 %r2, 100;
  @%p1 bra $L__few;
  add.s32 %r2, %r2, %r1;
  bra.uni $L__all;
$L__few:
  sub.s32 %r2, %r2, %r1;
  {few}
$L__all:
  shfl.sync.bfly.b32 %r3|%p2, %r2, 1, 31, -1;
  st.global.u32 [%rd3], %r3;
  ret;
}}
"""


def run_both(few: str) -> tuple[list[int], list[int], ptx.Kernel]:
    kernel = ptx.parse(KERNEL.format(few=few))["both"]
    out = np.zeros(64, np.uint32)
    counts = kernel.run([ctypes.c_uint64(out.ctypes.data)], 1, 64, 0)
    return out.tolist(), counts.tolist(), kernel


def test_lanes_that_part_meet_again():
    out, counts, kernel = run_both("")
    values = [100 - i if i < 8 else 100 + i for i in range(64)]
    assert out == [values[i ^ 1] for i in range(64)]
    # Of two warps one has lanes on both sides.
    texts = [line.text.split()[0] for line in kernel.lines]
    assert counts[texts.index("sub.s32")] == 1
    assert counts[texts.index("add.s32")] == 2 == counts[texts.index("shfl.sync.bfly.b32")]


def test_what_cannot_be_right_is_refused():
    with pytest.raises(RuntimeError, match=r"wait for each other: \['bar.warp.sync -1', 'shfl"):
        run_both("bar.warp.sync -1;")
    with pytest.raises(RuntimeError, match="not aligned"):
        run_both("add.s64 %rd3, %rd3, 2;")
    with pytest.raises(NotImplementedError, match="both: tex.1d"):
        run_both("tex.1d.v4.f32.s32 %r5, %r6, %r7;")
    with pytest.raises(RuntimeError, match="outside of its memory"):
        run_both("ld.shared.u32 %r4, [%rd3];")


RACE = """
.version 9.0
.target sm_90
.address_size 64
.extern .shared .align 16 .b8 dynamic_sharedE[];
.entry race(
  .param .u64 race_param_0
)
{{
  .reg .b32 %r<9>;
  .reg .b64 %rd<5>;
  ld.param.u64 %rd1, [race_param_0];
  mov.u32 %r1, %tid.x;
  mov.u32 %r2, dynamic_sharedE;
  shl.b32 %r3, %r1, 2;
  add.s32 %r4, %r2, %r3;
  xor.b32 %r5, %r4, {other};
  st.shared.u32 [%r4], %r1;
  {between}
  ld.shared.u32 %r6, [%r5];
  {after}
  st.shared.u32 [%r4], %r6;
  mul.wide.u32 %rd2, %r1, 4;
  add.s64 %rd3, %rd1, %rd2;
  st.global.u32 [%rd3], %r6;
  ret;
}}
"""


@pytest.mark.parametrize(
    ("other", "between", "after", "said"),
    [
        (4, "bar.warp.sync -1;", "bar.warp.sync -1;", None),
        (0, "", "", None),  # everyone's own
        (4, "", "bar.warp.sync -1;", "reads shared memory that another has written"),
        (4, "shfl.sync.bfly.b32 %r7, %r1, 1, 31, -1;", "bar.warp.sync -1;",
         "reads shared memory that another has written"),
        (4, "bar.warp.sync -1;", "", "writes shared memory that another has read"),
        (128, "bar.warp.sync -1;", "bar.sync 0;", "writes shared memory that another has read"),
        (128, "bar.sync 0;", "bar.sync 0;", None),
    ],
)  # fmt: skip
def test_races_on_shared_memory_are_seen(other, between, after, said):
    kernel = ptx.parse(RACE.format(other=other, between=between, after=after))["race"]
    out = np.zeros(64, np.uint32)
    arguments = [ctypes.c_uint64(out.ctypes.data)]
    if said is None:
        kernel.run(arguments, 1, 64, 256)
        assert out.tolist() == [i ^ other // 4 for i in range(64)]
    else:
        with pytest.raises(RuntimeError, match=said):
            kernel.run(arguments, 1, 64, 256)


def test_counts_are_told_by_function(compiled):
    head = random_head(torch.Generator().manual_seed(0), 80, joint_dim=64, hidden_dim=16)
    embedding = random_embedding(torch.Generator().manual_seed(1), head, 8, label_logits=False)
    config = SearchConfig(beam_size=4, max_labels=3)
    known = pack(compiled)(head)
    known.beam_search(*arguments(embedding, config, 3, False))
    compiled.counts.clear()
    with compiled:
        known.beam_search(*arguments(embedding, config, 3, False), precision="fast")
    (name,) = compiled.counts  # every state is there
    assert "search_warps<cnnrnn::FastScores, 4, true>" in name
    functions = on_ptx.by_function(compiled.counts[name])
    # 3 steps of 3 panels, 16 products each, for two warps of four images, and moves.
    assert functions["mma_m16n8k16"] >= 2 * 3 * 3 * 16
    assert {"add_panel", "pass_labels", "choose_continuations", "take_step"} <= set(functions)
