"""Bugs of the kinds that kernels have, planted in an honest result: what the gate must catch.

A corruption is a function from a `Bench` (a call with all that an honest pipeline computed in it) to a wrong output.
Each is as small as the bug allows: one row, one column, one expert, one block of scales.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from hybrid_moe.inputs import FP8, MoEInputs
from hybrid_moe.problem import MoEProblem

from .pipelines import FUSED, Expert, Pairs, Pipeline, combined, hidden_rows, rows_of, swiglu, to_bf16, to_fp8

BLOCK = 128


@dataclass(frozen=True, slots=True)
class Bench:
    """One call and what an honest pipeline made of it.

    Attributes
    ----------
    busy
        The expert with most rows: a bug in one expert is planted there.
    rows
        ``[P, H]``: what GEMM2 stored for each pair.
    output
        ``[T, H]``.
    stale
        The output of another call of the same size.
    """

    inputs: MoEInputs
    problem: MoEProblem
    pairs: Pairs
    busy: int
    rows: torch.Tensor
    output: torch.Tensor
    stale: torch.Tensor

    @classmethod
    def make(cls, inputs: MoEInputs, problem: MoEProblem, stale: torch.Tensor) -> Bench:
        """Compute the rows of every pair."""
        pairs = Pairs.of(inputs, problem)
        rows = torch.cat(
            [
                rows_of(hidden_rows(inputs, pairs.token[mine]), Expert.of(inputs, number), FUSED)
                for number in range(problem.num_local_experts)
                if len(mine := pairs.of_expert(number))
            ]
        )
        busy = int(torch.bincount(pairs.expert).argmax())
        return cls(inputs, problem, pairs, busy, rows, combined(rows, pairs, inputs.num_tokens, FUSED), stale)

    @property
    def mine(self) -> torch.Tensor:
        """Numbers of the busy expert's pairs."""
        return self.pairs.of_expert(self.busy)

    @property
    def token(self) -> int:
        """A token with work: the first of the busy expert's."""
        return int(self.pairs.token[self.mine[0]])

    def tokens(self, count: int) -> torch.Tensor:
        """So many tokens with work."""
        return self.pairs.token.unique()[:count]

    def changed(self, change: Callable[[torch.Tensor], None]) -> torch.Tensor:
        """The output after ``change`` has been at it."""
        output = self.output.clone()
        change(output)
        return output

    def combined(self, rows: torch.Tensor | None = None, weight: torch.Tensor | None = None) -> torch.Tensor:
        """The output with other rows or other weights."""
        pairs = self.pairs if weight is None else replace(self.pairs, weight=weight)
        return combined(self.rows if rows is None else rows, pairs, self.inputs.num_tokens, FUSED)

    def without(self, pairs: torch.Tensor) -> torch.Tensor:
        """The output if the rows of these pairs are zero."""
        rows = self.rows.clone()
        rows[pairs] = 0
        return self.combined(rows)

    def expert(self, **tensors: torch.Tensor) -> Expert:
        """The busy expert's weights, with the inputs' tensors replaced."""
        return Expert.of(self.inputs._replace(**tensors), self.busy)

    def recomputed(
        self,
        expert: Expert | None = None,
        x: torch.Tensor | None = None,
        pipeline: Pipeline = FUSED,
        rows: Callable[[torch.Tensor, Expert], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """The output if the busy expert's rows are computed otherwise."""
        expert = self.expert() if expert is None else expert
        x = self.x if x is None else x
        result = self.rows.clone()
        result[self.mine] = rows_of(x, expert, pipeline) if rows is None else to_bf16(rows(x, expert))
        return self.combined(result)

    @property
    def x(self) -> torch.Tensor:
        """Hidden states of the busy expert's rows."""
        return hidden_rows(self.inputs, self.pairs.token[self.mine])


Corruption = Callable[[Bench], torch.Tensor]
CORRUPTIONS: dict[str, Corruption] = {}
# Smaller than the rounding of an honest pipeline: no bound that passes those can catch these.
BELOW_ROUNDING: dict[str, str] = {}


def planted(name: str, below_rounding: str = "") -> Callable[[Corruption], Corruption]:
    """Register a corruption."""

    def register(function: Corruption) -> Corruption:
        CORRUPTIONS[name] = function
        if below_rounding:
            BELOW_ROUNDING[name] = below_rounding
        return function

    return register


def _of_output(name: str, change: Callable[[torch.Tensor, Bench], None], below_rounding: str = "") -> None:
    planted(name, below_rounding)(lambda bench: bench.changed(lambda output: change(output, bench)))


def _scaled(factor: float, index: Callable[[Bench], object]) -> Callable[[torch.Tensor, Bench], None]:
    def change(output: torch.Tensor, bench: Bench) -> None:
        output[index(bench)] = to_bf16(output[index(bench)] * factor)  # type: ignore[index]

    return change


# ---- What is stored -----------------------------------------------------------------------------------------------

_COLUMN = 77
_of_output("one row zero", _scaled(0.0, lambda b: b.token))
_of_output("one row times 1.05", _scaled(1.05, lambda b: b.token))
_of_output("one row with the wrong sign", _scaled(-1.0, lambda b: b.token))
_of_output("one column zero", _scaled(0.0, lambda b: (slice(None), _COLUMN)))
_of_output("one column doubled", _scaled(2.0, lambda b: (slice(None), _COLUMN)))
_of_output("one column times 1.05", _scaled(1.05, lambda b: (slice(None), _COLUMN)))
_of_output("last 8 columns zero", _scaled(0.0, lambda b: (slice(None), slice(-8, None))))
_of_output("last block of columns zero", _scaled(0.0, lambda b: (slice(None), slice(-BLOCK, None))))
_of_output("last block of one row zero", _scaled(0.0, lambda b: (b.token, slice(-BLOCK, None))))
_of_output("one block of one row times 1.1", _scaled(1.1, lambda b: (b.token, slice(BLOCK))))
_of_output("everything times 1.015", _scaled(1.015, lambda b: slice(None)))
_of_output("everything times 0.985", _scaled(0.985, lambda b: slice(None)))
_of_output("everything times 1.005", _scaled(1.005, lambda b: slice(None)))
_of_output("one row rotated by a column", lambda o, b: o.__setitem__(b.token, o[b.token].roll(1)))
_of_output("every row rotated by 8 columns", lambda o, b: o.copy_(o.roll(8, dims=1)))
_of_output("two rows swapped", lambda o, b: o.__setitem__(b.tokens(2), o[b.tokens(2).flip(0)]))
_of_output("two columns swapped", lambda o, b: o.__setitem__((slice(None), [8, 9]), o[:, [9, 8]]))
_of_output("a row of the call before", lambda o, b: o.__setitem__(b.token, b.stale[b.token]))
_of_output(
    "a block of a row of the call before", lambda o, b: o.__setitem__((b.token, slice(BLOCK)), b.stale[b.token, :BLOCK])
)
_of_output("one element NaN", lambda o, b: o.__setitem__((b.token, _COLUMN), math.nan))
_of_output("one element infinite", lambda o, b: o.__setitem__((b.token, _COLUMN), math.inf))
_of_output(
    "one element off by its row's size", lambda o, b: o[b.token, _COLUMN].add_(float(o[b.token].square().mean().sqrt()))
)
_of_output(
    "noise of 3%",
    lambda o, b: o.mul_(1 + 0.03 * torch.randn(o.shape, generator=torch.Generator().manual_seed(0)).to(o.device)),
)


@planted("a token without local work isn't zero")
def _idle(bench: Bench) -> torch.Tensor:
    busy = set(bench.pairs.token.tolist())
    idle = next((token for token in range(bench.inputs.num_tokens) if token not in busy), None)
    return bench.output if idle is None else bench.changed(lambda o: o.__setitem__((idle, 0), 1e-30))


# ---- Routing, tiles and the combine -------------------------------------------------------------------------------


@planted("one expert's rows missing")
def _no_expert(bench: Bench) -> torch.Tensor:
    return bench.without(bench.mine)


@planted("one pair missing")
def _no_pair(bench: Bench) -> torch.Tensor:
    return bench.without(bench.mine[:1])


@planted("last row of an expert missing")
def _last_row(bench: Bench) -> torch.Tensor:
    return bench.without(bench.mine[-1:])


@planted("last row of a full tile of 16 missing")
def _tile(bench: Bench) -> torch.Tensor:
    return bench.without(bench.mine[15:16] if len(bench.mine) > 15 else bench.mine[-1:])


@planted("rows after the first tile missing")
def _one_tile(bench: Bench) -> torch.Tensor:
    return bench.without(bench.mine[min(64, len(bench.mine) - 1) :])


@planted("one pair added twice")
def _twice(bench: Bench) -> torch.Tensor:
    weight = bench.pairs.weight.clone()
    weight[bench.mine[0]] *= 2
    return bench.combined(weight=weight)


@planted("one pair's weight 10% too large")
def _weight(bench: Bench) -> torch.Tensor:
    weight = bench.pairs.weight.clone()
    weight[bench.mine[0]] *= 1.1
    return bench.combined(weight=weight)


@planted("weights of neighbouring pairs")
def _other_weights(bench: Bench) -> torch.Tensor:
    return bench.combined(weight=bench.pairs.weight.roll(1))


@planted("weights of one expert's neighbouring pairs")
def _other_weights_of_one(bench: Bench) -> torch.Tensor:
    weight = bench.pairs.weight.clone()
    weight[bench.mine] = weight[bench.mine].roll(1)
    return bench.combined(weight=weight)


@planted("routed scaling factor left out")
def _factor(bench: Bench) -> torch.Tensor:
    return bench.combined(weight=bench.pairs.weight / bench.inputs.routed_scaling_factor)


@planted("weights squared")
def _squared(bench: Bench) -> torch.Tensor:
    return bench.combined(weight=bench.pairs.weight.square())


@planted("rows of an expert shifted by one")
def _shifted(bench: Bench) -> torch.Tensor:
    rows = bench.rows.clone()
    rows[bench.mine] = rows[bench.mine].roll(1, dims=0)
    return bench.combined(rows)


@planted("two pairs of an expert swapped")
def _swapped(bench: Bench) -> torch.Tensor:
    rows, two = bench.rows.clone(), bench.mine[[0, -1]]
    rows[two] = rows[two.flip(0)]
    return bench.combined(rows)


@planted("the next expert's weights")
def _next_expert(bench: Bench) -> torch.Tensor:
    return bench.recomputed(Expert.of(bench.inputs, (bench.busy + 1) % bench.problem.num_local_experts))


@planted("the next expert's weights in GEMM2")
def _next_w2(bench: Bench) -> torch.Tensor:
    other = Expert.of(bench.inputs, (bench.busy + 1) % bench.problem.num_local_experts)
    return bench.recomputed(replace(bench.expert(), w2=other.w2))


@planted("one row of another token in GEMM1")
def _other_token(bench: Bench) -> torch.Tensor:
    x = bench.x.clone()
    x[0] = hidden_rows(bench.inputs, bench.pairs.token[bench.mine[-1:] - 1])[0] if len(x) == 1 else x[-1]
    return bench.recomputed(x=x)


# ---- Scales and blocks of one expert ------------------------------------------------------------------------------


def _scale(bench: Bench, name: str, change: Callable[[torch.Tensor], None]) -> Expert:
    scale = getattr(bench.inputs, name).clone()
    change(scale[bench.busy])
    return bench.expert(**{name: scale})


def _double(scale: torch.Tensor) -> None:
    scale[0, 1] *= 2


def _off_by_one_in_k(scale: torch.Tensor) -> None:
    scale.copy_(scale.roll(1, dims=1))


def _off_by_one_in_n(scale: torch.Tensor) -> None:
    scale.copy_(scale.roll(1, dims=0))


for _name, _what in (("gemm1_weights_scale", "GEMM1"), ("gemm2_weights_scale", "GEMM2")):
    for _label, _change in (
        ("a block's scale doubled", _double),
        ("scales off by one in K", _off_by_one_in_k),
        ("scales off by one in N", _off_by_one_in_n),
    ):
        planted(f"{_what}: {_label}")(
            lambda bench, name=_name, change=_change: bench.recomputed(_scale(bench, name, change))  # type: ignore[misc]
        )


@planted("GEMM1: all scales of one expert 3% too large")
def _three_percent(bench: Bench) -> torch.Tensor:
    expert = bench.expert()
    return bench.recomputed(replace(expert, w13=expert.w13 * 1.03))


@planted("GEMM1: scale of the row before")
def _row_before(bench: Bench) -> torch.Tensor:
    scale = bench.inputs.hidden_states_scale[:, bench.pairs.token[bench.mine]].t()
    ratio = (scale.roll(1, dims=0) if len(scale) > 1 else scale * 1.5) / scale
    return bench.recomputed(x=bench.x * ratio.repeat_interleave(BLOCK, dim=1))


@planted("GEMM1: one block's scale of one token doubled")
def _token_scale(bench: Bench) -> torch.Tensor:
    x = bench.x.clone()
    x[0, :BLOCK] *= 2
    return bench.recomputed(x=x)


@planted("GEMM1: last block of K left out")
def _no_last_k(bench: Bench) -> torch.Tensor:
    expert = bench.expert()
    w13 = expert.w13.clone()
    w13[:, -BLOCK:] = 0
    return bench.recomputed(replace(expert, w13=w13))


@planted("GEMM1: a block of K twice")
def _k_twice(bench: Bench) -> torch.Tensor:
    x = bench.x.clone()
    x[:, :BLOCK] *= 2
    return bench.recomputed(x=x)


@planted("GEMM2: last block of K left out")
def _no_last_k2(bench: Bench) -> torch.Tensor:
    expert = bench.expert()
    w2 = expert.w2.clone()
    w2[:, -BLOCK:] = 0
    return bench.recomputed(replace(expert, w2=w2))


@planted("GEMM2: last 32 of K left out")
def _no_last_32(bench: Bench) -> torch.Tensor:
    expert = bench.expert()
    w2 = expert.w2.clone()
    w2[:, -32:] = 0
    return bench.recomputed(replace(expert, w2=w2))


@planted("GEMM2: a tile of columns of the next expert")
def _tile_of_next(bench: Bench) -> torch.Tensor:
    expert, other = bench.expert(), Expert.of(bench.inputs, (bench.busy + 1) % bench.problem.num_local_experts)
    return bench.recomputed(replace(expert, w2=torch.cat([other.w2[:BLOCK], expert.w2[BLOCK:]])))


@planted("GEMM2: two columns of weights swapped")
def _swapped_weights(bench: Bench) -> torch.Tensor:
    expert = bench.expert()
    w2 = expert.w2.clone()
    w2[:, [0, 1]] = w2[:, [1, 0]]
    return bench.recomputed(replace(expert, w2=w2))


# ---- The activation -----------------------------------------------------------------------------------------------


@planted("gate and up swapped")
def _gate_up(bench: Bench) -> torch.Tensor:
    expert = bench.expert()
    return bench.recomputed(replace(expert, w13=torch.cat(expert.w13.chunk(2)[::-1])))


@planted("gate and up swapped in one block")
def _gate_up_block(bench: Bench) -> torch.Tensor:
    expert, half = bench.expert(), bench.problem.intermediate_size
    w13 = expert.w13.clone()
    w13[:BLOCK], w13[half : half + BLOCK] = expert.w13[half : half + BLOCK], expert.w13[:BLOCK]
    return bench.recomputed(replace(expert, w13=w13))


def _activated(bench: Bench, activate: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    return bench.recomputed(rows=lambda x, expert: expert.gemm2(activate(expert.gemm1(x))))


@planted("ReLU for SiLU")
def _relu(bench: Bench) -> torch.Tensor:
    return _activated(bench, lambda h: to_fp8(h.chunk(2, dim=1)[1].relu() * h.chunk(2, dim=1)[0]))


@planted("GELU for SiLU")
def _gelu(bench: Bench) -> torch.Tensor:
    gelu = torch.nn.functional.gelu
    return _activated(bench, lambda h: to_fp8(gelu(h.chunk(2, dim=1)[1]) * h.chunk(2, dim=1)[0]))


@planted("inner scale of the row before")
def _inner_row(bench: Bench) -> torch.Tensor:
    def activate(hidden: torch.Tensor) -> torch.Tensor:
        result = to_fp8(swiglu(hidden))
        amax = result.unflatten(1, (-1, BLOCK)).abs().amax(dim=2)
        other = amax.roll(1, dims=0) if len(amax) > 1 else amax * 1.5
        return result * (other / amax.clamp_min(1e-30)).repeat_interleave(BLOCK, dim=1)

    return _activated(bench, activate)


@planted("inner scale of the next block")
def _inner_block(bench: Bench) -> torch.Tensor:
    def activate(hidden: torch.Tensor) -> torch.Tensor:
        result = to_fp8(swiglu(hidden))
        amax = result.unflatten(1, (-1, BLOCK)).abs().amax(dim=2)
        other = amax.roll(1, dims=1) if amax.shape[1] > 1 else amax * 1.5
        return result * (other / amax.clamp_min(1e-30)).repeat_interleave(BLOCK, dim=1)

    return _activated(bench, activate)


def _quantised(x: torch.Tensor, dtype: torch.dtype, largest: float, clip: float = 1.0) -> torch.Tensor:
    blocks = x.unflatten(1, (-1, BLOCK))
    scale = blocks.abs().amax(dim=2, keepdim=True).clamp_min(1e-10) / largest * clip
    return ((blocks / scale).clamp(-largest, largest).to(dtype).float() * scale).flatten(1)


@planted("inner rounding to e5m2")
def _e5m2(bench: Bench) -> torch.Tensor:
    return _activated(bench, lambda h: _quantised(swiglu(h), torch.float8_e5m2, 57344.0))


@planted("inner values clipped at half of their largest")
def _clipped(bench: Bench) -> torch.Tensor:
    return _activated(bench, lambda h: _quantised(swiglu(h), FP8, 448.0, clip=0.5))


@planted("inner rounding towards zero")
def _truncated(bench: Bench) -> torch.Tensor:
    def activate(hidden: torch.Tensor) -> torch.Tensor:
        x = swiglu(hidden)
        blocks = x.unflatten(1, (-1, BLOCK))
        scale = blocks.abs().amax(dim=2, keepdim=True).clamp_min(1e-10) / 448.0
        value = blocks / scale
        # Down to the next value of e4m3: less half a unit of three bits of mantissa, then rounded.
        unit = torch.exp2(torch.floor(torch.log2(value.abs().clamp_min(2.0**-6))) - 3)
        return ((value.abs() - unit / 2).clamp_min(0).to(FP8).float() * value.sign() * scale).flatten(1)

    return _activated(bench, activate)


@planted("one activation element of one row lost", "an element is 1/45 of its row: as much as an honest rounding")
def _one_element(bench: Bench) -> torch.Tensor:
    def activate(hidden: torch.Tensor) -> torch.Tensor:
        result = to_fp8(swiglu(hidden))
        result[0, 0] = 0
        return result

    return _activated(bench, activate)


@planted("one weight of GEMM2 lost", "1/45 of a column, for the tokens of one expert alone")
def _one_weight(bench: Bench) -> torch.Tensor:
    expert = bench.expert()
    w2 = expert.w2.clone()
    w2[0, 0] = 0
    return bench.recomputed(replace(expert, w2=w2))
