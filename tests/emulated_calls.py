"""Calls of the pipeline for Hopper, kernels and launches as serving has them, in the emulation (`gluon_emulation`)."""

from __future__ import annotations

import dataclasses

import gluon_emulation
import torch

from hybrid_moe import MoEProblem
from hybrid_moe.inputs import RoutedInputs
from hybrid_moe.kernels.grouped_gemm.tiles import Specialized
from hybrid_moe.kernels.grouped_gemm.triton.provider import TritonGroupedGemm
from hybrid_moe.kernels.launcher import Constants, DeviceLimits
from hybrid_moe.kernels.pipeline import Pipeline
from hybrid_moe.kernels.plan import LaunchKey, addresses_of, by_name
from hybrid_moe.measure.workloads import Workload, make_inputs, random_weights
from hybrid_moe.numerics import Tolerance, check
from hybrid_moe.reference import has_local_work, moe_reference

# Against the reference that rounds the activation as the kernels do.
TWIN_TOLERANCE = Tolerance(max_relative_l2=0.01)
FEW, MANY, NARROW = Specialized
SMALL = MoEProblem(
    num_experts=16, num_local_experts=4, top_k=4, n_group=1, topk_group=1, hidden_size=512, intermediate_size=384
)


def given_rows(problem: MoEProblem, rows: list[int], tokens: int | None = None, seed: int = 0) -> RoutedInputs:
    """A call in which each local expert has so many rows, of ``tokens`` tokens drawn at random."""
    tokens = max(rows) if tokens is None else tokens
    inputs = make_inputs(Workload(tokens, 3, seed=seed), problem, random_weights(problem, "cpu", seed))
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((tokens, problem.top_k), -1, dtype=torch.int32)
    for expert, count in enumerate(rows):
        chosen = torch.randperm(tokens, generator=generator)[:count]
        ids[chosen, expert] = 3 + expert
    weights = torch.rand(ids.shape, generator=generator) + 0.5
    return RoutedInputs(ids, weights, *inputs[2:])


class Given(TritonGroupedGemm):
    """With the specialised kernels that a test wants, or None for the others."""

    def __init__(self, first: Specialized | None, second: Specialized | None, many_above: float | None = None) -> None:
        super().__init__((9, 0))
        self._wanted = first, second
        self._many_above = many_above

    def whole_steps(self, problem, limits, key):
        return None

    def plan(self, problem, num_tokens):
        # Tiles for few rows need the memory that kernels for few rows need.
        tokens_per_expert = 2 if FEW in self._wanted else 100
        usual = super().plan(problem, tokens_per_expert * problem.num_experts // problem.top_k)
        return dataclasses.replace(usual, specialized=self._wanted, many_above=self._many_above)


class Call:
    """One call, its memory full of ones: NaN, and -1."""

    def __init__(self, problem: MoEProblem, inputs, gemm: TritonGroupedGemm, num_sms: int = 2) -> None:
        self.problem, self.inputs = problem, inputs
        self.output = torch.full((inputs.num_tokens, problem.hidden_size), float("nan"), dtype=torch.bfloat16)
        key = LaunchKey.of(inputs, addresses_of(inputs), self.output, 1)
        self.plan = Pipeline(problem, gemm).plan(key, torch.device("cpu"), DeviceLimits(num_sms, pdl=True))
        memory = torch.full((self.plan.arena.bytes + 256,), 0xFF, dtype=torch.uint8)
        self.memory = memory[-memory.data_ptr() % 256 :]

    @property
    def kernels(self) -> list[str]:
        """Their names, in the order of their launches."""
        return [step.kernel.function.fn.__name__ for step in self.plan.steps]

    def steps(self, stages: int | None):
        """Of the plan; in ``stages``, fewer than serving has, sums may be shorter."""

        def changed(constants):
            arguments = dict(constants.arguments)
            if "STAGES" in arguments:
                # Those of `sm90.narrow` hold a tile's whole sum.
                least = arguments["INTERMEDIATE"] // 128 if "UNIT_N" in arguments else 1
                arguments["STAGES"] = max(stages, least)
            return Constants(arguments, constants.options)

        steps = self.plan.steps
        return steps if stages is None else [dataclasses.replace(s, constants=changed(s.constants)) for s in steps]

    def operands(self, memory: torch.Tensor | None = None):
        """What the names in the steps stand for."""
        names = by_name(self.inputs, self.output, self.plan.arena, self.memory if memory is None else memory)
        # The routing of one token clears what lies behind them too.
        return dict(names) | ({"tokens_per_expert": names["counters"]} if self.inputs.num_tokens == 1 else {})

    def run(self, seed: int = 0, delay=None, stages: int | None = None) -> torch.Tensor:
        """The output, once it is found right."""
        gluon_emulation.run_steps(self.steps(stages), [self.operands()], seed, delay)
        return self.checked()

    def checked(self) -> torch.Tensor:
        """The output, if it is right."""
        reference = moe_reference(self.inputs, self.problem, quantize_intermediate=True)
        found = check(self.output, reference, has_local_work(self.inputs, self.problem), TWIN_TOLERANCE)
        assert found.failures == ()
        return self.output
