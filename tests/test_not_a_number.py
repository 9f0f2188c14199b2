"""What is no number in a call's inputs is none in the rows that depend on it, and changes nothing else.

NaN in a token's activations, scales or logits, or in an expert that it uses, makes NaN of that token's row, as in the
reference; all other elements keep their bits. Infinity makes what is no finite number in the same places.

``python tests/test_not_a_number.py`` prints the table of the backends named, or of all that run on this machine's GPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import sys

import gluon_emulation
import pytest
import torch
from emulated_calls import FEW, MANY, Call, Given, given_rows
from given_routing import routed_of
from test_library_gemms import deep_gemm_library, sgl_library  # noqa: F401 (fixtures)

from hybrid_moe import Candidate, DeviceKey, HybridMoE, MoEProblem, backends
from hybrid_moe.inputs import MoEInputs
from hybrid_moe.kernels import interpreter
from hybrid_moe.kernels.grouped_gemm.deep_gemm import DeepGemmGroupedGemm
from hybrid_moe.kernels.grouped_gemm.sgl import SglGroupedGemm
from hybrid_moe.kernels.grouped_gemm.triton.provider import TritonGroupedGemm
from hybrid_moe.kernels.pipeline import Pipeline
from hybrid_moe.measure.workloads import DEEPSEEK_V3, Workload, make_inputs, random_weights
from hybrid_moe.policy import resolve
from hybrid_moe.reference import has_local_work, local_rows_per_expert_and_token, moe_reference

SMALL = MoEProblem(
    num_experts=16, num_local_experts=4, top_k=4, n_group=4, topk_group=2, hidden_size=256, intermediate_size=256
)
ON_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled where there is a GPU")
pytestmark = [
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning"),
]

# ---- What is spoilt -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Where:
    """A token with local work, one of the local experts that it chose, and a token without local work, if any."""

    token: int
    expert: int
    idle: int | None

    @classmethod
    def of(cls, inputs, problem, number):
        """The token ``number`` of those with local work, from the last on."""
        rows = local_rows_per_expert_and_token(inputs, problem).cpu()
        busy, idle = rows.any(dim=1).nonzero()[:, 0], (~rows.any(dim=1)).nonzero()[:, 0]
        token = int(busy[-1 - number % len(busy)])
        return cls(
            token, int(rows[token].nonzero()[-1 - number % int(rows[token].sum())]), next(iter(idle.tolist()), None)
        )


@contextlib.contextmanager
def put(tensor, at, value):
    """A value in a tensor, or a byte in one of e4m3, for a while."""
    tensor = tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor
    before = tensor[at].clone()
    tensor[at] = value
    try:
        yield
    finally:
        tensor[at] = before


NAN, INF = float("nan"), float("inf")
# Each by the field of the inputs, the place and the value.
SPOILT = {
    "all gemm1 scales": lambda w: ("gemm1_weights_scale", ..., NAN),
    "an expert's gemm1 scales": lambda w: ("gemm1_weights_scale", w.expert, NAN),
    "one gemm1 scale": lambda w: ("gemm1_weights_scale", (w.expert, -1, 0), NAN),
    "all gemm2 scales": lambda w: ("gemm2_weights_scale", ..., NAN),
    "one gemm2 scale": lambda w: ("gemm2_weights_scale", (w.expert, 0, -1), NAN),
    "a gemm1 weight": lambda w: ("gemm1_weights", (w.expert, 3, 77), 0x7F),
    "a gate weight": lambda w: ("gemm1_weights", (w.expert, -3, 1), 0xFF),
    "a gemm2 weight": lambda w: ("gemm2_weights", (w.expert, 130, 5), 0xFF),
    "a token's scale": lambda w: ("hidden_states_scale", (1, w.token), NAN),
    "a token's value": lambda w: ("hidden_states", (w.token, 200), 0x7F),
    "a token's logit": lambda w: ("routing_logits", (w.token, LOCAL + 1), NAN),
    "a remote logit": lambda w: ("routing_logits", (w.token, 0), NAN),
    "logits without local work": lambda w: ("routing_logits", w.idle, NAN),
    "a bias": lambda w: ("routing_bias", LOCAL + 1, NAN),
    "a weight of a choice": lambda w: ("topk_weights", w.token, NAN),
    "a token's scale, infinite": lambda w: ("hidden_states_scale", (0, w.token), INF),
    "an expert's gemm1 scales, infinite": lambda w: ("gemm1_weights_scale", w.expert, INF),
    "one gemm2 scale, infinite": lambda w: ("gemm2_weights_scale", (w.expert, 1, 0), -INF),
}
ROUTING = ("a token's logit", "a remote logit", "logits without local work", "a bias")
# Together, where a call takes long: each of another token or expert, as the reference tells them apart.
TOGETHER = (
    ("one gemm1 scale", "a token's scale", "logits without local work"),
    ("one gemm2 scale", "a gemm2 weight", "a token's value", "a remote logit"),
    ("an expert's gemm1 scales, infinite", "a token's scale, infinite"),
)
WITHOUT_ROUTING = (
    ("all gemm1 scales",),
    ("an expert's gemm1 scales",),
    ("a gemm1 weight", "a token's scale"),
    ("a gate weight",),  # in the half of a 128 block that the other consumer has
    ("one gemm2 scale", "a gemm2 weight", "a token's value", "a weight of a choice"),
    *TOGETHER[2:],
)
BFLOAT16 = {"a bf16 value": NAN, "a bf16 value, infinite": INF}


def faults(names, output, clean, inputs, problem):
    """What is wrong with a spoilt call's output; ``clean`` is the output of the call without what is spoilt."""
    not_finite, idle = ~moe_reference(inputs, problem).isfinite(), ~has_local_work(inputs, problem)
    infinite = any("infinite" in name for name in names)

    def rows(elements):
        return int(elements.any(dim=1).sum())

    found = {
        # Something has to go wrong, or nothing is tested.
        "calls in which no row depends on it": int(not not_finite.any() and names != ("logits without local work",)),
        "rows that hide it": rows(not_finite & (output.isfinite() if infinite else ~output.isnan())),
        "other rows not finite": rows(~not_finite & ~output.isfinite()),
        "rows not zero without local work": rows((output != 0) & idle[:, None]),
        # By the bias, all choose another expert; by a logit, a token may lose its local ones.
        "other rows changed": 0 if "a bias" in names else rows(~not_finite & ~idle[:, None] & (output != clean)),
    }
    return {what: number for what, number in found.items() if number}


def spoilt(names, inputs, problem, run):
    """Run a call clean and spoilt, and say what is wrong; ``run`` gives the output of inputs."""
    if "a weight of a choice" in names and isinstance(inputs, MoEInputs):
        inputs = routed_of(inputs, problem)
    clean = run(inputs).clone()
    assert bool(clean.isfinite().all())
    with contextlib.ExitStack() as stack:
        for number, name in enumerate(names):
            where = Where.of(inputs, problem, number)
            if name == "logits without local work" and where.idle is None:
                continue
            field, at, value = SPOILT[name](where)
            stack.enter_context(put(getattr(inputs, field), at, value))
        return faults(names, run(inputs), clean, inputs, problem)


LOCAL = 4  # the first local expert


def inputs_on(device, problem, tokens, weights=None, seed=2):
    return make_inputs(Workload(tokens, LOCAL, seed=seed), problem, weights or random_weights(problem, device))


# ---- In the interpreter, the emulation, and on emulations of the libraries --------------------------------------


def by_pipeline(problem, gemm):
    def run(inputs):
        output = torch.full((inputs.num_tokens, problem.hidden_size), NAN, dtype=torch.bfloat16)
        Pipeline(problem, gemm).run(inputs, output)
        return output

    return run


@pytest.fixture(autouse=True)
def repaired_interpreter():
    interpreter.repair()


@ON_CPU
@pytest.mark.parametrize("name", SPOILT)
def test_one_by_one(name):
    inputs = inputs_on("cpu", SMALL, 6)
    assert spoilt((name,), inputs, SMALL, by_pipeline(SMALL, TritonGroupedGemm())) == {}


@ON_CPU
@pytest.mark.parametrize("names", [("a token's value",), ("one gemm2 scale",), ("a token's logit",)], ids=str)
def test_one_token(names):
    assert spoilt(names, inputs_on("cpu", SMALL, 1), SMALL, by_pipeline(SMALL, TritonGroupedGemm())) == {}


@ON_CPU
@pytest.mark.parametrize("tokens, names", [*itertools.product((20, 40), TOGETHER), (130, TOGETHER[1])], ids=str)
def test_all_tiles(tokens, names):
    assert spoilt(names, inputs_on("cpu", SMALL, tokens), SMALL, by_pipeline(SMALL, TritonGroupedGemm())) == {}


@ON_CPU
@pytest.mark.parametrize("names", TOGETHER, ids=str)
@pytest.mark.parametrize("gemm", [SglGroupedGemm, DeepGemmGroupedGemm])
@pytest.mark.usefixtures("sgl_library", "deep_gemm_library")
def test_libraries(gemm, names):
    assert spoilt(names, inputs_on("cpu", SMALL, 12), SMALL, by_pipeline(SMALL, gemm())) == {}


EMULATED = MoEProblem(
    num_experts=16, num_local_experts=4, top_k=4, n_group=1, topk_group=1, hidden_size=512, intermediate_size=256
)


@pytest.mark.parametrize("gemms", [(FEW, FEW), (MANY, MANY)], ids=["few", "many"])
@pytest.mark.parametrize("names", WITHOUT_ROUTING, ids=str)
def test_gluon(names, gemms):
    """The expert with most rows has two tiles of few, and a tile of many in two halves."""
    inputs = given_rows(EMULATED, [3, 33, 0, 2] if FEW in gemms else [3, 70, 0, 2])

    def run(inputs):
        call = Call(EMULATED, inputs, Given(*gemms))
        gluon_emulation.run_steps(call.steps(2), [call.operands()])
        return call.output

    assert spoilt(names, inputs, EMULATED, run) == {}


@pytest.mark.parametrize("value", BFLOAT16.values(), ids=list(BFLOAT16))
@pytest.mark.parametrize("tokens", [1, 6, 40])
def test_hidden_states_in_bfloat16(tokens, value):
    """By the reference's quantisation here, by the kernel's in test_activations.py and on a GPU."""
    inputs = inputs_on("cpu", SMALL, tokens)
    assert spoilt_bfloat16(inputs, SMALL, value, resolve.as_candidate("triton_fused")) == {}


def spoilt_bfloat16(inputs, problem, value, candidate):
    hidden = torch.randn(inputs.num_tokens, problem.hidden_size, generator=torch.Generator().manual_seed(1))
    hidden = hidden.bfloat16().to(inputs.hidden_states.device)
    layer = HybridMoE.from_inputs(inputs, problem, backend=candidate)
    token = Where.of(inputs, problem, 0).token
    clean = layer(inputs.routing_logits, hidden).clone()
    with put(hidden, (token, 131), value):
        output = layer(inputs.routing_logits, hidden)
    others = torch.arange(inputs.num_tokens, device=output.device) != token
    found = {
        "rows that hide it": int(not output[token].isnan().all()),
        "other rows changed": int((output != clean)[others].any(dim=1).sum()),
    }
    return {what: number for what, number in found.items() if number}


# ---- Asked when the layer is made ---------------------------------------------------------------------------------


def test_check_weights():
    inputs = inputs_on("cpu", SMALL, 3)
    HybridMoE.from_inputs(inputs, SMALL, backend="torch_reference", check_weights=True)
    with (
        put(inputs.gemm1_weights_scale, (3, 1, 0), NAN),
        put(inputs.gemm1_weights_scale, 1, -INF),
        put(inputs.gemm2_weights, (2, 255, 255), 0xFF),
    ):
        HybridMoE.from_inputs(inputs, SMALL, backend="torch_reference")
        with pytest.raises(ValueError) as error:
            HybridMoE.from_inputs(inputs, SMALL, backend="torch_reference", check_weights=True)
    assert "gemm1_weights_scale of local experts 1, 3; gemm2_weights of local experts 2:" in str(error.value)


# ---- On a GPU -------------------------------------------------------------------------------------------------------

CANDIDATES = [
    *(
        resolve.as_candidate(Candidate("triton_fused", config))
        for config in backends.BACKENDS["triton_fused"].configs()
    ),
    resolve.as_candidate("flashinfer_cutlass"),
    resolve.as_candidate("flashinfer_trtllm"),
]
OURS = CANDIDATES[:3]
GPU_TOKENS = (1, 6, 40, 130, 901)


@pytest.fixture(scope="module")
def weights():
    return random_weights(DEEPSEEK_V3, "cuda")


def by_layer(problem, candidate):
    def run(inputs):
        layer = HybridMoE.from_inputs(inputs, problem, backend=candidate)
        output = torch.full((inputs.num_tokens, problem.hidden_size), NAN, dtype=torch.bfloat16, device="cuda")
        first, hidden, scale = inputs[0], inputs.hidden_states, inputs.hidden_states_scale
        if isinstance(inputs, MoEInputs):
            return layer(first, hidden, scale, output=output)
        return layer(None, hidden, scale, topk_ids=inputs.topk_ids, topk_weights=inputs.topk_weights, output=output)

    return run


def refused(candidate):
    return backends.not_supported_reasons(DEEPSEEK_V3, DeviceKey.of("cuda"), candidate)


@pytest.mark.gpu
@pytest.mark.parametrize("candidate", OURS, ids=str)
@pytest.mark.parametrize("tokens", GPU_TOKENS)
def test_on_a_gpu(weights, tokens, candidate):
    if reasons := refused(candidate):
        pytest.skip("; ".join(reasons))
    inputs = inputs_on("cuda", DEEPSEEK_V3, tokens, weights)
    assert {name: wrong for name, wrong in table(inputs, candidate) if wrong} == {}


def table(inputs, candidate):
    """Each case with what is wrong with it."""
    for name in SPOILT:
        yield name, spoilt((name,), inputs, DEEPSEEK_V3, by_layer(DEEPSEEK_V3, candidate))
    for name, value in BFLOAT16.items():
        yield name, spoilt_bfloat16(inputs, DEEPSEEK_V3, value, candidate)


def main() -> None:
    """Print what each backend, or those that are named, makes of each case."""
    weights = random_weights(DEEPSEEK_V3, "cuda")
    print(torch.cuda.get_device_name())
    for candidate in map(resolve.as_candidate, sys.argv[1:] or CANDIDATES):
        if reasons := refused(candidate):
            print(f"{candidate}: {'; '.join(reasons)}")
            continue
        for tokens in GPU_TOKENS:
            for name, wrong in table(inputs_on("cuda", DEEPSEEK_V3, tokens, weights), candidate):
                what = ", ".join(f"{number} {rows}" for rows, number in wrong.items()) or "as the reference"
                print(f"{candidate} | T = {tokens} | {name} | {what}", flush=True)


if __name__ == "__main__":
    main()
