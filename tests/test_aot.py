"""What the loss costs on devices that are not there, without a compiler: counts, arithmetic, tables, errors.

parity_tests/suite/test_cost.py has what the compilers say.
"""

import io
import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import jax
import pytest
from jax.experimental.pallas import tpu as pltpu
from rich.console import Console
from typer.testing import CliRunner

import lsce_jax
from benchmarks.pages import cost as cost_page
from lsce_cost import hlo, show, ways
from lsce_cost.__main__ import app
from lsce_cost.bundles import count_bundles, schedules
from lsce_cost.compilers import DEVICES_OF_CHIP, SLICES, CompilerEndedError, CompilerProcess, largest_mesh, slice_for
from lsce_cost.cost import CompilerMissingError, Cost, Request, measure
from lsce_cost.devices import CARDS, ENVIRONMENTS, LIMITS, TOPOLOGIES, Limits
from lsce_cost.published import LEAST, MOST, PUBLISHED
from lsce_cost.roofline import roofline
from lsce_spec import LINEAR_IMPLEMENTATIONS
from parity_tests.evidence.pages import replace_block

# --- Counting in the text of a program ------------------------------------------------------------------------------

SLICED = """\
HloModule jit_f

%take (p0: f32[64,128], p1: s32[]) -> f32[8,128] {
  %p0 = f32[64,128]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %part = f32[8,128]{1,0} dynamic-slice(%p0, %p1, %zero), dynamic_slice_sizes={8,128}
  ROOT %neg = f32[8,128]{1,0} negate(%part)
}

%put (q0: f32[64,128], q1: f32[8,128], q2: s32[]) -> f32[64,128] {
  %q0 = f32[64,128]{1,0} parameter(0)
  %q1 = f32[8,128]{1,0} parameter(1)
  %q2 = s32[] parameter(2)
  %zero.1 = s32[] constant(0)
  ROOT %new = f32[64,128]{1,0} dynamic-update-slice(%q0, %q1, %q2, %zero.1)
}

%body (t: (s32[], f32[64,128])) -> (s32[], f32[64,128]) {
  %t = (s32[], f32[64,128]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %a = f32[64,128]{1,0} get-tuple-element(%t), index=1
  %one = s32[] constant(1)
  %next = s32[]{:T(128)S(6)} add(%i, %one)
  %x = f32[8,128]{1,0} fusion(%a, %i), kind=kLoop, calls=%take
  %y = f32[64,128]{1,0} fusion(%a, %x, %i), kind=kLoop, calls=%put
  ROOT %out = (s32[], f32[64,128]{1,0}) tuple(%next, %y)
}

%condition (u: (s32[], f32[64,128])) -> pred[] {
  %u = (s32[], f32[64,128]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%u), index=0
  %end = s32[] constant(8)
  ROOT %less = pred[] compare(%j, %end), direction=LT
}

ENTRY %main (z: f32[64,128]) -> f32[64,128] {
  %z = f32[64,128]{1,0} parameter(0)
  %start = s32[] constant(0)
  %init = (s32[], f32[64,128]{1,0}) tuple(%start, %z)
  %loop = (s32[], f32[64,128]{1,0}) while(%init), condition=%condition, body=%body
  ROOT %res = f32[64,128]{1,0} get-tuple-element(%loop), index=1
}
"""
# Of a slice: read and written, and read and written again; twice the index, and the counter read.
ROUND = 4 * (8 * 128 * 4) + 2 * 4 + 4


def test_a_loop_counts_for_each_round_and_a_slice_for_itself() -> None:
    program = hlo.parse(SLICED)
    assert program.hbm_bytes == 8 * (ROUND + 4)  # and the one that is added
    assert program.bytes_as_xla_counts() == ROUND + 4 + 4  # the counter in the core is written


@pytest.mark.parametrize(
    ("old", "new", "rounds"),
    [
        ("constant(8)", "constant(3)", 3),
        ("%start = s32[] constant(0)", "%start = s32[] constant(6)", 2),
        ("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"5"}}', 5),
        ("%start = s32[] constant(0)", "%start = s32[] constant(9)", 0),
    ],
)
def test_rounds_of_loops(old: str, new: str, rounds: int) -> None:
    assert hlo.parse(SLICED.replace(old, new)).hbm_bytes == rounds * (ROUND + 4)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("direction=LT", "direction=NE"),
        ("%end = s32[] constant(8)", "%end = s32[] get-tuple-element(%u), index=0"),
        ("%one = s32[] constant(1)", "%one = s32[] constant(2)"),
        ("%start = s32[] constant(0)", "%start = s32[] parameter(1)"),
    ],
)
def test_a_loop_of_unknown_length_is_an_error(old: str, new: str) -> None:
    with pytest.raises(hlo.HloError, match="the number of rounds of the loop loop is not known"):
        _ = hlo.parse(SLICED.replace(old, new)).hbm_bytes


def entry(*lines: str) -> hlo.Program:
    return hlo.parse("\n".join(["ENTRY %main (x: f32[]) -> f32[] {", *(f"  {line}" for line in lines), "}"]))


def test_arrays_in_the_core_do_not_count() -> None:
    program = entry(
        "%x = f32[16,128]{1,0} parameter(0)",
        "%copy-start = (f32[16,128]{1,0:S(1)}, f32[16,128]{1,0}, u32[]{:S(2)}) copy-start(%x)",
        "%copy-done = f32[16,128]{1,0:S(1)} copy-done(%copy-start)",
        "ROOT %n = f32[16,128]{1,0} negate(%copy-done)",
    )
    assert program.hbm_bytes == 2 * 16 * 128 * 4
    assert program.bytes_as_xla_counts() == 4 * 16 * 128 * 4


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("bf16[8,1000]{1,0:T(8,128)(2,1)}", 2 * 8 * 1024),
        ("f32[1000,3]{0,1:T(8,128)}", 4 * 1024 * 8),
        ("f32[1000]{0:T(1024)}", 4 * 1024),
        ("f32[]{:T(128)}", 4),
        ("pred[8,100]{1,0}", 800),
        ("f8e4m3fn[16]{0}", 16),
        ("s4[16]{0}", 8),
    ],
)
def test_arrays_are_padded_to_tiles(shape: str, size: int) -> None:
    program = entry(f"%x = {shape} parameter(0)", 'ROOT %y = token[] custom-call(%x), custom_call_target="f"')
    assert program.hbm_bytes == size


PRODUCT = (8, 64, 32)  # rows, contracted, columns


@pytest.mark.parametrize(
    "line",
    [
        "dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}",
        "convolution(%a, %b), dim_labels=bf_io->bf",
        'custom-call(%a, %b), custom_call_target="__cublas$gemm", '
        'backend_config={"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}',
    ],
)
def test_operations_of_a_product(line: str) -> None:
    rows, contracted, columns = PRODUCT
    program = entry(
        f"%a = bf16[{rows},{contracted}]{{1,0}} parameter(0)",
        f"%b = bf16[{contracted},{columns}]{{1,0}} parameter(1)",
        f"ROOT %c = f32[{rows},{columns}]{{1,0}} {line}",
    )
    assert program.matrix_operations == {"bfloat16": 2 * rows * contracted * columns}


def test_products_in_fusions_and_loops_count() -> None:
    text = SLICED.replace(
        "ROOT %neg = f32[8,128]{1,0} negate(%part)",
        "ROOT %neg = f32[8,128]{1,0} dot(%part, %p0), lhs_contracting_dims={1}, rhs_contracting_dims={1}",
    )
    assert hlo.parse(text).matrix_operations == {"float32": 8 * 2 * 8 * 128 * 128}


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", 4),
        ("replica_groups=[2,8]<=[16]", 8),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_1'}", 2),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0','axis_1'}", 8),
        ("replica_groups=mesh['axis_0'=8] {'axis_0':(1)4}", 4),
    ],
)
def test_what_a_device_sends(groups: str, size: int) -> None:
    program = entry(
        "%x = f32[256]{0} parameter(0)",
        f"%all-reduce-start = f32[256]{{0}} all-reduce-start(%x), channel_id=1, {groups}, to_apply=%add",
        "%all-reduce-done = f32[256]{0} all-reduce-done(%all-reduce-start)",
        f"ROOT %all-gather = f32[{256 * size}]{{0}} all-gather(%all-reduce-done), dimensions={{0}}, {groups}",
    )
    share = (size - 1) / size
    assert program.collectives == (
        hlo.Collective("all-reduce", 1, 1024, 2 * share * 1024),
        hlo.Collective("all-gather", 1, 1024 * size, share * 1024 * size),
    )


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ("replica_groups={{0,2},{1,3}}", [(0, 2), (1, 3)]),
        ("replica_groups=[2,2]<=[4]", [(0, 1), (2, 3)]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [(0, 2), (1, 3)]),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}", [(0, 1), (2, 3)]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", [(0, 1, 2, 3)]),
        ("replica_groups=mesh['a'=2,'b'=3], device_ids=([3,2]T(1,0)) {'b'}", [(0, 2, 4), (1, 3, 5)]),
        ("replica_groups=mesh['a'=8] {'a':(2)2}", [(0, 2), (1, 3), (4, 6), (5, 7)]),
        ("replica_groups=mesh['a'=4] {'a':(1)2}", [(0, 2), (1, 3)]),
        ("replica_groups=mesh['a'=8] {'a':(1)2,'a':(4)2}", [(0, 1, 4, 5), (2, 3, 6, 7)]),
        ("source_target_pairs={{0,1},{1,0}}", [(0, 1), (1, 0)]),
    ],
)
def test_which_devices_exchange(groups: str, expected: list[tuple[int, ...]]) -> None:
    program = entry(
        "%x = f32[256]{0} parameter(0)", f"ROOT %y = f32[256]{{0}} all-reduce(%x), channel_id=1, {groups}, a=b"
    )
    (found,) = program.transfers
    assert sorted(tuple(sorted(group)) for group in found.groups) == sorted(tuple(sorted(group)) for group in expected)


def test_a_sum_of_which_each_device_keeps_a_part() -> None:
    """As TPUs have it: a fusion with the name of what it does."""
    text = """\
%all-reduce-scatter.1 (p: f32[64]) -> f32[16] {
  %p = f32[64]{0} parameter(0)
  %sum = f32[64]{0} all-reduce(%p), replica_groups={{0,1,2,3}}, to_apply=%add
  %i = s32[] constant(0)
  ROOT %part = f32[16]{0} dynamic-slice(%sum, %i), dynamic_slice_sizes={16}
}

ENTRY %main (x: f32[64]) -> f32[16] {
  %x = f32[64]{0} parameter(0)
  ROOT %y = f32[16]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
}
"""
    assert hlo.parse(text).collectives == (hlo.Collective("reduce-scatter", 1, 256, 0.75 * 256),)


def test_what_pads_an_array_is_no_data() -> None:
    program = entry("%x = f32[1000]{0:T(1024)} parameter(0)", "ROOT %y = f32[1000]{0:T(1024)} negate(%x)")
    assert (program.kernels[0].instruction.arrays[0].data_bytes, program.hbm_bytes) == (4000, 2 * 4096)


def test_unknown_groups_are_an_error() -> None:
    program = entry("%x = f32[256]{0} parameter(0)", "ROOT %y = f32[256]{0} all-reduce(%x), replica_groups=other")
    with pytest.raises(hlo.HloError, match="groups in a form that is not known"):
        _ = program.collectives


def test_a_text_without_a_program() -> None:
    with pytest.raises(hlo.HloError, match="no entry"):
        hlo.parse("HloModule nothing")


def test_a_program_of_jax_for_this_cpu() -> None:
    """Reads and writes are those of the operation, on an optimized program as XLA writes it here."""
    described = jax.ShapeDtypeStruct((256, 1024), "float32")
    compiled = jax.jit(lambda x, y: x * y + 1).lower(described, described).compile()
    assert hlo.parse(compiled.as_text()).hbm_bytes == 3 * 4 * 256 * 1024


# --- Bundles --------------------------------------------------------------------------------------------------------

# As libtpu writes it: three bundles outside of loops, three in a loop of 10 rounds, which has two loops within.
SCHEDULE = """\
// some words { about it }
     0   :  { %1 = vlaneseq }
   0x1 LB: > { %2 = vlaneseq ;; %3 = sld [smem:0] }
   0x2   :  { %4 = vlaneseq }
   0x3 LB: > > { %4 = vlaneseq }
   0x4   : > > { %5 = scmp.ge.s32.totalorder %4, 3 /* loop exit test */ } /* End region 2 */
   0x5 LB: > > { %6 = scmp.ge.s32.totalorder %4, 5 /* loop exit test */ } /* End region 3 */
   0x6   : > { %7 = scmp.ge.s32.totalorder %3, 10 /* loop exit test */ } /* End region 1 */
   0x7   : > > { %4 = vlaneseq }
   0x8   :  {} /* End region 0 */
"""


def test_bundles_of_loops_count_for_each_round(tmp_path) -> None:
    path = tmp_path / "fusion-final_bundles.txt"
    path.write_text(SCHEDULE, encoding="utf-8")
    assert count_bundles(path) == 3 + 10 * (3 + 3 * 2 + 5 * 1)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (", 3 /* loop exit test */", "", "a loop whose number of rounds is not known"),
        ("%2 = vlaneseq", "%5 = scmp.ge.s32.totalorder %4, 3 /* loop exit test */", "a loop with two exit tests"),
        ("0x1 LB: >", "0x1   : >", "a loop without a beginning"),
        (" { ", " ", "has no bundles"),
    ],
)
def test_a_schedule_of_another_form_is_an_error(old: str, new: str, message: str, tmp_path) -> None:
    path = tmp_path / "fusion-final_bundles.txt"
    path.write_text(SCHEDULE.replace("{}", "").replace(old, new), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        count_bundles(path)


def test_schedules_are_those_of_kernels(tmp_path) -> None:
    names = (
        "17-fusion.5-01-final_bundles.txt",
        "17-fusion.5-00-schedule-analysis_final_bundles.txt",
        "17-<late-initialization>-01-final_bundles.txt",
        "17-TLP-01-final_bundles.txt",
        "17-TLP-hlo.txt",
    )
    assert [name for name, _ in schedules(tmp_path / name for name in names)] == ["fusion.5"]


# --- The least time -------------------------------------------------------------------------------------------------

SIMPLE = Limits("chip", 2**34, 1e9, {"bfloat16": 1e12, "float32": 5e11}, 2e8, 1e6, "a page", "2026-11-26")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"hbm_bytes": 3e9, "matrix": {}}, (3.0, "memory", 3.0, 0, None, 0.0)),
        ({"hbm_bytes": 1e9, "matrix": {"bfloat16": 1e12, "float32": 1e12}}, (3.0, "matrix", 1.0, 3.0, None, 0.0)),
        ({"hbm_bytes": 1e9, "matrix": {}, "bundles": 2_000_000}, (2.0, "bundles", 1.0, 0, 2.0, 0.0)),
        ({"hbm_bytes": 1e9, "matrix": {}, "sent_bytes": 1e8}, (1.5, "memory", 1.0, 0, None, 0.5)),
    ],
)
def test_roofline(given, expected) -> None:
    assert tuple(roofline(SIMPLE, **given)) == expected


def test_without_a_clock_bundles_have_no_time() -> None:
    assert roofline(replace(SIMPLE, clock=None), 1e9, {}, bundles=10**9).bundles is None
    with pytest.raises(KeyError, match="float64"):
        roofline(SIMPLE, 1e9, {"float64": 1.0})


def test_every_device_has_limits_and_a_compiler() -> None:
    assert set(LIMITS) == {*TOPOLOGIES, *CARDS}
    assert set(SLICES) == set(TOPOLOGIES)
    assert {name.partition("-")[0] for name in LIMITS} == set(ENVIRONMENTS)


CHIPS = {"tpu-v4": "TPU_V4", "tpu-v5e": "TPU_V5E", "tpu-v5p": "TPU_V5P", "tpu-v6e": "TPU_V6E", "tpu-v7x": "TPU_7X"}


@pytest.mark.parametrize("target", TOPOLOGIES)
def test_limits_are_those_that_jax_has(target: str) -> None:
    """JAX rounds to three digits. Of a v5p it has less bandwidth than Google publishes."""
    cores = 2 if target == "tpu-v5p" else 1
    ours, theirs = LIMITS[target], pltpu.get_tpu_info_for_chip(pltpu.ChipVersion[CHIPS[target]], cores)
    assert ours.matrix["bfloat16"] == pytest.approx(theirs.bf16_ops_per_second * cores, rel=0.01)
    assert ours.memory == pytest.approx(theirs.hbm_capacity_bytes * cores, rel=0.01)
    bandwidth = 2460e9 if target == "tpu-v5p" else ours.bandwidth
    assert bandwidth == pytest.approx(theirs.mem_bw_bytes_per_second * cores, rel=0.03)


# --- What is asked for ----------------------------------------------------------------------------------------------

DENSE = ["--rows", "8192", "--classes", "32768"]


def run(*arguments: str, columns: int = 200):
    return CliRunner().invoke(app, arguments, env={"COLUMNS": str(columns)})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "tpu-v9"], "there is no target 'tpu-v9'; the targets are tpu-v4, tpu-v5e, "),
        (["--target", "tpu-v6e", "--mesh", "4by4"], "--mesh must be two numbers like 4x4, rows first, but"),
        (["--target", "tpu-v6e", "--mesh", "0x4"], "--mesh 0x4 must have from 1 to 256 devices on tpu-v6e"),
        (["--target", "tpu-v6e", "--mesh", "32x16"], "--mesh 32x16 must have from 1 to 256 devices on tpu-v6e"),
        (["--target", "gpu-h100", "--mesh", "4x4"], "--mesh 4x4 must have from 1 to 8 devices on gpu-h100"),
        (["--target", "tpu-v6e", "--mesh", "3x1"], "8192 rows cannot be divided over 3 devices: --rows must be"),
        (["--target", "tpu-v6e", "--mesh", "1x3"], "32768 classes cannot be divided over 3 devices: --classes must be"),
        (["--target", "tpu-v6e", "--classes", "3000000000"], "--classes must be from 1 to 2147483647, the"),
        (["--target", "tpu-v6e", "--rows", "0"], "--rows must be from 1 to 2147483647"),
        (["--target", "tpu-v6e", "--features", "0"], "--features must be from 1 to 2147483647"),
        (["--target", "tpu-v6e", "--dtype", "float64"], "tpu-v6e has no dtype 'float64'; its dtypes are"),
        (["--target", "gpu-h100", "--dtype", "int8"], "gpu-h100 has no dtype 'int8'"),
        (["--target", "tpu-v6e", "--chunks", "512"], "--chunks needs --features"),
        (["--target", "tpu-v6e", "--features", "64", "--chunks", "many"], "--chunks must be numbers like 512,1024"),
        (["--target", "tpu-v6e", "--features", "64", "--chunks", "0"], "--chunks must be at least 1, but is 0"),
        (["--target", "tpu-v6e", "--way", "linear"], "no way is called 'linear'; the ways are: Optax one-hot"),
        (["--target", "tpu-v6e", "--way", "lsce linear*"], "the linear ones need --features"),
    ],
)  # fmt: skip
def test_errors_of_the_command_line(arguments: list[str], message: str) -> None:
    result = run(*DENSE, *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("cannot run: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("target", "module", "message"),
    [
        ("tpu-v6e", "libtpu", "libtpu, which has the compiler, is missing. Run on Linux: pip install -e '.[cost]'"),
        ("gpu-h100", "jax_plugins", "is missing. Run: pip install --no-deps jax-cuda12-plugin=="),
    ],
)  # fmt: skip
def test_without_the_compiler(target: str, module: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for loaded in [name for name in sys.modules if name.startswith(f"{module}.")]:
        monkeypatch.setitem(sys.modules, loaded, None)
    monkeypatch.setitem(sys.modules, module, None)
    result = run(*DENSE, "--target", target)
    assert result.exit_code == 2
    assert message in result.stderr
    with pytest.raises(CompilerMissingError, match=re.escape(message)):
        measure(Request(target, 8, 8), "lsce fused")


def test_without_what_shows_the_table() -> None:
    hide = "import sys; sys.modules['typer'] = None; import lsce_cost, lsce_cost.__main__"
    outcome = subprocess.run([sys.executable, "-c", hide], capture_output=True, text=True, check=False)
    assert outcome.returncode == 2
    assert outcome.stderr == (
        "cannot run: lsce-cost needs typer, which is not installed. Run: pip install -e '.[cost]'.\n"
    )


def test_an_unknown_way() -> None:
    with pytest.raises(ValueError, match="there is no way 'lsce magic' here; the ways are Optax one-hot, smoothed; "):
        measure(Request("tpu-v6e", 8, 8), "lsce magic")


def test_every_implementation_is_a_way() -> None:
    assert "fused" in ways.implementations()
    assert "reference" in ways.implementations()
    for name in ways.implementations():
        logits = jax.ShapeDtypeStruct((8, 128), "float32")
        labels = jax.ShapeDtypeStruct((8,), "int32")
        if name in {"fused", "reference"}:  # a kernel may refuse this platform
            assert jax.eval_shape(ways.of_logits("float32")[f"lsce {name}"], logits, labels, 0.1).shape == ()
    with pytest.raises(ValueError, match="'fused'"):
        lsce_jax.label_smoothed_cross_entropy(jax.numpy.ones((2, 3)), jax.numpy.array([0, 1]), implementation="magic")
    named = Request("tpu-v6e", 8192, 32768, 2048).ways
    assert {f"lsce linear {name}" for name in LINEAR_IMPLEMENTATIONS if name != "chunked"} <= set(named)


def test_chunks_of_a_layer() -> None:
    def chunked(**options) -> list[str]:
        return [name for name in Request("tpu-v6e", **options).ways if name.endswith("at a time")]

    layer = {"classes": 32768, "features": 2048}
    assert chunked(rows=8192, **layer) == [f"lsce linear, {n} rows at a time" for n in (256, 1024, 4096)]
    assert chunked(rows=512, **layer) == [f"lsce linear, {n} rows at a time" for n in (256, 512)]
    assert chunked(rows=8192, **layer, chunks=(100,)) == ["lsce linear, 100 rows at a time"]


def test_a_process_has_its_own_environment_and_starts_again() -> None:
    process = CompilerProcess({"LSCE_ONLY_THERE": "1"})
    assert process.call(os.getenv, "LSCE_ONLY_THERE") == "1"
    assert "LSCE_ONLY_THERE" not in os.environ
    assert process.call(os.getpid) == process.call(os.getpid) != os.getpid()
    with pytest.raises(CompilerEndedError, match="the process of the compiler ended"):
        process.call(os._exit, 1)
    assert process.call(os.getenv, "LSCE_ONLY_THERE") == "1"


def test_slices() -> None:
    assert [slice_for("tpu-v6e", count) for count in (2, 4, 5, 16, 256)] == ["2x2", "2x2", "2x4", "4x4", "16x16"]
    assert slice_for("tpu-v7x", 16) == "2x2x2"  # two devices are one chip
    assert slice_for("tpu-v5p", 16) == "2x2x4"
    assert slice_for("gpu-b200", 8) == "1x1x8"
    assert largest_mesh("tpu-v4") == 1024
    assert DEVICES_OF_CHIP.keys() <= TOPOLOGIES.keys()


# --- What is shown --------------------------------------------------------------------------------------------------


def made_up(target: str = "tpu-v6e", mesh: tuple[int, int] | None = None) -> tuple[Request, list[Cost]]:
    request = Request(target, 8192, 131072, 2048, mesh=mesh)
    costs = []
    for i, name in enumerate(request.ways):
        matrix = {"bfloat16": 10**13}
        sent = (hlo.Collective("all-reduce", 2, 10**8, 1.5e8),) if mesh else ()
        least = roofline(LIMITS[target], (i + 1) * 10**9, matrix, 9_430_000, 1.5e8 if mesh else 0.0)
        costs.append(
            Cost(
                name, compiles=True, fits=i != 2, argument_bytes=10**9, output_bytes=167_772_704,
                temp_bytes=1_073_970_976, hbm_bytes=(i + 1) * 10**9, xla_bytes=1e9, matrix_operations=matrix,
                bundles=9_430_000, kernels_without_bundles=i == 1, collectives=sent,
                roofline_seconds=least.seconds, roofline=least, compile_seconds=1.0,
            )
        )  # fmt: skip
    costs[0] = Cost(costs[0].name, compiles=False, reason="out of memory: needs 20G of 15.75G HBM", fits=False)
    return request, costs


@pytest.mark.parametrize("width", [80, 112, 120])
@pytest.mark.parametrize("mesh", [None, (4, 4)])
def test_the_table_has_every_way(width: int, mesh: tuple[int, int] | None) -> None:
    request, costs = made_up(mesh=mesh)
    output = io.StringIO()
    console = Console(file=output, width=width)
    console.print(show.cost_table(request, costs, width))
    text = output.getvalue()
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    assert re.search(r" no +–( +–)+ *$", text, re.MULTILINE)
    assert re.search(r" yes, no +1\.07 GB +168 MB +3\.00 GB ", text)
    assert "≥ 9.43" in text
    assert ("150 MB" in text) == (mesh is not None)
    assert all(cost.name.split()[-1] in text for cost in costs)
    if width > 80:
        assert all(cost.name in text for cost in costs)


def test_notes_say_what_an_estimate_is() -> None:
    request, costs = made_up(mesh=(4, 4))
    text = " ".join(show.notes(request, costs, (LEAST, MOST)))
    assert "The estimate is no measurement." in text
    assert f"were {LEAST:g} to {MOST:g} times as long" in text
    assert "one chip: 32 GiB, 1638 GB/s, 918 TFLOP/s in bfloat16, links 400 GB/s, 1.75 GHz (derived)" in text
    assert "Optax one-hot, smoothed does not compile: out of memory: needs 20G of 15.75G HBM" in text
    assert f"jax {jax.__version__}" in text
    assert "Operations between devices: 2 all-reduce of 100 MB (Optax integer, unsmoothed; Optax integer, cast" in text
    assert "the longest of memory, matrix products and bundles, and the links after it." in text
    assert "the longest of memory and matrix products." in " ".join(show.notes(*made_up("gpu-h100"), (LEAST, MOST)))


def test_json() -> None:
    request, costs = made_up(mesh=(4, 4))
    content = json.loads(json.dumps(show.as_json(request, costs)))
    assert content["request"]["mesh"] == [4, 4]
    assert content["limits"]["bandwidth"] == LIMITS["tpu-v6e"].bandwidth
    assert "no measurement" in content["is_estimate"]
    assert [way["name"] for way in content["ways"]] == list(request.ways)
    for way, cost in zip(content["ways"], costs, strict=True):
        needed = ("name", "compiles", "temp_bytes", "output_bytes", "hbm_bytes", "roofline_seconds")
        assert [way[name] for name in needed] == [getattr(cost, name) for name in needed]
    assert content["ways"][1]["collectives"] == [{"kind": "all-reduce", "count": 2, "bytes": 10**8, "sent": 1.5e8}]
    assert content["ways"][1]["roofline"]["bound"] == "matrix"


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plot(suffix: str, tmp_path) -> None:
    request, costs = made_up()
    figure = show.draw(request, costs)
    times, memory = figure.axes
    assert [label.get_text() for label in times.get_yticklabels()] == [cost.name for cost in costs[:0:-1]]
    assert "estimate, not measured" in times.get_xlabel()
    assert memory.get_xlabel() == "memory of one device, GB"
    figure.savefig(tmp_path / f"costs.{suffix}")
    assert (tmp_path / f"costs.{suffix}").stat().st_size > 10_000


def test_a_plot_of_nothing(tmp_path) -> None:
    request, costs = made_up()
    show.draw(request, costs[:1]).savefig(tmp_path / "costs.png")


# --- The page -------------------------------------------------------------------------------------------------------


def test_the_page_is_what_the_record_gives() -> None:
    page = (cost_page.DOCS / "cost.md").read_text(encoding="utf-8")
    record = json.loads((cost_page.DOCS / "cost.json").read_text(encoding="utf-8"))
    blocks = cost_page.page_blocks(record)
    assert len(blocks) == 3
    for block, text in blocks.items():
        assert replace_block(page, f"benchmarks {block}", text) == page, "run: python -m benchmarks cost --write"
    # What every table says of the error of estimates is what the page shows.
    of_xla = [float(row[-2]) for row, each in zip(record["published"], PUBLISHED, strict=True) if each.of_xla]
    assert (round(min(of_xla), 1), round(max(of_xla), 1)) == (LEAST, MOST)
