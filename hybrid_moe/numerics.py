"""The one rule that says whether a result is right. Nothing in this package compares results in another way.

Two parts. As a whole, a result is near the reference: enough elements match (flashinfer-bench's rule) and the relative
L2 error is small. And so is each part of it: every token, every block of 128 columns of a token, every column, and the
projection on the reference. A row or a column that is wrong moves the whole by one part in a thousand; it moves its
own figure by all of it.

An FP8 pipeline differs from the definition by the e4m3 rounding of the activation between the GEMMs: each element by
at most 1/17, at random. The relative error of a part is therefore `Tolerance.max_relative_l2` for a large part, and
scatters more the fewer elements it has and the fewer activation elements it was summed from (`Bounds.of`). The
constants of that are from ``benchmarks/gate_study.py``.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch

# Columns of a block: those that share the scales of the second GEMM's weights.
BLOCK = 128
# The narrowest shards of an expert in use: the loosest bounds, for callers that don't say the width.
NARROWEST = 128
# Which rule a record passed by; those that name none are of the first.
RULE = 2
RULES = {"1": "the whole alone", "2": "the whole, each token, block and column, and the projection"}

# How many standard deviations of its scatter the error of a part may lie above its mean.
_SCATTER = 8.0
# Relative L2 error of one e4m3 rounding between the GEMMs. Pipelines that are allowed more also round before SwiGLU,
# which makes the errors uneven: in narrow layers they scatter more.
_ONE_ROUNDING = 0.023
# The projection: its mean, as a share of max_relative_l2, and its scatter.
_SLOPE, _SLOPE_SCATTER = 0.15, 16.0
# Parts of the reference smaller than this share of the typical one are judged at that size: the inner quantisation has
# a least scale (an amax of 1e-10), below which it loses digits.
_NEGLIGIBLE = 1e-10
# Rows in float64 at a time: a copy of 14107 of them would be 0.8 GB.
_ROWS = 1024


def describe_rule(rule: str) -> str:
    """A rule by its number, for people."""
    return f"rule {rule} ({RULES[rule]})" if rule in RULES else f"rule {rule}"


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Bounds of the gate.

    Parameters
    ----------
    rtol, atol
        An element mismatches if its absolute error is above ``atol`` *and* its error relative to the reference is
        above ``rtol`` (flashinfer-bench's rule).
    required_matched_ratio
        Least share of matching elements, counted over the tokens that have local work.
    max_relative_l2
        Largest ``||output - reference|| / ||reference||`` over the same tokens if they are many; `Bounds` says what
        that means for few of them, and for each part of a result.
    """

    rtol: float = 0.2
    atol: float = 0.1
    required_matched_ratio: float = 0.85
    max_relative_l2: float = 0.05


DEFAULT_TOLERANCE = Tolerance()
# Kernels of this package differ from the definition only by the fp8 rounding of the inner activation (0.023).
OWN_KERNELS_TOLERANCE = Tolerance(max_relative_l2=0.026)


@dataclass(frozen=True, slots=True)
class Bounds:
    """What `Tolerance.max_relative_l2` allows a result of this size, and each of its parts.

    Attributes
    ----------
    matched_ratio
        Least share of matching elements.
    relative_l2
        Over all tokens with local work.
    token, block, column
        Of a token; of 128 columns of a token; of a column over all tokens.
    slope
        How far ``<output, reference> / <reference, reference>`` may be from 1.
    """

    matched_ratio: float
    relative_l2: float
    token: float
    block: float
    column: float
    slope: float

    @classmethod
    def of(cls, tolerance: Tolerance, tokens: float, hidden_size: int, width: int) -> Bounds:
        """For ``tokens`` that count alike, whose results are sums over ``width`` activation elements each.

        The error of n elements that come of m roundings is the mean times ``1 + z * sqrt(u/m + 1/n)``: the second term
        is that of a chi distribution, u how unevenly the roundings weigh.
        """
        uneven = max(1.0, tolerance.max_relative_l2 / _ONE_ROUNDING) ** 2

        def bound(rows: float, elements: float) -> float:
            return tolerance.max_relative_l2 * (1 + _SCATTER * math.sqrt(uneven / (rows * width) + 1 / elements))

        def mismatched(relative_l2: float) -> float:
            """Share of elements that are off by more than rtol, of normal errors and a normal reference."""
            return 2 / math.pi * math.atan2(relative_l2, tolerance.rtol)

        whole = bound(tokens, tokens * hidden_size)
        required = tolerance.required_matched_ratio
        scatter = _SCATTER * math.sqrt(required * (1 - required) / (tokens * hidden_size))
        return cls(
            matched_ratio=required - (mismatched(whole) - mismatched(tolerance.max_relative_l2)) - scatter,
            relative_l2=whole,
            token=bound(1, hidden_size),
            block=bound(1, min(BLOCK, hidden_size)),
            column=bound(tokens, tokens),
            slope=tolerance.max_relative_l2 * (_SLOPE + _SLOPE_SCATTER / math.sqrt(tokens * width)),
        )


@dataclass(frozen=True, slots=True)
class Correctness:
    """How far a result is from the reference, and every rule that it breaks.

    Attributes
    ----------
    relative_l2, cosine, matched_ratio
        Over the tokens with local work; NaN, 0 and 0 for a result that isn't finite, 0, 1 and 1 where no token has any.
    max_abs_error
        Largest absolute error over all tokens.
    token_relative_l2, block_relative_l2, column_relative_l2
        The worst of a token, of 128 columns of a token, and of a column; NaN and 0 as above.
    slope
        ``<output, reference> / <reference, reference>``: 1.015 if everything is 1.5% too large.
    tolerance, bounds
        The bounds applied; ``bounds`` is ``None`` where no token has local work, or the result isn't finite.
    failures
        One sentence for each rule broken; empty if the result is right.
    """

    relative_l2: float
    cosine: float
    matched_ratio: float
    max_abs_error: float
    token_relative_l2: float
    block_relative_l2: float
    column_relative_l2: float
    slope: float
    tolerance: Tolerance
    bounds: Bounds | None
    failures: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether no rule is broken."""
        return not self.failures

    def to_dict(self) -> dict[str, float]:
        """The figures and the bounds, as a record's ``correctness`` has them."""
        figures = ("relative_l2", "cosine", "matched_ratio", "max_abs_error", "slope")
        parts = ("token_relative_l2", "block_relative_l2", "column_relative_l2")
        found = {name: getattr(self, name) for name in figures + parts} | asdict(self.tolerance) | {"rule": RULE}
        if self.bounds is None:
            return found
        return found | {
            "max_token_relative_l2": self.bounds.token,
            "max_block_relative_l2": self.bounds.block,
            "max_column_relative_l2": self.bounds.column,
            "max_slope_error": self.bounds.slope,
        }


def check(
    output: torch.Tensor,
    reference: torch.Tensor,
    has_local_work: torch.Tensor,
    tolerance: Tolerance = DEFAULT_TOLERANCE,
    *,
    width: int = NARROWEST,
) -> Correctness:
    """Compare a result with the reference by the one tolerance rule.

    Parameters
    ----------
    output
        ``[T, H]``, any float dtype.
    reference
        ``[T, H]`` float32.
    has_local_work
        ``[T]`` bool. Half of the tokens have none on one of eight ranks; counting them would pass a broken kernel.
        Their outputs must be exactly zero.
    tolerance
        The bounds.
    width
        Activation elements between the GEMMs that a token's result is summed over: the layer's ``intermediate_size``.
        Less where few of them carry the sum, as with trained layers that have outlier channels.

    Raises
    ------
    ValueError
        If the shapes differ, or ``width`` isn't positive.
    """
    if output.shape != reference.shape:
        raise ValueError(f"output: expected shape {list(reference.shape)}, the reference's, got {list(output.shape)}")
    if width < 1:
        raise ValueError(f"expected a width of at least 1, got {width}")
    failures = []
    idle = output[~has_local_work]
    idle_error = float(idle.float().abs().max()) if idle.numel() else 0.0
    if idle.numel() and not bool((idle == 0).all()):
        count = int((idle != 0).any(dim=1).sum())
        failures.append(f"{count} of {idle.shape[0]} tokens without local work are not exactly zero")

    out, ref = output[has_local_work], reference[has_local_work]
    if not out.numel():
        return Correctness(0.0, 1.0, 1.0, idle_error, 0.0, 0.0, 0.0, 1.0, tolerance, None, tuple(failures))
    if not bool(torch.isfinite(out).all()):
        count = int((~torch.isfinite(out)).sum())
        failures.append(f"{count} of {out.numel()} elements are not finite")
        nan = math.nan
        return Correctness(nan, 0.0, 0.0, math.inf, nan, nan, nan, nan, tolerance, None, tuple(failures))

    sums = _Sums.of(out, ref, tolerance)
    bounds = Bounds.of(tolerance, sums.effective_tokens(), out.shape[1], width)
    whole = sums.relative_l2()
    if sums.matched < bounds.matched_ratio:
        failures.append(f"matched ratio {sums.matched:.4f} is below {bounds.matched_ratio:.4f}")
    if not whole <= bounds.relative_l2:
        failures.append(f"relative L2 {whole:.4f} is above {bounds.relative_l2:.4f}")

    token_of = has_local_work.nonzero().flatten().tolist()
    by_token, by_block, by_column = sums.by_token(), sums.by_block(), sums.by_column()
    for what, found, bound in (
        ("tokens", by_token, bounds.token),
        (f"blocks of {BLOCK} columns of a token", by_block, bounds.block),
        ("columns", by_column, bounds.column),
    ):
        above = ~(found <= bound)
        if not bool(above.any()):
            continue
        worst = int(found.nan_to_num(nan=math.inf).argmax())
        if found is by_column:
            where = f"column {worst}"
        elif found is by_token:
            where = f"token {token_of[worst]}"
        else:
            row, block = divmod(worst, found.shape[1])
            where = f"token {token_of[row]}, columns from {block * BLOCK}"
        failures.append(
            f"{int(above.sum())} of {found.numel()} {what} have a relative L2 above {bound:.4f}, "
            f"the worst {float(found.flatten()[worst]):.4f} ({where})"
        )
    slope = sums.slope()
    if not abs(slope - 1) <= bounds.slope:
        failures.append(f"slope {slope:.4f} is more than {bounds.slope:.4f} from 1")
    return Correctness(
        whole,
        sums.cosine(),
        sums.matched,
        max(sums.largest, idle_error),
        float(by_token.max()),
        float(by_block.max()),
        float(by_column.max()),
        slope,
        tolerance,
        bounds,
        tuple(failures),
    )


@dataclass(slots=True)
class _Sums:
    """Sums in float64 over the tokens with local work: float32 loses digits over the squares of 10^8 values.

    Attributes
    ----------
    error, reference
        ``[tokens, blocks]``: squares, summed over each block.
    column_error, column_reference, column_typical
        ``[H]``: squares, summed over the tokens; the last is of a block's mean.
    """

    error: torch.Tensor
    reference: torch.Tensor
    column_error: torch.Tensor
    column_reference: torch.Tensor
    column_typical: torch.Tensor
    dot: float
    output: float
    matched: float
    largest: float

    @classmethod
    def of(cls, out: torch.Tensor, ref: torch.Tensor, tolerance: Tolerance) -> _Sums:
        tokens, hidden = out.shape
        blocks = -(-hidden // BLOCK)
        sizes = torch.full((blocks,), BLOCK, device=out.device)
        sizes[-1] = hidden - (blocks - 1) * BLOCK
        squares: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        columns = torch.zeros((2, hidden), dtype=torch.float64, device=out.device)
        dot = output = largest = 0.0
        mismatched = 0
        for o32, r32 in zip(out.split(_ROWS), ref.split(_ROWS), strict=True):
            o, r = o32.double(), r32.double()
            error = (o - r).abs()
            mismatched += int(((error > tolerance.atol) & (error > tolerance.rtol * r.abs())).sum())
            largest = max(largest, float(error.max()))
            dot, output = dot + float((o * r).sum()), output + float(o.square().sum())
            for number, square in enumerate((error.square_(), r.square_())):
                columns[number] += square.sum(dim=0)
                padded = torch.nn.functional.pad(square, (0, blocks * BLOCK - hidden))
                squares[number].append(padded.unflatten(1, (blocks, BLOCK)).sum(dim=2))
        error, reference = (torch.cat(parts) for parts in squares)
        typical = (reference.sum(dim=0) / sizes).repeat_interleave(sizes)
        matched = 1.0 - mismatched / out.numel()
        return cls(error, reference, columns[0], columns[1], typical, dot, output, matched, largest)

    def effective_tokens(self) -> float:
        """As many tokens of one size scatter as much as these, of which a few may outweigh the others."""
        squares = self.reference.sum(dim=1)
        total, fourth = float(squares.sum()), float(squares.square().sum())
        return total**2 / fourth if fourth > 0 and math.isfinite(total) else float(len(squares))

    def relative_l2(self) -> float:
        return float(_ratio(self.error.sum(), self.reference.sum()))

    def cosine(self) -> float:
        norms = math.sqrt(self.output * float(self.reference.sum()))
        return self.dot / norms if norms else float(self.output == float(self.reference.sum()))

    def slope(self) -> float:
        reference = float(self.reference.sum())
        return self.dot / reference if reference else (1.0 if self.output == 0 else math.inf)

    def by_token(self) -> torch.Tensor:
        reference = self.reference.sum(dim=1)
        return _ratio(self.error.sum(dim=1), reference.clamp_min(reference.median() * _NEGLIGIBLE**2))

    def by_block(self) -> torch.Tensor:
        return _ratio(self.error, self.reference.clamp_min(self.reference.median() * _NEGLIGIBLE**2))

    def by_column(self) -> torch.Tensor:
        # Over few tokens the results of a column may all be near zero by chance, while the errors are not: they are as
        # large as its neighbours'. Over many tokens a column is small only because its weights are, as its errors then.
        few = min(1.0, 64 / len(self.error))
        return _ratio(self.column_error, self.column_reference.maximum(self.column_typical * few**2))


def _ratio(error: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Square root of the quotient; no error is 0 even of nothing."""
    return torch.where(error == 0, 0.0, (error / reference).sqrt())
