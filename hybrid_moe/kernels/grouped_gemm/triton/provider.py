"""Provider ``triton``: this package's own GEMMs with their tiles; needs no other library."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import torch

from ....device import DeviceKey
from ....problem import MoEProblem
from ...arena import Arena
from ...combine import combine
from ...launcher import DeviceLimits
from ...plan import LaunchKey
from ...shapes import column_chunk, max_local_rows
from ...steps import AnyStep, Step
from ..base import GroupedGemm
from ..completion import Signals
from ..sm90 import few_rows, many_rows, narrow, one_token
from ..sm90.share import ALL, Share
from ..tiles import Specialized, TilePlan, tile_plan
from . import gemm1, gemm2


class TritonGroupedGemm(GroupedGemm):
    """Two launches: GEMM1 with gather, SwiGLU and quantisation; GEMM2."""

    name = "triton"

    def __init__(self, capability: tuple[int, int] | None = None) -> None:
        self._capability = capability

    def plan(self, problem: MoEProblem, num_tokens: int) -> TilePlan:
        """The tiles that `steps` uses."""
        return tile_plan(problem, num_tokens, self._capability)

    def not_supported_reasons(self, problem: MoEProblem, device: DeviceKey) -> list[str]:
        """None: what Triton needs is asked by the backend."""
        return []

    def reserve(self, arena: Arena, problem: MoEProblem, num_tokens: int, row_alignment: int) -> None:
        """The activation with its scales (twice over in float32 for narrow tiles), and one chunk of result columns."""
        rows = max_local_rows(problem, num_tokens)
        # The kernels for few rows replace narrow tiles only, which need the same tensors.
        gemm1.reserve_activation(arena, problem, rows, self.plan(problem, num_tokens).gemm1)
        arena.reserve("rows", (rows, column_chunk(problem, rows)), torch.bfloat16)

    def sizing(self, problem: MoEProblem, num_tokens: int) -> Hashable:
        """The tiles, and how many columns of the result there are at a time."""
        return self.plan(problem, num_tokens), column_chunk(problem, max_local_rows(problem, num_tokens))

    def counters(self, problem: MoEProblem, num_tokens: int) -> Mapping[str, int]:
        """Tiles done of each 128 block of the activation, ``[row tiles, I/128]``; tiles drawn of each launch."""
        plan = self.plan(problem, num_tokens)
        arrivals = gemm1.block_arrivals(problem, num_tokens, plan.gemm1)
        if Specialized.FEW in plan.specialized:
            arrivals = max(arrivals, few_rows.block_arrivals(problem, num_tokens))
        counters = {"block_arrivals": arrivals}
        if any(plan.specialized):
            counters["gemm1_tile_counter"] = 1
            chunk = column_chunk(problem, max_local_rows(problem, num_tokens))
            counters["gemm2_tile_counter"] = problem.hidden_size // chunk
        if plan.many_above is not None:
            (many, *_), _ = plan.pairs(num_tokens)
            counters[many.counter("finished")] = problem.num_local_experts + 1
            counters |= {many.counter(name): counters[name] for name in ("gemm1_tile_counter", "gemm2_tile_counter")}
        return counters

    def whole_steps(self, problem: MoEProblem, limits: DeviceLimits, key: LaunchKey) -> list[AnyStep] | None:
        """Two launches of one token."""
        if not key.aligned or not one_token.fits(problem, key.num_tokens, self._capability):
            return None
        return [one_token.gemm1(problem, limits, key), one_token.gemm2(problem, limits, key)]

    def steps(self, problem: MoEProblem, limits: DeviceLimits, key: LaunchKey) -> list[AnyStep]:
        """GEMM1 and GEMM2 of each pair, the last one's GEMM2 and the combine for each chunk of columns."""
        plan = self.plan(problem, key.num_tokens)
        columns = column_chunk(problem, max_local_rows(problem, key.num_tokens))
        if self._capability is not None and self._capability < (9, 0):  # no TMA
            key = key._replace(aligned=False)
        first, second = plan.specialized if key.aligned else (None, None)
        if key.stride_hidden % 16:  # each row is copied 16 bytes at a time
            first = None
        pairs = plan.pairs(key.num_tokens)
        if (first, second) != plan.specialized or columns != problem.hidden_size:
            pairs = ((ALL, first, second),)
        steps: list[AnyStep] = []
        for share, first, second in pairs:
            step, signals = _gemm1(problem, limits, key, plan, first, share)
            steps.append(step)
            for first_column in range(0, problem.hidden_size, columns):
                steps.append(_gemm2(problem, limits, key, plan, second, columns, first_column, signals, share))
                if share == pairs[-1][0]:
                    steps.append(combine(problem, limits, key, columns, first_column))
        return steps


def _gemm1(
    problem: MoEProblem,
    limits: DeviceLimits,
    key: LaunchKey,
    plan: TilePlan,
    kernels: Specialized | None,
    share: Share,
) -> tuple[Step, Signals]:
    if kernels is Specialized.MANY:
        return many_rows.gemm1(problem, limits, key, share), many_rows.signals(problem)
    if kernels is Specialized.FEW:
        return few_rows.gemm1(problem, limits, key, share), few_rows.signals(problem, key.num_tokens)
    return gemm1.gemm1(problem, limits, key, plan.gemm1), gemm1.signals(problem, plan.gemm1)


def _gemm2(
    problem: MoEProblem,
    limits: DeviceLimits,
    key: LaunchKey,
    plan: TilePlan,
    kernels: Specialized | None,
    columns: int,
    first_column: int,
    signals: Signals,
    share: Share,
) -> Step:
    if kernels is Specialized.MANY and columns % many_rows.COLUMNS == 0:
        return many_rows.gemm2(problem, limits, key, columns, first_column, signals, share)
    if kernels is Specialized.NARROW:
        return narrow.gemm2(problem, limits, key, columns, first_column, signals, share)
    if kernels is Specialized.FEW:
        return few_rows.gemm2(problem, limits, key, columns, first_column, signals, share)
    return gemm2.gemm2(problem, limits, key, plan.gemm2, columns, first_column, signals)
