"""What warming up compiles ahead, for a GPU that isn't there and without compiling: `test_compile.py` runs it.

Prints one JSON object: the kernels compiled ahead, the most at a time, and those that calls compile after it.
"""

import json
import threading
import time
import types

import torch
import triton
import triton.compiler
from compile_pipeline import AbsentDriver, untouched_inputs

from hybrid_moe.inputs import RoutedInputs
from hybrid_moe.kernels import pipeline
from hybrid_moe.kernels.grouped_gemm.triton.provider import TritonGroupedGemm
from hybrid_moe.kernels.launcher import DeviceLimits, compiling_in_parallel
from hybrid_moe.problem import MoEProblem

# As SGLang captures graphs, and a prefill.
TOKEN_COUNTS = (1, 2, 4, 8, 12, *range(16, 257, 8), 512, 1024, 2048, 4096, 8192)

lock = threading.Lock()
compiled: list[str] = []
at_once = [0]


def compile_nothing(src, target=None, options=None, _env_vars=None):
    """In place of Triton's compiler: takes a moment, as that does."""
    with lock:
        compiled.append(src.fn.__name__)
        at_once.append(at_once[-1] + 1)
    time.sleep(0.2)
    with lock:
        at_once.append(at_once[-1] - 1)
    nothing = {name: lambda *arguments: None for name in ("launch_metadata", "run")}
    return types.SimpleNamespace(name=src.fn.__name__, function=None, packed_metadata=None, **nothing)


def calls(problem):
    for tokens in TOKEN_COUNTS:
        inputs = untouched_inputs(problem, tokens)
        ids, weights = torch.empty(tokens, problem.top_k, dtype=torch.int32), torch.empty(tokens, problem.top_k)
        yield inputs
        yield RoutedInputs(ids, weights, *inputs[2:])


def main() -> None:
    triton.runtime.driver.set_active(AbsentDriver(90))
    triton.compiler.compile = compile_nothing
    pipeline.limits_of = lambda device: DeviceLimits(132, pdl=True)
    problem = MoEProblem()
    ours = pipeline.Pipeline(problem, TritonGroupedGemm((9, 0)))
    with compiling_in_parallel():
        for inputs in calls(problem):
            ours.compile(inputs)
    ahead = list(compiled)
    compiled.clear()
    for inputs in calls(problem):
        ours.run(inputs, torch.empty(inputs.num_tokens, problem.hidden_size, dtype=torch.bfloat16))
    print(json.dumps({"ahead": ahead, "at_once": max(at_once), "after": compiled}))


if __name__ == "__main__":
    main()
