"""Bugs in the rule that says whether a result is right."""

from mutations import Mutation

RULE = ("tests/test_numerics.py",)


def numerics(old: str, new: str, wrong: str, tests: tuple[str, ...] = RULE, equivalent: str = "") -> Mutation:
    return Mutation("numerics.py", old, new, wrong, tests, equivalent)


MUTATIONS = [
    # What is compared with what
    numerics("(error > tolerance.rtol * r.abs())", "(error > tolerance.rtol * o.abs())", "rtol relative to the output"),
    numerics("(error > tolerance.atol) & (error", "(error > tolerance.atol) | (error", "either bound is a mismatch"),
    numerics("required_matched_ratio: float = 0.85", "required_matched_ratio: float = 0.75", "a ratio of 0.75 passes"),
    numerics("if sums.matched < bounds.matched_ratio:", "if False:", "no matched ratio"),
    numerics("if not whole <= bounds.relative_l2:", "if False:", "the whole isn't judged"),
    numerics(
        "if not whole <= bounds.relative_l2:",
        "if whole > bounds.relative_l2:",
        "a reference of NaN passes as a whole",
        equivalent="it has a token of NaN, which is refused",
    ),
    numerics("above = ~(found <= bound)", "above = found > bound * 2", "a part may be off by twice its bound"),
    numerics('("tokens", by_token, bounds.token),', '("tokens", by_token, math.inf),', "tokens aren't judged"),
    numerics("by_block, bounds.block),", "by_block, math.inf),", "blocks aren't judged"),
    numerics('("columns", by_column, bounds.column),', '("columns", by_column, math.inf),', "columns aren't judged"),
    numerics("if not abs(slope - 1) <= bounds.slope:", "if slope - 1 > bounds.slope:", "a slope below 1 passes"),
    numerics("_SLOPE, _SLOPE_SCATTER = 0.15, 16.0", "_SLOPE, _SLOPE_SCATTER = 0.3, 16.0", "1.5% of everything passes"),
    numerics("_SCATTER = 8.0\n", "_SCATTER = 16.0\n", "parts may scatter twice as far"),
    numerics("_ONE_ROUNDING) ** 2", "_ONE_ROUNDING) ** 0", "honest results of narrow layers are refused"),
    # Whose rows
    numerics(
        "out, ref = output[has_local_work], reference[has_local_work]",
        "out, ref = output, reference",
        "tokens without work are counted",
    ),
    numerics(
        "if idle.numel() and not bool((idle == 0).all()):",
        "if idle.numel() and not bool((idle.abs() < 1e-3).all()):",
        "tokens without work needn't be zero",
    ),
    numerics("if not bool(torch.isfinite(out).all()):", "if bool(torch.isnan(out).any()):", "infinities are compared"),
    numerics("square.sum(dim=0)", "square[:1].sum(dim=0)", "columns of the first row of each piece alone"),
    numerics(
        "row, block = divmod(worst, found.shape[1])", "row, block = divmod(worst, len(found))", "names another block"
    ),
    numerics('where = f"token {token_of[worst]}"', 'where = f"token {worst}"', "names a token of those with work"),
    # What the bounds depend on
    numerics("return total**2 / fourth if", "return float(len(squares)) if", "heavy tokens count as many"),
    numerics("self.column_typical * few**2", "self.column_typical", "a small column is judged at its neighbours' size"),
    numerics("self.column_typical * few**2", "self.column_typical * 0", "a column that is zero by chance fails"),
    numerics(
        "(reference.median() * _NEGLIGIBLE**2)", "(reference.median())", "small tokens are judged at another's size"
    ),
    numerics(
        "sizes[-1] = hidden - (blocks - 1) * BLOCK", "sizes[-1] = BLOCK", "a short last block has too many columns"
    ),
    numerics(
        "(uneven / (rows * width) + 1 / elements)",
        "(uneven / rows + 1 / elements)",
        "narrow and wide layers scatter alike",
    ),
    # Sums
    numerics("self.dot / reference if reference", "self.dot / self.output if reference", "the slope of the other way"),
    # What a record gets
    numerics('"max_slope_error": self.bounds.slope', '"max_slope_error": self.bounds.token', "another bound is kept"),
    numerics('| {"rule": RULE}', "| {}", "a record doesn't say by which rule"),
]
