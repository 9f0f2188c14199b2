"""Every kernel of the pipeline compiles for each architecture, within the chip's shared memory and without spills.

No GPU is needed: `compile_pipeline.py` asks Triton and ptxas. It runs in a process of its own, as the kernels of this
one may be bound to the interpreter.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from compile_pipeline import TOKEN_COUNTS

from hybrid_moe.kernels.grouped_gemm.tiles import tile_plan
from hybrid_moe.measure.workloads import MODELS
from hybrid_moe.problem import MoEProblem

TESTS = Path(__file__).parent
# What a block can have: 227 KiB on sm_90 and sm_100, 99 KiB on sm_89 and sm_120.
SHARED_MEMORY = {89: 101376, 90: 232448, 100: 232448, 120: 101376}
# Spilled registers go through memory: a tile that needs more is too large. On Hopper those of many rows for inputs that
# TMA can't read, which compute addresses, keep up to 88 bytes.
SPILL_BYTES = {89: 0, 90: 88, 100: 0, 120: 0}
# The GEMMs for many rows fill the registers. A few are kept in memory: by Triton 3.6 outside of the loops, by 3.9 in
# them too.
MANY = {"hopper_gemm1_kernel", "hopper_gemm2_kernel"}
MANY_SPILL_BYTES = {"3.6.0": 0}
KERNELS = {
    "clear_kernel",
    "route_kernel",
    "scatter_kernel",
    "gemm1_swiglu_kernel",
    "gemm2_kernel",
    "combine_kernel",
    "weigh_kernel",
    "gather_kernel",
    "swiglu_quantize_kernel",
    "quantize_rows_kernel",
    "select_kernel",
    "renumber_kernel",
    "dequantize_kernel",
    "inner_kernel",
    "output_kernel",
}
SPECIALIZED = {
    "hopper_few_gemm1_kernel",
    "hopper_few_gemm2_kernel",
    "hopper_gemm1_kernel",
    "hopper_gemm2_kernel",
    "hopper_one_token_gemm1_kernel",
    "hopper_one_token_gemm2_kernel",
}

# In the environment's folder; see the Makefile.
OLDEST_TRITON = Path(sys.prefix) / "triton-3.6.0"
NARROW = "hopper_narrow_gemm2_kernel"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")


@pytest.fixture(scope="module", params=[89, 90, 100, 120], ids=lambda number: f"sm_{number}")
def compiled(request):
    """Capability, and a row for each kernel in each configuration."""
    return request.param, rows_of(compiling(request.param))


def compiling(capability, *models, triton=None):
    """Start `compile_pipeline.py` in a process of its own, with the release of Triton in a folder."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    folders = [triton and str(triton), str(TESTS.parent), environment.get("PYTHONPATH")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, folders))
    return subprocess.Popen(
        [sys.executable, str(TESTS / "compile_pipeline.py"), str(capability), *models],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def rows_of(process):
    """What it printed."""
    try:
        out, err = process.communicate(timeout=480)
    finally:
        process.kill()
    assert process.returncode == 0, err
    return [json.loads(line) for line in out.splitlines()]


def describe(row):
    return f"{row['kernel']} {row['options']}"


def spills(row, capability):
    """Bytes that a kernel may keep in memory."""
    return MANY_SPILL_BYTES.get(row["triton"], 400) if row["kernel"] in MANY else SPILL_BYTES[capability]


def test_it_fits_into_shared_memory(compiled):
    capability, rows = compiled
    too_much = {describe(row): row["shared"] for row in rows if not 0 <= row["shared"] <= SHARED_MEMORY[capability]}
    assert not too_much


def test_no_register_is_spilled(compiled):
    capability, rows = compiled
    spilled = {describe(row): row["spill_bytes"] for row in rows if row["spill_bytes"] > spills(row, capability)}
    assert not spilled


def test_every_kernel_of_every_plan_is_there(compiled):
    capability, rows = compiled
    names = {row["kernel"] for row in rows}
    assert names >= KERNELS
    assert names & SPECIALIZED == (SPECIALIZED if capability == 90 else set())
    problem = MoEProblem()

    def plans(token_counts):
        return {tile_plan(problem, tokens, (capability // 10, 0)) for tokens in token_counts}

    every = plans([*range(1, 2000), *range(2000, 100_000, 99)])
    assert len(every) > 1
    assert plans(TOKEN_COUNTS) == every
    for name, fused, tiles in (
        ("gemm1_swiglu_kernel", "FUSE_GATE_UP", {plan.gemm1 for plan in every}),
        ("gemm2_kernel", "FUSE_HALVES", {plan.gemm2 for plan in every}),
    ):
        keys = ("BLOCK_N", fused, "num_warps", "maxnreg")
        found = {
            (*(row["options"].get(key) for key in keys), *(tuple(bucket[1:]) for bucket in row["options"]["M_BUCKETS"]))
            for row in rows
            if row["kernel"] == name
        }
        assert found == {
            (
                *(tile.block_n, tile.fused, tile.num_warps, tile.max_registers),
                *((bucket.block_m, bucket.num_stages, bucket.k_unroll) for bucket in tile.m_buckets),
            )
            for tile in tiles
        }, name


def test_the_specialised_kernels_multiply_without_spills(compiled):
    _, rows = compiled
    rows = [row for row in rows if row["kernel"] in SPECIALIZED]
    assert all(row["wgmma"] and not row["older_mma"] for row in rows)
    assert all(row["spill_bytes"] == 0 for row in rows if row["kernel"] not in MANY)


def test_large_tiles_use_the_chips_matrix_instructions(compiled):
    capability, rows = compiled
    # Smaller tiles may use the older instructions: whether they do is for measurements to decide.
    instruction, rows_enough = {90: ("wgmma", 64), 100: ("tcgen05", 128)}.get(capability, ("fp8_mma", 16))
    without = [
        describe(row)
        for row in rows
        if row["kernel"].startswith("gemm") and row["options"]["BLOCK_M"] >= rows_enough and not row[instruction]
    ]
    assert not without
    if capability == 90:
        # Every M bucket: the older instructions convert e4m3 to float16 first.
        assert not [describe(row) for row in rows if row["kernel"].startswith("gemm") and row["older_mma"]]


def test_the_layers_of_other_models():
    models = ["kimi-k2", "glm-4.5-air", "qwen3-235b", "qwen3-235b-tp4"]
    # Both at once: most of the time is one core's.
    processes = {capability: compiling(capability, *models) for capability in (90, 100)}
    for capability, process in processes.items():
        rows = rows_of(process)
        assert {describe(row) for row in rows if row["shared"] > SHARED_MEMORY[capability]} == set()
        # GEMM2 of narrow experts, for many rows that TMA can't read, keeps about a kilobyte in memory: a rare call.
        narrow = [row for row in rows if row["options"].get("INTERMEDIATE", 512) < 512]
        rare = [row for row in narrow if row["kernel"] == "gemm2_kernel" and capability == 90]
        # Choosing from 384 experts, before the weights come, one token's GEMM1 keeps 112 bytes with Triton 3.9.
        choosing = [row for row in rows if row["kernel"] == "hopper_one_token_gemm1_kernel"]
        assert {describe(row) for row in choosing if row["spill_bytes"] > 112} == set()
        rare += choosing
        assert [describe(row) for row in rows if row["spill_bytes"] > spills(row, capability) and row not in rare] == []
        # With Triton 3.9 and its options to ptxas a few registers of GEMM1 for 48 experts and of narrow ones for 128.
        others = [row for row in rows if row["kernel"] in SPECIALIZED - MANY and row not in rare]
        assert {describe(row) for row in others if row["spill_bytes"] > 56} == set()
        if capability == 90:
            assert [row["spill_bytes"] for row in rows if row["kernel"] == NARROW] == [0] * 2
        sizes = {(MODELS[model].hidden_size, MODELS[model].intermediate_size) for model in models}
        for kernel in (
            "gemm1_swiglu_kernel",
            *(["hopper_gemm1_kernel", "hopper_few_gemm1_kernel"] if capability == 90 else []),
        ):
            gemms = [row["options"] for row in rows if row["kernel"] == kernel]
            assert {(options["HIDDEN"], options["INTERMEDIATE"]) for options in gemms} == sizes, kernel
        routes = [o for row in rows if row["kernel"] == "route_kernel" and not (o := row["options"])["ALONE"]]
        assert [options["GROUP_SIZE"] for options in routes] == [384, 128, 128, 128]
        assert [options["SOFTMAX"] for options in routes] == [False, False, True, True]


@pytest.mark.skipif(not OLDEST_TRITON.exists(), reason="`make oldest-triton` installs the oldest release")
def test_the_oldest_release_of_triton():
    """All that a call launches on Hopper, with few rows and many; the records were measured with it."""
    rows = rows_of(compiling(90, "deepseek-v3", triton=OLDEST_TRITON))
    assert {row["triton"] for row in rows} == {"3.6.0"}
    assert {row["kernel"] for row in rows} >= SPECIALIZED | {"route_kernel", "combine_kernel"}
    assert {describe(row) for row in rows if row["shared"] > SHARED_MEMORY[90]} == set()
    for row in rows:
        assert row["spill_bytes"] <= (0 if row["kernel"] in SPECIALIZED - MANY else spills(row, 90)), describe(row)
        assert row["wgmma"] == ("gemm" in row["kernel"]) and not row["older_mma"], describe(row)


def test_what_warming_up_compiles_ahead_is_all_that_calls_launch_and_no_more():
    """One binary serves many T: few are compiled, side by side where there are cores."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(TESTS.parent), environment.get("PYTHONPATH")]))
    command = [sys.executable, str(TESTS / "compile_ahead.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["after"] == []
    assert {*SPECIALIZED, "route_kernel", "scatter_kernel"} <= set(found["ahead"])
    assert len(found["ahead"]) <= 20, found["ahead"]
    assert found["at_once"] > 1 or len(os.sched_getaffinity(0)) == 1
