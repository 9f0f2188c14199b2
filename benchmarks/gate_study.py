"""What the bounds of the gate (`hybrid_moe.numerics`) come from, and what they catch.

python benchmarks/gate_study.py --output gate.json                        full size, on a GPU
python benchmarks/gate_study.py --output gate.json --hidden-size 512      the same with fewer columns, on a CPU
python benchmarks/gate_study.py --output gate.json --candidate "triton_fused[gemm=triton]"    kernels too, on a GPU

Honest results: `gate.pipelines` on the data of `gate.data`, 10,000 rows of each, and the kernels that are named; judged
in calls of few and many tokens. No result may be refused, and how near the worst figure comes to its bound is told.
Then bugs: each of `gate.corruptions`, and which rules refuse it. Exit code 1 after a false alarm, or if a corruption of
the largest call passes that isn't below an honest pipeline's own rounding.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from gate.corruptions import BELOW_ROUNDING, CORRUPTIONS, Bench
from gate.data import DATA_SETS, DataSet, tokens_of
from gate.pipelines import FUSED, PIPELINES, results

from hybrid_moe.candidate import BackendUnsupportedError, Candidate
from hybrid_moe.device import DeviceKey
from hybrid_moe.files import write_whole
from hybrid_moe.inputs import FP8, MoEInputs
from hybrid_moe.measure.bench import preparing, tolerance_of
from hybrid_moe.measure.sweep.plan import middle_rank
from hybrid_moe.measure.workloads import DEEPSEEK_V3, Workload, make_inputs, random_weights
from hybrid_moe.numerics import DEFAULT_TOLERANCE, OWN_KERNELS_TOLERANCE, Correctness, Tolerance, check

FIGURES = {
    "relative_l2": "relative_l2",
    "token": "token_relative_l2",
    "block": "block_relative_l2",
    "column": "column_relative_l2",
    "slope": "slope",
}
# Tokens in a call, and how many calls are judged.
CALLS = ((1, 100), (7, 100), (56, 50), (901, 10))
# Calls of fewer tokens are judged on the CPU, in less time than a GPU takes to launch what that is.
_FEW = 64
CORRUPTED_TOKENS = (901, 80, 7)
_BATCH = 4096


@dataclass(slots=True)
class Tail:
    """The worst of many honest results.

    Attributes
    ----------
    figures
        The largest of each; of the slope, how far from 1.
    of_bound
        The largest share of its bound.
    matched_ratio
        The smallest.
    """

    data: str
    pipeline: str
    rows: int = 0
    calls: int = 0
    false_alarms: int = 0
    matched_ratio: float = 1.0
    figures: dict[str, float] = field(default_factory=lambda: dict.fromkeys(FIGURES, 0.0))
    of_bound: dict[str, float] = field(default_factory=lambda: dict.fromkeys(FIGURES, 0.0))
    failures: list[str] = field(default_factory=list)

    def add(self, found: Correctness) -> None:
        """Take one more result."""
        self.calls += 1
        self.matched_ratio = min(self.matched_ratio, found.matched_ratio)
        if not found.passed:
            self.false_alarms += 1
            self.failures += found.failures[: 3 - len(self.failures)]
        for figure, attribute in FIGURES.items():
            value = getattr(found, attribute)
            value = abs(value - 1) if figure == "slope" else value
            self.figures[figure] = max(self.figures[figure], value)
            if found.bounds is not None:
                self.of_bound[figure] = max(self.of_bound[figure], value / getattr(found.bounds, figure))


def judge(
    tail: Tail,
    run: Callable[[slice], torch.Tensor],
    reference: torch.Tensor,
    tolerance: Tolerance,
    width: int,
    calls: Sequence[tuple[int, int]],
) -> None:
    """Judge results in calls of several sizes, and of all tokens."""
    rows = len(reference)
    tail.rows += rows
    on_cpu = reference.cpu()
    for size, most in (*calls, (rows, 1)):
        for first in range(0, min(rows - size + 1, size * most), size):
            some = slice(first, first + size)
            expected = (on_cpu if size < _FEW else reference)[some]
            everybody = torch.ones(size, dtype=torch.bool, device=expected.device)
            tail.add(check(run(some).to(expected.device), expected, everybody, tolerance, width=width))


def honest(data: DataSet, device: str, rows: int, candidates: Sequence[Candidate]) -> Iterator[Tail]:
    """The tails of each pipeline and each candidate on one kind of data."""
    tails = {p.name: Tail(data.name, p.name) for p in PIPELINES}
    kernels = {choice: Tail(data.name, str(choice)) for choice in candidates}
    width = data.width or data.problem.intermediate_size
    seed = 0
    while tails[FUSED.name].rows < rows:
        inputs = data.inputs(_BATCH, device, seed)
        reference, outputs, _ = results(inputs, data.problem)
        for p in PIPELINES:
            tolerance = OWN_KERNELS_TOLERANCE if p.own else DEFAULT_TOLERANCE
            judge(tails[p.name], outputs[p.name].__getitem__, reference, tolerance, width, CALLS if not seed else ())
        for choice in list(kernels):
            try:
                run = running(choice, inputs, data)
            except BackendUnsupportedError as error:
                print(f"{data.name}: {error}", flush=True)
                del kernels[choice]
                continue
            judge(kernels[choice], run, reference, tolerance_of(choice), width, CALLS if not seed else ())
        seed += 1
    yield from tails.values()
    yield from kernels.values()


def running(choice: Candidate, inputs: MoEInputs, data: DataSet) -> Callable[[slice], torch.Tensor]:
    """What a candidate gives for some of the tokens, as a call of their own."""
    prepare = preparing(data.problem, choice)
    prepare(tokens_of(inputs, slice(0, 1)))

    def run(some: slice) -> torch.Tensor:
        part = tokens_of(inputs, some)
        output = torch.full(part.hidden_states.shape, torch.nan, dtype=torch.bfloat16, device=part.hidden_states.device)
        prepare(part)(output)
        return output

    return run


def corrupted(device: str, hidden_size: int, tokens: int) -> Iterator[dict[str, Any]]:
    """What becomes of each corruption of one call of DeepSeek-V3's layer."""
    problem = replace(DEEPSEEK_V3, hidden_size=hidden_size)
    inputs = make_inputs(Workload(tokens, middle_rank(problem)), problem, random_weights(problem, device))
    before = inputs._replace(hidden_states=inputs.hidden_states.view(torch.uint8).roll(1, dims=1).view(FP8))
    reference, outputs, work = results(inputs, problem, (FUSED,))
    stale = results(before, problem, (FUSED,))[1][FUSED.name]
    bench = Bench.make(inputs, problem, stale)
    width = problem.intermediate_size
    control = check(bench.output, reference, work, OWN_KERNELS_TOLERANCE, width=width)
    assert control.passed and torch.allclose(bench.output, outputs[FUSED.name], rtol=0.01, atol=0.01), control
    for name, corrupt in CORRUPTIONS.items():
        output = corrupt(bench)
        if torch.equal(output, bench.output):
            continue  # the call is too small for this bug
        own, others = (
            check(output, reference, work, tolerance, width=width)
            for tolerance in (OWN_KERNELS_TOLERANCE, DEFAULT_TOLERANCE)
        )
        yield {
            "corruption": name,
            "tokens": tokens,
            "rules": rules(own),
            "rules_of_others": rules(others),
            "caught_by_the_whole": by_the_whole(own),
            **own.to_dict(),
        }


_RULES = (
    ("zero", "exactly zero"),
    ("finite", "not finite"),
    ("matched", "^matched ratio"),
    ("L2", "^relative L2"),
    ("token", "of [0-9]+ tokens have"),
    ("block", "of [0-9]+ blocks"),
    ("column", "of [0-9]+ columns"),
    ("slope", "^slope"),
)


def rules(found: Correctness) -> list[str]:
    """Short names of the rules that a result breaks."""
    return [name for name, pattern in _RULES if any(re.search(pattern, failure) for failure in found.failures)]


def by_the_whole(found: Correctness) -> bool:
    """Whether the rule that judged the whole alone (relative L2 of 0.03, a matched ratio of 0.85) would catch it."""
    return not (
        found.relative_l2 <= 0.03 and found.matched_ratio >= 0.85 and not {"zero", "finite"} & set(rules(found))
    )


def main() -> None:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file with everything")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--hidden-size", type=int, help="columns, a multiple of 128; default each model's own")
    parser.add_argument("--rows", type=int, default=10_000, help="honest rows of each kind of data")
    parser.add_argument("--only", nargs="*", help="data whose name has one of these; none: corruptions alone")
    parser.add_argument("--candidate", action="append", default=[], help="a backend to judge as well, on a GPU")
    parser.add_argument("--tokens", type=int, nargs="*", default=CORRUPTED_TOKENS, help="T of the corrupted calls")
    options = parser.parse_args()

    wrong = False
    tails, found = [], []
    chosen = [d for d in DATA_SETS if options.only is None or any(part in d.name for part in options.only)]
    with torch.inference_mode():
        if chosen:
            print("| data | pipeline | rows | calls | alarms | matched | " + " | ".join(FIGURES) + " |")
            print("|---|---|" + "---:|" * (4 + len(FIGURES)))
        for data in chosen:
            candidates = [Candidate.parse(text) for text in options.candidate]
            for tail in honest(data.scaled(options.hidden_size), options.device, options.rows, candidates):
                tails.append(asdict(tail))
                wrong |= tail.false_alarms > 0
                figures = " | ".join(f"{tail.figures[f]:.4f} ({tail.of_bound[f]:.0%})" for f in FIGURES)
                print(
                    f"| {tail.data} | {tail.pipeline} | {tail.rows} | {tail.calls} | {tail.false_alarms} "
                    f"| {tail.matched_ratio:.3f} | {figures} |",
                    *tail.failures,
                    flush=True,
                )
        for tokens in options.tokens:
            print(f"\n| planted at T = {tokens} | the whole alone | refused by | with the bounds of other backends |")
            print("|---|---|---|---|")
            for result in corrupted(options.device, options.hidden_size or DEEPSEEK_V3.hidden_size, tokens):
                found.append(result)
                name = result["corruption"]
                # Of few tokens some bugs are smaller than what honest results scatter.
                wrong |= tokens == max(options.tokens) and not result["rules"] and name not in BELOW_ROUNDING
                whole = "refuses" if result["caught_by_the_whole"] else "passes"
                own, others = (", ".join(result[k]) or "passes" for k in ("rules", "rules_of_others"))
                remark = f" ({BELOW_ROUNDING[name]})" if name in BELOW_ROUNDING else ""
                print(f"| {name}{remark} | {whole} | {own} | {others} |", flush=True)
    where = {"device": DeviceKey.of(options.device).name, "torch": torch.__version__}
    where["hidden_size"] = str(options.hidden_size or "each model's own")
    content = json.dumps({"where": where, "honest": tails, "corruptions": found}, indent=1) + "\n"
    write_whole(options.output, content.encode())
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    main()
