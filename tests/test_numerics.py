"""The gate: each rule by itself refuses a wrong result, and none refuses a right one."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hybrid_moe.numerics import DEFAULT_TOLERANCE, OWN_KERNELS_TOLERANCE, Tolerance, check

ROWS, COLUMNS = 10, 64


def reference(seed=0):
    """Rows 0 to 4 have local work, the others none."""
    result = torch.randn((ROWS, COLUMNS), generator=torch.Generator().manual_seed(seed))
    result[ROWS // 2 :] = 0
    return result


WORK = torch.arange(ROWS) < ROWS // 2
EVERY = torch.ones(ROWS, dtype=torch.bool)


def only_failure(correctness):
    assert not correctness.passed
    (failure,) = correctness.failures
    return failure


def test_the_bounds():
    assert dataclasses.astuple(DEFAULT_TOLERANCE) == (0.2, 0.1, 0.85, 0.05)
    assert OWN_KERNELS_TOLERANCE == dataclasses.replace(DEFAULT_TOLERANCE, max_relative_l2=0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_right_result_passes(dtype):
    result = check(reference().to(dtype), reference(), WORK, OWN_KERNELS_TOLERANCE)
    assert result.passed and result.failures == ()
    assert result.relative_l2 < 0.003
    assert result.cosine == pytest.approx(1, abs=1e-5)
    assert result.matched_ratio == 1
    assert result.tolerance is OWN_KERNELS_TOLERANCE


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_element_that_is_not_finite(value):
    output = reference()
    output[2, 3] = value
    result = check(output, reference(), WORK)
    assert only_failure(result) == f"1 of {5 * COLUMNS} elements are not finite"
    assert math.isnan(result.relative_l2) and result.max_abs_error == math.inf
    assert (result.cosine, result.matched_ratio) == (0, 0)


@pytest.mark.parametrize("value", [1e-30, -1.0, math.nan, math.inf])
def test_a_token_without_local_work_that_is_not_zero(value):
    output = reference()
    output[7, 0] = value
    result = check(output, reference(), WORK)
    assert only_failure(result) == "1 of 5 tokens without local work are not exactly zero"
    assert result.relative_l2 == 0 and result.matched_ratio == 1


def test_matched_ratio_alone():
    # A fifth of the elements is small and wrong; the others hide them from the norm.
    ref = torch.full((ROWS, COLUMNS), 100.0)
    ref[:2] = 0.5
    output = ref.clone()
    output[:2] = 1.0
    result = check(output, ref, EVERY)
    assert only_failure(result) == "matched ratio 0.8000 is below 0.85"
    assert result.relative_l2 < 0.01 and result.max_abs_error == 0.5


def test_matched_ratio_counts_only_tokens_with_local_work():
    ref = torch.full((ROWS, COLUMNS), 100.0)
    ref[5:] = 0
    ref[0] = 0.5
    output = ref.clone()
    output[0] = 1.0
    # Over all ten tokens it would be 0.9.
    assert only_failure(check(output, ref, WORK)) == "matched ratio 0.8000 is below 0.85"


def test_relative_l2_alone():
    # One element in ten is far off: enough others match.
    ref = torch.ones(ROWS, COLUMNS)
    output = ref.clone()
    output[0] = 3.0
    result = check(output, ref, EVERY)
    assert result.matched_ratio == pytest.approx(0.9)
    assert only_failure(result) == f"relative L2 {math.sqrt(0.4):.4f} is above 0.05"


def test_relative_l2_counts_only_tokens_with_local_work():
    ref = reference()
    result = check(1.04 * ref, ref, WORK)
    assert result.relative_l2 == pytest.approx(0.04, rel=1e-3)


@given(st.floats(-0.15, 0.15), st.integers(0, 100))
def test_relative_l2_is_the_relative_error(error, seed):
    ref = reference(seed)
    result = check((1 + error) * ref, ref, WORK)
    assert result.relative_l2 == pytest.approx(abs(error), abs=1e-5)
    if abs(abs(error) - 0.05) > 1e-5:
        assert result.passed == (abs(error) < 0.05)
    if abs(abs(error) - 0.03) > 1e-5:
        assert check((1 + error) * ref, ref, WORK, OWN_KERNELS_TOLERANCE).passed == (abs(error) < 0.03)


@pytest.mark.parametrize(
    ("ref", "out", "matched"),
    [
        (0.01, 0.1, 1.0),  # relative error 9, absolute 0.09: below atol
        (10.0, 11.5, 1.0),  # absolute error 1.5, relative 0.15: below rtol
        (0.25, 0.375, 0.0),  # 0.125 and 0.5: above both
        (0.0, 0.125, 0.0),  # any relative error at zero is above
        (0.0, 0.0625, 1.0),
        (-10.0, 10.0, 0.0),
    ],
)
def test_a_mismatch_breaks_both_bounds(ref, out, matched):
    result = check(torch.full((2, 8), out), torch.full((2, 8), ref), EVERY[:2])
    assert result.matched_ratio == matched


@pytest.mark.parametrize(
    "wrong",
    [
        lambda r: torch.zeros_like(r),
        lambda r: -r,
        lambda r: r.roll(1, dims=1),
        lambda r: torch.cat([r[1:5], r[:1], r[5:]]),  # rows of the wrong tokens
        lambda r: 1.1 * r,
        lambda r: r + 0.1 * WORK[:, None],  # no element mismatches
    ],
    ids=["zeros", "sign", "columns", "rows", "factor", "offset"],
)
def test_wrong_results(wrong):
    ref = reference()
    assert check(ref, ref, WORK).passed
    assert not check(wrong(ref), ref, WORK).passed


def test_every_rule_broken_is_named():
    output = -reference()
    output[9] = 1
    failures = check(output, reference(), WORK).failures
    assert [f.split()[0] for f in failures] == ["1", "matched", "relative"]


def test_nobody_has_local_work():
    zeros = torch.zeros(4, COLUMNS)
    nobody = torch.zeros(4, dtype=torch.bool)
    result = check(zeros, zeros, nobody)
    assert result.passed
    assert (result.relative_l2, result.cosine, result.matched_ratio) == (0, 1, 1)
    assert "4 of 4 tokens" in only_failure(check(zeros + 1, zeros, nobody))


def test_no_tokens():
    empty = torch.zeros(0, COLUMNS)
    assert check(empty, empty, torch.zeros(0, dtype=torch.bool)).passed


def test_a_reference_of_zeros():
    zeros = torch.zeros(2, 8)
    assert check(zeros, zeros, EVERY[:2]).passed
    result = check(zeros + 0.01, zeros, EVERY[:2])
    assert result.relative_l2 == math.inf
    assert "relative L2 inf" in only_failure(result)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_reference_passes_nothing(value):
    ref = reference()
    ref[0, 0] = value
    assert not check(reference(), ref, WORK).passed


def test_sums_do_not_lose_digits():
    # 2048 rows: more than one piece; a float32 sum of the squares would be off by far more.
    ref = torch.full((2048, 512), 1.0)
    output = ref.clone()
    output[::2] = 1.001
    result = check(output, ref, torch.ones(2048, dtype=torch.bool))
    assert result.relative_l2 == pytest.approx(0.001 / math.sqrt(2), rel=1e-3)


@pytest.mark.parametrize("shape", [(ROWS, COLUMNS - 1), (ROWS - 1, COLUMNS), (COLUMNS,)])
def test_wrong_shape(shape):
    with pytest.raises(ValueError) as caught:
        check(torch.zeros(shape), reference(), WORK)
    assert str(list(shape)) in str(caught.value) and f"[{ROWS}, {COLUMNS}] is wanted" in str(caught.value)


def test_to_dict_has_a_records_fields():
    data = check(reference(), reference(), WORK, Tolerance(rtol=0.3)).to_dict()
    assert set(data) == {
        "relative_l2",
        "cosine",
        "matched_ratio",
        "max_abs_error",
        "rtol",
        "atol",
        "required_matched_ratio",
        "max_relative_l2",
    }
    assert data["rtol"] == 0.3 and data["matched_ratio"] == 1
