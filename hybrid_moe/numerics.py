"""The one rule that says whether a result is right. Nothing in this package compares results in another way."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch


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
        Largest ``||output - reference|| / ||reference||`` over the same tokens.
    """

    rtol: float = 0.2
    atol: float = 0.1
    required_matched_ratio: float = 0.85
    max_relative_l2: float = 0.05


DEFAULT_TOLERANCE = Tolerance()
# Kernels of this package differ from the definition only by the fp8 rounding of the inner activation (0.023).
OWN_KERNELS_TOLERANCE = Tolerance(max_relative_l2=0.03)


@dataclass(frozen=True, slots=True)
class Correctness:
    """How far a result is from the reference, and every rule that it breaks.

    Attributes
    ----------
    relative_l2, cosine, matched_ratio
        Over the tokens with local work; NaN, 0 and 0 for a result that isn't finite, 0, 1 and 1 where no token has any.
    max_abs_error
        Largest absolute error over all tokens.
    tolerance
        The bounds applied.
    failures
        One sentence for each rule broken; empty if the result is right.
    """

    relative_l2: float
    cosine: float
    matched_ratio: float
    max_abs_error: float
    tolerance: Tolerance
    failures: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether no rule is broken."""
        return not self.failures

    def to_dict(self) -> dict[str, float]:
        """The figures and the bounds, as a record's ``correctness`` has them."""
        figures = {"relative_l2": self.relative_l2, "cosine": self.cosine, "matched_ratio": self.matched_ratio}
        return figures | {"max_abs_error": self.max_abs_error} | asdict(self.tolerance)


def check(
    output: torch.Tensor,
    reference: torch.Tensor,
    has_local_work: torch.Tensor,
    tolerance: Tolerance = DEFAULT_TOLERANCE,
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

    Raises
    ------
    ValueError
        If the shapes differ.
    """
    if output.shape != reference.shape:
        raise ValueError(f"output has shape {list(output.shape)}; {list(reference.shape)} is wanted, the reference's")
    failures = []
    idle = output[~has_local_work]
    idle_error = float(idle.float().abs().max()) if idle.numel() else 0.0
    if idle.numel() and not bool((idle == 0).all()):
        count = int((idle != 0).any(dim=1).sum())
        failures.append(f"{count} of {idle.shape[0]} tokens without local work are not exactly zero")

    out, ref = output[has_local_work].float(), reference[has_local_work].float()
    if not out.numel():
        return Correctness(0.0, 1.0, 1.0, idle_error, tolerance, tuple(failures))
    if not bool(torch.isfinite(out).all()):
        count = int((~torch.isfinite(out)).sum())
        failures.append(f"{count} of {out.numel()} elements are not finite")
        return Correctness(math.nan, 0.0, 0.0, math.inf, tolerance, tuple(failures))

    error = (out - ref).abs()
    mismatch = (error > tolerance.atol) & (error > tolerance.rtol * ref.abs())
    matched = 1.0 - float(mismatch.float().mean(dtype=torch.float64))
    ref_norm, out_norm = _norm(ref), _norm(out)
    error_norm = _norm(error)
    relative_l2 = error_norm / ref_norm if ref_norm else (0.0 if error_norm == 0 else math.inf)
    dot = float(sum((o.double() * r.double()).sum() for o, r in zip(out.split(1024), ref.split(1024), strict=True)))
    cosine = dot / (ref_norm * out_norm) if ref_norm * out_norm else float(ref_norm == out_norm)
    if matched < tolerance.required_matched_ratio:
        failures.append(f"matched ratio {matched:.4f} is below {tolerance.required_matched_ratio}")
    if not relative_l2 <= tolerance.max_relative_l2:
        failures.append(f"relative L2 {relative_l2:.4f} is above {tolerance.max_relative_l2}")
    largest = max(float(error.max()), idle_error)
    return Correctness(relative_l2, cosine, matched, largest, tolerance, tuple(failures))


def _norm(x: torch.Tensor) -> float:
    # In float64 and by pieces: the squares of 10^8 float32 values lose digits, a float64 copy of them all is 0.8 GB.
    return math.sqrt(sum(float(piece.double().square().sum()) for piece in x.split(1024)))
