"""The gate: each rule by itself refuses a wrong result, and none refuses a right one."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_moe.numerics import DEFAULT_TOLERANCE, OWN_KERNELS_TOLERANCE, RULE, Bounds, Tolerance, check

ROWS, COLUMNS = 10, 512
WORK = torch.arange(ROWS) < ROWS // 2
# So many rows and so wide that the bounds of the whole are max_relative_l2 itself, to 1%.
MANY, WIDE = 3000, 10**6


def random(rows=ROWS, columns=COLUMNS, seed=0):
    return torch.randn((rows, columns), generator=torch.Generator().manual_seed(seed))


def reference(seed=0):
    """Rows 0 to 4 have local work, the others none."""
    result = random(seed=seed)
    result[ROWS // 2 :] = 0
    return result


def with_errors(ref, share, rows=slice(None), columns=slice(None)):
    """Random errors of this relative size, in some rows and columns."""
    output = ref.clone()
    part = output[rows, columns]
    signs = random(*part.shape, seed=5).sign()
    output[rows, columns] = part * (1 + share * signs)
    return output


def every(ref):
    return torch.ones(len(ref), dtype=torch.bool)


def only_failure(correctness):
    assert not correctness.passed
    (failure,) = correctness.failures
    return failure


def test_the_bounds():
    assert dataclasses.astuple(DEFAULT_TOLERANCE) == (0.2, 0.1, 0.85, 0.05)
    assert OWN_KERNELS_TOLERANCE == dataclasses.replace(DEFAULT_TOLERANCE, max_relative_l2=0.026)


@pytest.mark.parametrize(
    ("tolerance", "tokens", "hidden", "width", "wanted"),
    [
        # matched ratio, whole, token, block, column, slope
        (OWN_KERNELS_TOLERANCE, 901, 7168, 2048, (0.8483, 0.0262, 0.0317, 0.0451, 0.0329, 0.0042)),
        (OWN_KERNELS_TOLERANCE, 1, 7168, 2048, (0.7983, 0.0317, 0.0317, 0.0451, 0.2341, 0.0131)),
        (OWN_KERNELS_TOLERANCE, 901, 7168, 128, (0.8467, 0.0267, 0.0469, 0.0537, 0.0330, 0.0051)),
        (DEFAULT_TOLERANCE, 901, 7168, 2048, (0.8469, 0.0507, 0.0698, 0.0902, 0.0633, 0.0081)),
        (DEFAULT_TOLERANCE, 901, 7168, 128, (0.8412, 0.0526, 0.1270, 0.1346, 0.0636, 0.0099)),
        (DEFAULT_TOLERANCE, 1, 64, 10**9, (0.3537, 0.1000, 0.1000, 0.1000, 0.4500, 0.0075)),
    ],
)
def test_the_bounds_of_each_part(tolerance, tokens, hidden, width, wanted):
    found = dataclasses.astuple(Bounds.of(tolerance, tokens, hidden, width))
    assert found == pytest.approx(wanted, abs=6e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_right_result_passes(dtype):
    result = check(reference().to(dtype), reference(), WORK, OWN_KERNELS_TOLERANCE)
    assert result.passed and result.failures == ()
    assert result.relative_l2 < 0.003 and result.column_relative_l2 < 0.01
    assert result.cosine == pytest.approx(1, abs=1e-5) and result.slope == pytest.approx(1, abs=1e-3)
    assert result.matched_ratio == 1
    assert result.tolerance is OWN_KERNELS_TOLERANCE


# ---- Each rule alone ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_element_that_is_not_finite(value):
    output = reference()
    output[2, 3] = value
    result = check(output, reference(), WORK)
    assert only_failure(result) == f"1 of {5 * COLUMNS} elements are not finite"
    assert math.isnan(result.relative_l2) and result.max_abs_error == math.inf
    assert math.isnan(result.token_relative_l2) and math.isnan(result.slope)
    assert (result.cosine, result.matched_ratio) == (0, 0)


@pytest.mark.parametrize("value", [1e-30, -1.0, math.nan, math.inf])
def test_a_token_without_local_work_that_is_not_zero(value):
    output = reference()
    output[7, 0] = value
    result = check(output, reference(), WORK)
    assert only_failure(result) == "1 of 5 tokens without local work are not exactly zero"
    assert result.relative_l2 == 0 and result.matched_ratio == 1


def small_and_wrong(rows, share, columns=COLUMNS):
    """A share of the elements is small and wrong; the others hide them from every norm."""
    ref = torch.full((rows, columns), 100.0)
    chosen = torch.rand(ref.shape, generator=torch.Generator().manual_seed(1)) < share
    ref[chosen] = 0.5
    return torch.where(chosen, 1.0, ref), ref


def test_matched_ratio_alone():
    output, ref = small_and_wrong(MANY, 0.2)
    result = check(output, ref, every(ref), width=WIDE)
    assert only_failure(result).startswith("matched ratio 0.80")
    assert result.relative_l2 < 0.01 and result.max_abs_error == 0.5


@pytest.mark.parametrize(("share", "passes"), [(0.150, True), (0.156, False)])
def test_the_bound_of_the_matched_ratio(share, passes):
    output, ref = small_and_wrong(MANY, share)
    assert check(output, ref, every(ref), width=WIDE).passed == passes


def test_matched_ratio_counts_only_tokens_with_local_work():
    output, ref = small_and_wrong(2 * MANY, 0.2)
    output[MANY:] = ref[MANY:] = 0
    work = torch.arange(2 * MANY) < MANY
    # Over all tokens it would be 0.9.
    assert only_failure(check(output, ref, work, width=WIDE)).startswith("matched ratio 0.80")


def test_relative_l2_alone():
    ref = random(MANY)
    result = check(with_errors(ref, 0.053), ref, every(ref), width=WIDE)
    assert only_failure(result) == "relative L2 0.0530 is above 0.0503"


def test_one_token_alone():
    ref = random(MANY)
    result = check(with_errors(ref, 0.07, rows=[17]), ref, every(ref), width=WIDE)
    assert only_failure(result) == (f"1 of {MANY} tokens have a relative L2 above 0.0677, the worst 0.0700 (token 17)")
    assert result.token_relative_l2 == pytest.approx(0.07)


def test_one_block_alone():
    ref = random(MANY)
    result = check(with_errors(ref, 0.09, rows=[17], columns=slice(256, 384)), ref, every(ref), width=WIDE)
    assert only_failure(result) == (
        f"1 of {4 * MANY} blocks of 128 columns of a token have a relative L2 above 0.0854, the worst 0.0900 "
        "(token 17, columns from 256)"
    )
    assert result.block_relative_l2 == pytest.approx(0.09)


def test_one_column_alone():
    ref = random(MANY)
    result = check(with_errors(ref, 0.06, columns=[300]), ref, every(ref), width=WIDE)
    assert only_failure(result) == (
        f"1 of {COLUMNS} columns have a relative L2 above 0.0573, the worst 0.0600 (column 300)"
    )
    assert result.column_relative_l2 == pytest.approx(0.06)


@pytest.mark.parametrize("factor", [1.01, 0.99])
def test_the_slope_alone(factor):
    ref = random(MANY)
    result = check(factor * ref, ref, every(ref), width=WIDE)
    assert only_failure(result) == f"slope {factor:.4f} is more than 0.0075 from 1"
    assert result.slope == pytest.approx(factor) and result.cosine == pytest.approx(1)


def test_every_token_block_and_column_is_looked_at():
    """Wrong in turn at the first and the last of each, rows without work in between."""
    ref, work = random(9), torch.tensor([0, 1, 0, 1, 1, 0, 1, 1, 0], dtype=torch.bool)
    ref[~work] = 0
    for token in (1, 7):
        result = check(with_errors(ref, 0.5, rows=[token]), ref, work)
        assert any(f"(token {token})" in failure for failure in result.failures)
        for first in (0, 384):
            result = check(with_errors(ref, 0.5, rows=[token], columns=slice(first, first + 128)), ref, work)
            assert any(f"(token {token}, columns from {first})" in failure for failure in result.failures)
    for column in (0, 511):
        result = check(with_errors(ref, 2.0, columns=[column]), ref, work)
        assert any(f"(column {column})" in failure for failure in result.failures)


def test_a_last_block_that_is_shorter():
    ref = random(64, 200)
    result = check(with_errors(ref, 1.0, rows=[3], columns=slice(128, 200)), ref, every(ref))
    assert any("of 128 blocks" in f and "(token 3, columns from 128)" in f for f in result.failures)
    assert result.block_relative_l2 == pytest.approx(1)


# ---- What is relative to what --------------------------------------------------------------------------------------


@given(st.floats(-0.15, 0.15), st.integers(0, 100))
@settings(max_examples=40)
def test_every_relative_error_is_relative_to_the_reference(error, seed):
    ref = reference(seed)
    result = check((1 + error) * ref, ref, WORK)
    for figure in (result.relative_l2, result.token_relative_l2, result.block_relative_l2):
        assert figure == pytest.approx(abs(error), abs=1e-5)
    # Of few tokens, a column that is smaller than its neighbours is judged at their size.
    assert result.column_relative_l2 <= 2 * abs(error) + 1e-5
    assert result.slope == pytest.approx(1 + error, abs=1e-5)


def test_relative_l2_counts_only_tokens_with_local_work():
    ref = reference()
    result = check(1.04 * ref, ref, WORK)
    assert result.relative_l2 == pytest.approx(0.04, rel=1e-3)


@pytest.mark.parametrize(
    ("ref", "out", "matched"),
    [
        (0.01, 0.1, 1.0),  # relative error 9, absolute 0.09: below atol
        (10.0, 11.5, 1.0),  # absolute error 1.5, relative 0.15: below rtol
        (10.0, 12.1, 0.0),  # relative to the reference 0.21, to the output 0.17
        (12.1, 10.0, 1.0),  # relative to the reference 0.17, to the output 0.21
        (0.25, 0.375, 0.0),  # 0.125 and 0.5: above both
        (0.0, 0.125, 0.0),  # any relative error at zero is above
        (0.0, 0.0625, 1.0),
        (-10.0, 10.0, 0.0),
    ],
)
def test_a_mismatch_breaks_both_bounds(ref, out, matched):
    ref, out = torch.full((2, 8), ref), torch.full((2, 8), out)
    assert check(out, ref, every(ref)).matched_ratio == matched


def test_few_tokens_have_wider_bounds():
    ref = random(MANY)
    output = with_errors(ref, 0.0262)
    assert not check(output, ref, every(ref), OWN_KERNELS_TOLERANCE, width=2048).passed
    assert check(output[:4], ref[:4], every(ref[:4]), OWN_KERNELS_TOLERANCE, width=2048).passed


def test_tokens_that_weigh_little_count_for_little():
    """One token has all of the norm: the bounds of sums over the tokens are those of one token."""
    ref = random(100)
    ref[3] *= 1e4
    result = check(ref, ref, every(ref), width=256)
    wanted = Bounds.of(DEFAULT_TOLERANCE, 1, COLUMNS, 256)
    assert dataclasses.astuple(result.bounds) == pytest.approx(dataclasses.astuple(wanted), rel=1e-3)
    alike = check(random(100).sign(), random(100).sign(), every(ref), width=256)
    assert alike.bounds == Bounds.of(DEFAULT_TOLERANCE, 100, COLUMNS, 256)


def test_a_token_is_judged_at_its_own_size():
    for size in (1e-6, 1e6):
        ref = random(20)
        ref[3] *= size
        output = ref.clone()
        output[3] = 0
        assert any("1 of 20 tokens" in failure for failure in check(output, ref, every(ref)).failures)


def test_a_token_of_nothing():
    """Next to the others it is as good as zero, or is zero: what is as small is right."""
    ref = random(20)
    ref[3] *= 1e-12
    ref[4] = 0
    output = ref.clone()
    output[3], output[4] = 0, 1e-12
    assert check(output, ref, every(ref)).passed
    output[4] = 1e-3
    assert {f.split(" have")[0] for f in check(output, ref, every(ref)).failures} == {
        "1 of 20 tokens",
        "4 of 80 blocks of 128 columns of a token",
    }


def test_a_column_that_is_zero_by_chance():
    ref = random(1)
    ref[0, 9] = 0
    output = with_errors(ref, 0.02)
    output[0, 9] = 0.02
    assert check(output, ref, every(ref), OWN_KERNELS_TOLERANCE).passed
    output[0, 9] = 0.5
    assert any("(column 9)" in failure for failure in check(output, ref, every(ref)).failures)


def test_a_column_that_is_small_over_many_tokens():
    ref = random(MANY)
    ref[:, 9] *= 0.01
    output = ref.clone()
    output[:, 9] = 0
    result = check(output, ref, every(ref))
    assert "(column 9)" in only_failure(result) and result.column_relative_l2 == pytest.approx(
        1 / 0.0213 * 0.01, rel=0.1
    )


def test_a_narrower_layer_scatters_more():
    ref = random(50)
    output = with_errors(ref, 0.04, rows=[3])
    assert not check(output, ref, every(ref), OWN_KERNELS_TOLERANCE, width=2048).passed
    assert check(output, ref, every(ref), OWN_KERNELS_TOLERANCE, width=128).passed
    assert check(output, ref, every(ref), OWN_KERNELS_TOLERANCE).passed  # the narrowest


# ---- Whole results ------------------------------------------------------------------------------------------------


@given(st.sampled_from((1, 2, 7, 40)), st.integers(0, 1000))
@settings(max_examples=40)
def test_honest_noise_passes(rows, seed):
    """The error that an FP8 pipeline has, and rounding to bfloat16."""
    ref = random(rows, seed=seed)
    output = (ref + 0.0228 * random(rows, seed=seed + 1)).bfloat16()
    assert check(output, ref, every(ref), OWN_KERNELS_TOLERANCE, width=2048).failures == ()


@pytest.mark.parametrize(
    "wrong",
    [
        lambda r: torch.zeros_like(r),
        lambda r: -r,
        lambda r: r.roll(1, dims=1),
        lambda r: torch.cat([r[1:5], r[:1], r[5:]]),  # rows of the wrong tokens
        lambda r: 1.1 * r,
        lambda r: r + 0.1 * WORK[:, None],  # no element mismatches
        lambda r: torch.cat([r[:4], 0 * r[4:5], r[5:]]),  # the last row lost
        lambda r: torch.cat([r[:, :-1], 0 * r[:, -1:]], dim=1),
    ],
    ids=["zeros", "sign", "columns", "rows", "factor", "offset", "last row", "last column"],
)
def test_wrong_results(wrong):
    ref = reference()
    assert check(ref, ref, WORK).passed
    assert not check(wrong(ref), ref, WORK).passed


def test_every_rule_broken_is_named():
    output = -reference()
    output[9] = 1
    failures = check(output, reference(), WORK).failures
    assert [f.split()[0] for f in failures] == ["1", "matched", "relative", "5", "20", "512", "slope"]


def test_nobody_has_local_work():
    zeros = torch.zeros(4, COLUMNS)
    nobody = torch.zeros(4, dtype=torch.bool)
    result = check(zeros, zeros, nobody)
    assert result.passed
    assert (result.relative_l2, result.cosine, result.matched_ratio, result.slope) == (0, 1, 1, 1)
    assert "4 of 4 tokens" in only_failure(check(zeros + 1, zeros, nobody))


def test_no_tokens():
    empty = torch.zeros(0, COLUMNS)
    assert check(empty, empty, torch.zeros(0, dtype=torch.bool)).passed


def test_a_reference_of_zeros():
    zeros = torch.zeros(2, 8)
    assert check(zeros, zeros, every(zeros)).passed
    result = check(zeros + 0.01, zeros, every(zeros))
    assert result.relative_l2 == math.inf and result.slope == math.inf
    assert "relative L2 inf" in " ".join(result.failures)


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
    result = check(output, ref, every(ref))
    assert result.relative_l2 == pytest.approx(0.001 / math.sqrt(2), rel=1e-3)
    assert result.column_relative_l2 == pytest.approx(0.001 / math.sqrt(2), rel=1e-3)
    assert result.token_relative_l2 == pytest.approx(0.001, rel=1e-3)
    assert result.slope == pytest.approx(1.0005, rel=1e-6)


@pytest.mark.parametrize("shape", [(ROWS, COLUMNS - 1), (ROWS - 1, COLUMNS), (COLUMNS,)])
def test_wrong_shape(shape):
    with pytest.raises(ValueError) as caught:
        check(torch.zeros(shape), reference(), WORK)
    assert str(list(shape)) in str(caught.value) and f"expected shape [{ROWS}, {COLUMNS}]" in str(caught.value)


def test_wrong_width():
    with pytest.raises(ValueError, match="expected a width of at least 1, got 0"):
        check(reference(), reference(), WORK, width=0)


def test_to_dict_has_a_records_fields():
    found = check(reference(), reference(), WORK, Tolerance(rtol=0.3), width=2048)
    data = found.to_dict()
    figures = {"relative_l2", "cosine", "matched_ratio", "max_abs_error", "slope"}
    parts = {"token_relative_l2", "block_relative_l2", "column_relative_l2"}
    bounds = {"rtol", "atol", "required_matched_ratio", "max_relative_l2", "max_slope_error", "rule"}
    assert set(data) == figures | parts | bounds | {f"max_{part}" for part in parts}
    assert data["rtol"] == 0.3 and data["matched_ratio"] == 1 and data["rule"] == RULE == 2
    assert data["max_token_relative_l2"] == found.bounds.token and data["max_slope_error"] == found.bounds.slope
    assert data["max_block_relative_l2"] == found.bounds.block
    assert data["max_column_relative_l2"] == found.bounds.column
    nothing = check(torch.zeros(2, 8), torch.zeros(2, 8), torch.zeros(2, dtype=torch.bool)).to_dict()
    assert set(data) - set(nothing) == {f"max_{part}" for part in parts} | {"max_slope_error"}
