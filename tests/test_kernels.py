"""The fused pipeline at small sizes: in Triton's interpreter, or compiled where there is a GPU.

Everything goes through `fused_moe`, apart from the routing and the combine, which are also tested alone. Results are
written between guard rows, and the memory that the pipeline reserves is filled with ones: NaN, and -1.
"""

import contextlib
import dataclasses
import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_moe import DeviceKey, MoEInputs, MoEProblem, backends, fused_moe
from hybrid_moe.inputs import FP8
from hybrid_moe.kernels import pipeline, shapes
from hybrid_moe.kernels.arena import Arena
from hybrid_moe.kernels.combine import combine
from hybrid_moe.kernels.grouped_gemm import tiles
from hybrid_moe.kernels.grouped_gemm.triton import provider
from hybrid_moe.kernels.launcher import limits_of
from hybrid_moe.kernels.plan import LaunchKey, addresses_of, by_name
from hybrid_moe.kernels.routing import reserve_routing
from hybrid_moe.kernels.routing import route as route_steps
from hybrid_moe.kernels.shapes import column_chunk, max_local_rows
from hybrid_moe.measure.workloads import MODELS, Workload, make_inputs, random_weights
from hybrid_moe.numerics import OWN_KERNELS_TOLERANCE, Tolerance, check
from hybrid_moe.policy import resolve
from hybrid_moe.reference import (
    chosen_experts,
    has_local_work,
    local_rows_per_expert_and_token,
    moe_reference,
    route,
)
from hybrid_moe.serving.call import _cached_dispatch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CHOICE = resolve.as_candidate("triton_fused")
REFUSALS = backends.not_supported_reasons(MoEProblem(), DeviceKey.of(DEVICE), CHOICE)
pytestmark = [
    pytest.mark.skipif(bool(REFUSALS), reason=f"triton_fused can't run here: {'; '.join(REFUSALS)}"),
    # NumPy's, in the interpreter.
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning"),
]

# Against the reference that rounds the activation as the kernels do, what is left is bf16 and roundings that fall to
# the other side: 0.006.
TWIN_TOLERANCE = Tolerance(max_relative_l2=0.01)

SMALL = MoEProblem(
    num_experts=16, num_local_experts=4, top_k=4, n_group=4, topk_group=2, hidden_size=256, intermediate_size=256
)
# Each differs from SMALL in what the kernels treat apart: lengths that are no powers of two, groups, extremes.
PROBLEMS = {
    "24 experts": dict(num_experts=24, num_local_experts=6, top_k=3, n_group=3, hidden_size=384),
    "odd lengths": dict(num_experts=15, num_local_experts=7, top_k=5, n_group=5, topk_group=3, intermediate_size=384),
    "one group": dict(n_group=1, topk_group=1),
    "all groups": dict(topk_group=4),
    "one of four groups": dict(topk_group=1),
    "one local expert, one choice": dict(num_local_experts=1, top_k=1),
    "all experts local": dict(num_local_experts=16),
    "all eligible chosen": dict(num_experts=12, top_k=6),
    "more choices than local experts": dict(num_local_experts=2, top_k=7),
    "many experts": dict(num_experts=64, top_k=2, num_local_experts=5),
    "smallest": dict(hidden_size=128, intermediate_size=128),
    "gate first": dict(gate_first=True),
    "softmax": dict(n_group=1, topk_group=1, routing_method="softmax"),
    "softmax, no renormalisation": dict(n_group=1, topk_group=1, routing_method="softmax_no_renorm"),
    "sigmoid, no renormalisation": dict(n_group=1, topk_group=1, routing_method="sigmoid_no_renorm"),
    "a shared expert": dict(num_local_experts=16, num_shared_experts=1),
    "two shared experts, no groups": dict(
        num_experts=15, num_local_experts=15, top_k=3, n_group=1, topk_group=1, num_shared_experts=2
    ),
    "softmax over 24": dict(
        num_experts=24, num_local_experts=6, top_k=3, n_group=1, topk_group=1, routing_method="softmax"
    ),
}


def problem_named(name):
    return dataclasses.replace(SMALL, **PROBLEMS[name])


@contextlib.contextmanager
def uninitialised_memory_filled():
    """`torch.empty` gives bytes of ones, which are NaN in all formats."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def run(problem, inputs):
    """The pipeline's result, written between guard rows."""
    tokens = inputs.num_tokens
    guarded = torch.full((tokens + 2, problem.hidden_size), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    output = guarded[1 : tokens + 1]
    with uninitialised_memory_filled():
        result = fused_moe(*inputs, problem=problem, output=output, backend=CHOICE)
    assert result is output
    assert bool(guarded[[0, -1]].isnan().all())
    return output


def assert_right(problem, inputs):
    """Run it, compare with the reference by the one rule, and return the result."""
    output = run(problem, inputs)
    work = has_local_work(inputs, problem)
    twin, width = moe_reference(inputs, problem, quantize_intermediate=True), problem.intermediate_size
    assert check(output, twin, work, TWIN_TOLERANCE, width=width).failures == ()
    assert check(output, moe_reference(inputs, problem), work, OWN_KERNELS_TOLERANCE, width=width).failures == ()
    return output


def inputs_of(problem, tokens, offset=0, routing="uniform", seed=0):
    weights = random_weights(problem, DEVICE, seed)
    return make_inputs(Workload(tokens, offset, routing, seed), problem, weights)


def token_of(inputs, token):
    """The same layer for one token of these."""
    return inputs._replace(
        routing_logits=inputs.routing_logits[token : token + 1],
        hidden_states=inputs.hidden_states[token : token + 1],
        hidden_states_scale=inputs.hidden_states_scale[:, token : token + 1],
    )


def chosen_by_all(problem, tokens, experts, offset):
    """Inputs of which every token chooses these experts first."""
    inputs = inputs_of(problem, tokens, offset)
    # Far enough for a group with one of them to win over groups with none.
    inputs.routing_logits[:] -= 6
    inputs.routing_logits[:, experts] += 18
    return inputs._replace(routing_bias=torch.zeros_like(inputs.routing_bias))


@pytest.mark.parametrize(
    "tokens",
    [1, 2, 3, 4, 5, 16, 17, 65, 161],
)
def test_token_counts(tokens):
    # Between one row for several experts and forty for each: through every tile of the table.
    assert_right(SMALL, inputs_of(SMALL, tokens, 4, seed=tokens))


@pytest.mark.parametrize("name", PROBLEMS)
def test_problems(name):
    problem = problem_named(name)
    offset = (problem.num_experts - problem.num_local_experts) // 2
    inputs = inputs_of(problem, 13, offset)
    assert_right(problem, inputs)
    busiest = int(local_rows_per_expert_and_token(inputs, problem).sum(dim=1).argmax())
    assert_right(problem, token_of(inputs, busiest))
    assert_right(problem, inputs_of(problem, 26, offset, seed=1))


@pytest.mark.parametrize("offset", [0, 37, 224])
def test_the_definitions_routing(offset):
    problem = MoEProblem(hidden_size=256, intermediate_size=128)
    assert_right(problem, inputs_of(problem, 11, offset))


# At small widths; of the intermediate size what its 128 blocks have in common with the real one.
NARROW = {
    "kimi-k2": dict(hidden_size=256, intermediate_size=256),
    "glm-4.5-air": dict(hidden_size=256, intermediate_size=11 * 128),
    "qwen3-235b": dict(hidden_size=256, intermediate_size=3 * 128),
}


@pytest.mark.parametrize("model", NARROW)
def test_the_routing_of_other_models(model):
    problem = dataclasses.replace(MODELS[model], **NARROW[model])
    assert_right(problem, inputs_of(problem, 11, problem.num_experts - problem.num_local_experts))


@pytest.mark.parametrize(("tokens", "local"), [(1, 3), (19, 0), (65, 3)])
def test_all_tokens_on_one_expert(tokens, local):
    problem = dataclasses.replace(SMALL, num_experts=24, top_k=1)
    inputs = chosen_by_all(problem, tokens, [5 + local], 5)
    rows = local_rows_per_expert_and_token(inputs, problem).sum(dim=0).tolist()
    assert rows == [tokens if expert == local else 0 for expert in range(4)]
    assert_right(problem, inputs)


def test_all_tokens_on_the_same_experts():
    inputs = chosen_by_all(SMALL, 20, [4, 5, 6, 7], 4)
    assert local_rows_per_expert_and_token(inputs, SMALL).all()
    assert_right(SMALL, inputs)


@pytest.mark.parametrize("tokens", [1, 9, 26])
def test_no_local_expert(tokens):
    output = run(SMALL, inputs_of(SMALL, tokens, 4, "none"))
    assert torch.count_nonzero(output) == 0  # NaN counts as non-zero


def with_rows(rows):
    """A problem and inputs of it that give each local expert so many rows, from as few tokens."""
    local = len(rows)
    sizes = dict(num_experts=2 * local, num_local_experts=local, top_k=local, n_group=1, topk_group=1)
    problem = dataclasses.replace(SMALL, **sizes)
    inputs = inputs_of(problem, max(rows), 1)
    # Every token finds elsewhere what it doesn't choose here.
    inputs.routing_logits[:] = torch.linspace(-0.5, 0.5, 2 * local, device=DEVICE)
    for expert, wanted in enumerate(rows):
        chosen = torch.randperm(max(rows), generator=torch.Generator().manual_seed(expert)) < wanted
        inputs.routing_logits[:, 1 + expert] = torch.where(chosen, 4.0, -4.0).to(DEVICE)
    inputs = inputs._replace(routing_bias=torch.zeros_like(inputs.routing_bias))
    assert local_rows_per_expert_and_token(inputs, problem).sum(dim=0).tolist() == rows
    return problem, inputs


def test_rows_that_fill_no_tile():
    assert_right(*with_rows([0, 1, 15, 16, 17, 21]))


# Their Triton tiles: the specialised kernels don't run in the interpreter.
SEVERAL_BUCKETS = sorted(
    {
        dataclasses.replace(plan, specialized=(None, None), many_above=None)
        for table in (tiles.TILES_SM90, tiles.TILES_SM100)
        for _, plan in table
        if len(plan.gemm1.m_buckets) > 1
    },
    key=str,
)


@contextlib.contextmanager
def planned_with(monkeypatch, plan):
    """Calls take these tiles, whatever was planned before, and leave none planned."""
    with monkeypatch.context() as patch:
        patch.setattr(provider, "tile_plan", lambda *_: plan)
        forget_plans()
        yield
    forget_plans()


@pytest.mark.parametrize(
    "plan", SEVERAL_BUCKETS, ids=lambda plan: " ".join(str(t.block_m) for t in plan.gemm1.m_buckets)
)
def test_rows_on_both_sides_of_every_m_bucket(monkeypatch, plan):
    bounds = {bucket.block_m for tile in (plan.gemm1, plan.gemm2) for bucket in tile.m_buckets}
    # The last is cut off from more rows than a tile holds, so that each is also what a full tile leaves.
    rows = sorted({0, 1, *(bound + more for bound in bounds for more in (0, 1)), max(bounds) + min(bounds) + 1})
    with planned_with(monkeypatch, plan):
        assert_right(*with_rows(rows))


@pytest.mark.parametrize("fused", [False, True])
def test_halves_by_one_product_or_two(monkeypatch, fused):
    # Widths on both sides of a 128 block, whose scales the halves share or don't.
    problem, inputs = with_rows([1, 0, 19])
    for narrow, wide in ((32, 64), (64, 128), (128, 128 if fused else 256)):
        buckets = (tiles.MBucket(16, 3, 2), tiles.MBucket(32, 3))
        plan = tiles.TilePlan(tiles.Tile(narrow, 4, buckets, fused=fused), tiles.Tile(wide, 4, buckets, fused=fused))
        with planned_with(monkeypatch, plan):
            assert_right(problem, inputs)


@pytest.mark.parametrize("rows", [[], [16, 16], [64, 16]])
def test_m_buckets_in_the_wrong_order(rows):
    with pytest.raises(ValueError, match="m_buckets: expected"):
        tiles.Tile(64, 4, tuple(tiles.MBucket(m, 3) for m in rows))


def test_one_row_of_hidden_states_for_all_tokens():
    inputs = inputs_of(SMALL, 12, 4)
    assert_right(SMALL, inputs._replace(hidden_states=inputs.hidden_states[:1].expand(12, -1)))


def test_small_activations():
    """Far below one, where their blocks' scales still follow them."""
    inputs = inputs_of(SMALL, 20, 4)
    assert_right(SMALL, inputs._replace(hidden_states_scale=inputs.hidden_states_scale / 1000))


def test_too_little_memory():
    """A call then takes its own."""
    inputs = inputs_of(SMALL, 20, 4)
    wanted = run(SMALL, inputs)
    output = torch.empty_like(wanted)
    memory = torch.full((256,), 77, dtype=torch.uint8, device=DEVICE)
    pipeline.Pipeline(SMALL, provider.TritonGroupedGemm()).run(inputs, output, memory)
    assert torch.equal(output, wanted) and bool((memory == 77).all())


@pytest.mark.parametrize("name", ["smallest", "softmax", "softmax, no renormalisation"])
def test_a_bias_in_float32(name):
    """Not rounded: about 8, where bfloat16 has steps of 1/16; and both dtypes in turn, as two layers have them."""
    problem = problem_named(name)
    inputs = inputs_of(problem, 40, 4)
    spread = torch.rand(problem.num_experts, generator=torch.Generator().manual_seed(1)) / 16
    fine = inputs._replace(routing_bias=(8 + spread).to(DEVICE), routing_logits=inputs.routing_logits / 100)
    coarse = fine._replace(routing_bias=fine.routing_bias.bfloat16())
    chosen = [local_rows_per_expert_and_token(i, problem) for i in (fine, coarse)]
    assert not torch.equal(*chosen)
    for each, wanted in zip((fine, coarse, fine), (*chosen, chosen[0]), strict=True):
        assert torch.equal(routed(problem, each)["tokens_per_expert"], wanted.sum(dim=0).int())
    widened = inputs._replace(routing_bias=inputs.routing_bias.float())
    assert torch.equal(run(problem, widened), run(problem, inputs))
    zeros = inputs._replace(routing_bias=torch.zeros_like(inputs.routing_bias))
    assert torch.equal(run(problem, inputs._replace(routing_bias=None)), run(problem, zeros))


@pytest.mark.parametrize("tokens", [5, 26])
def test_equal_logits(tokens):
    problem = problem_named("24 experts")
    inputs = inputs_of(problem, tokens, 0)
    bias = torch.zeros_like(inputs.routing_bias)
    equal = inputs._replace(routing_logits=torch.zeros_like(inputs.routing_logits), routing_bias=bias)
    rows = local_rows_per_expert_and_token(equal, problem).sum(dim=0).tolist()
    assert rows == [tokens, tokens, tokens, 0, 0, 0]
    assert_right(problem, equal)
    few = torch.tensor([-2.0, 0.0, 1.0], device=DEVICE)
    index = torch.randint(0, 3, (tokens, 24), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    assert_right(problem, equal._replace(routing_logits=few[index]))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("tokens", [6, 26])
def test_data_as_flashinfer_bench_makes_it(tokens, seed):
    # fp8 values are randn clamped to +-2, scales and bias are randn: negative scales, outputs far above one.
    problem = problem_named("24 experts")
    generator = torch.Generator().manual_seed(seed)
    inputs = inputs_of(problem, tokens, 0, seed=seed)

    def noise(tensor):
        values = torch.randn(tensor.shape, generator=generator)
        return (values.clamp(-2, 2) if tensor.dtype == FP8 else values).to(tensor.dtype).to(DEVICE)

    names = [name for name in inputs._fields[:8] if name != "routing_logits"]
    inputs = inputs._replace(**{name: noise(getattr(inputs, name)) for name in names})
    ids, _ = route(inputs.routing_logits, inputs.routing_bias, 1.0, problem)
    popular = int(torch.bincount(ids.flatten(), minlength=24).argmax())
    inputs = inputs._replace(local_expert_offset=min(popular, 18), routed_scaling_factor=1.0)
    assert float(assert_right(problem, inputs).abs().max()) > 100


@pytest.mark.parametrize("offset", [0, 12])
def test_a_token_without_numbers_spoils_no_other(offset):
    # As the padding of a captured graph's batch may be: it still has to choose experts, each once.
    for problem in (SMALL, problem_named("softmax")):
        inputs = inputs_of(problem, 6, offset)
        spoilt = inputs._replace(routing_logits=inputs.routing_logits.clone())
        spoilt.routing_logits[2] = float("nan")
        assert int(routed(problem, spoilt)["tokens_per_expert"].max()) <= 6
        others = [0, 1, 3, 4, 5]
        assert torch.equal(run(problem, spoilt)[others], run(problem, inputs)[others])


def test_columns_in_pieces(monkeypatch):
    # What large T do at full size, for the sake of memory.
    tokens = 9
    problem = dataclasses.replace(problem_named("24 experts"), hidden_size=512)
    inputs = inputs_of(problem, tokens, 6)
    whole = assert_right(problem, inputs)
    rows = max_local_rows(problem, tokens)
    for columns in (256, 128):
        monkeypatch.setattr(shapes, "MAX_ROWS_BYTES", rows * columns * 2)
        forget_plans()
        assert column_chunk(problem, rows) == columns
        assert torch.equal(run(problem, inputs), whole)
    forget_plans()


def forget_plans():
    backends.prepare.cache_clear()
    _cached_dispatch.cache_clear()


@st.composite
def cases(draw):
    n_group = draw(st.integers(1, 5))
    group_size = draw(st.integers(2, 9))
    topk_group = draw(st.integers(1, n_group))
    num_experts = n_group * group_size
    num_local_experts = draw(st.integers(1, min(9, num_experts)))
    problem = MoEProblem(
        num_experts=num_experts,
        num_local_experts=num_local_experts,
        top_k=draw(st.integers(1, min(8, topk_group * group_size))),
        n_group=n_group,
        topk_group=topk_group,
        hidden_size=128 * draw(st.integers(1, 3)),
        intermediate_size=128 * draw(st.integers(1, 3)),
        gate_first=draw(st.booleans()),
    )
    tokens = draw(st.integers(2, 32))
    offset = draw(st.integers(0, num_experts - num_local_experts))
    return problem, tokens, offset, draw(st.integers(0, 1000))


@pytest.mark.interpreter
@given(cases())
@settings(max_examples=6)
def test_any_problem(case):
    problem, tokens, offset, seed = case
    inputs = inputs_of(problem, tokens, offset, seed=seed)
    assert_right(problem, inputs)


def limits_for(problem):
    backends.prepare(problem, DeviceKey.of(DEVICE), CHOICE)  # repairs the interpreter
    device = torch.device(DEVICE)
    return limits_of(torch.device("cuda", 0) if device.type == "cuda" else device)


@pytest.mark.parametrize("routing", ["uniform", "concentrated"])
@pytest.mark.parametrize("tokens", [1, 17, 65])
def test_gemm1_signals_what_gemm2_waits_for(tokens, routing):
    limits, inputs = limits_for(SMALL), inputs_of(SMALL, tokens, 4, routing)
    output = torch.empty((tokens, SMALL.hidden_size), dtype=torch.bfloat16, device=inputs.hidden_states.device)
    flow = pipeline.Pipeline(SMALL, provider.TritonGroupedGemm(DeviceKey.of(DEVICE).capability))
    with uninitialised_memory_filled():
        memory = torch.empty(flow.arena(tokens).bytes, dtype=torch.uint8, device=DEVICE)
    flow.run(inputs, output, memory)
    key = LaunchKey.of(inputs, addresses_of(inputs), output, 1)
    gemm2 = flow.plan(key, output.device, limits).steps[-2].constants.arguments
    tensors = flow.arena(tokens).tensors(memory)
    counts = tensors["tokens_per_expert"].cpu()
    signals = -(-counts // gemm2["FIRST_M"]) * gemm2["SIGNALS"]
    assert int(counts.max()) > 0
    assert tensors["finished"].tolist() == [*signals.tolist(), int(signals.sum())]


@pytest.mark.parametrize("capability", [(8, 9), (12, 0)])
@pytest.mark.parametrize("tokens", [1, 65])
def test_tiles_of_gpus_with_less_shared_memory(tokens, capability):
    limits_for(SMALL)
    inputs = inputs_of(SMALL, tokens, 4)
    output = torch.full((tokens, SMALL.hidden_size), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    flow = pipeline.Pipeline(SMALL, provider.TritonGroupedGemm(capability))
    with uninitialised_memory_filled():
        memory = torch.empty(flow.arena(tokens).bytes, dtype=torch.uint8, device=DEVICE)
    flow.run(inputs, output, memory)
    result = check(output, moe_reference(inputs, SMALL), has_local_work(inputs, SMALL), OWN_KERNELS_TOLERANCE)
    assert result.passed, result.failures


# Routing alone


def routed(problem, inputs, *steps, rows=()):
    """The tensors of a call after its routing, by name; ``steps(key)`` are run behind it, on ``rows`` if they want."""
    output = torch.full(
        (inputs.num_tokens, problem.hidden_size), float("nan"), dtype=torch.bfloat16, device=inputs.hidden_states.device
    )
    key, arena = LaunchKey.of(inputs, addresses_of(inputs), output, 1), Arena()
    reserve_routing(arena, problem.all_routed, inputs.num_tokens)
    with uninitialised_memory_filled():
        memory = torch.empty(arena.bytes, dtype=torch.uint8, device=DEVICE)
    call = by_name(inputs, output, arena, memory)
    for step in route_steps(problem, limits_for(problem), key, arena):
        step.run(call, output.device)
    for number, step in enumerate(steps):
        step(key).run(call | {"rows": rows[number]}, output.device)
    return call


def routing_inputs(problem, logits, bias, offset, factor=2.5):
    """Inputs with nothing in them but what routing reads."""
    hidden = torch.empty((logits.shape[0], problem.hidden_size), dtype=FP8)
    rest = [torch.empty(0, 0)] * 5
    return MoEInputs(*(t.to(DEVICE) for t in (logits, bias.bfloat16(), hidden, *rest)), offset, factor)


def assert_routed(problem, inputs):
    """Each token's choices and weights are the reference's, and each local pair has a place of its own."""
    call = routed(problem, inputs)
    ids, weights = (t.cpu() for t in chosen_experts(inputs, problem))
    e = problem.all_routed.num_local_experts
    local = ids - inputs.local_expert_offset
    is_local = (local >= 0) & (local < e)
    pair = call["pair"].cpu().long()
    assert pair.shape == ids.shape
    assert torch.equal(torch.where(pair >= 0, pair % e, -1), torch.where(is_local, local, -1))
    wanted = torch.where(is_local, weights, 0.0)
    torch.testing.assert_close(call["pair_weight"].cpu(), wanted, rtol=1e-5, atol=1e-7, equal_nan=True)

    counts = torch.bincount(local[is_local], minlength=e)
    assert torch.equal(call["tokens_per_expert"].cpu().long(), counts)
    slots = call["slot_token"].cpu()
    for expert in range(e):
        # Its slots are numbered without gaps, and each leads back to its token.
        token, choice = (pair % e == expert).logical_and(pair >= 0).nonzero(as_tuple=True)
        slot = pair[token, choice] // e
        assert sorted(slot.tolist()) == list(range(int(counts[expert])))
        assert torch.equal(slots[expert, slot].long(), token)


@pytest.mark.parametrize("name", [*PROBLEMS, "definition"])
def test_routing(name):
    problem = MoEProblem() if name == "definition" else problem_named(name)
    generator = torch.Generator().manual_seed(1)
    # Apart from one another by far more than the rounding of the exponential, and so are sums of two.
    spread = torch.linspace(-3, 5, problem.num_experts)
    for tokens in (1, 33):
        logits = torch.stack([spread[torch.randperm(len(spread), generator=generator)] for _ in range(tokens)])
        bias = torch.randint(-2, 3, (problem.num_experts,), generator=generator) / 8
        last = problem.num_experts - problem.num_local_experts
        for offset in {last // 3, last} if tokens == 1 else {last // 2}:
            assert_routed(problem, routing_inputs(problem, logits, bias, offset))


@pytest.mark.interpreter
@given(st.data())
@settings(max_examples=10)
def test_routing_with_equal_scores(data):
    names = ["24 experts", "odd lengths", "one group", "all groups", "softmax", "softmax over 24"]
    problem = problem_named(data.draw(st.sampled_from(names)))
    row = st.lists(st.sampled_from([-2.0, 0.0, 1.0]), min_size=problem.num_experts, max_size=problem.num_experts)
    rows = data.draw(st.lists(row, min_size=1, max_size=4))
    repeats = data.draw(st.sampled_from([1, 32 // len(rows) + 1]))
    offset = data.draw(st.integers(0, problem.num_experts - problem.num_local_experts))
    bias = torch.zeros(problem.num_experts)
    assert_routed(problem, routing_inputs(problem, torch.tensor(rows * repeats), bias, offset))


@pytest.mark.interpreter
@given(st.data())
@settings(max_examples=10)
def test_softmax_routing(data):
    experts = data.draw(st.integers(2, 130))
    local = data.draw(st.integers(1, experts))
    top_k = data.draw(st.integers(1, min(8, experts)))
    problem = MoEProblem(experts, local, top_k, 1, 1, 128, 128, routing_method="softmax")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    spread = data.draw(st.sampled_from([0.5, 4.0, 20.0])) * torch.linspace(-1, 1, experts)
    shift = data.draw(st.sampled_from([0.0, -300.0, 300.0]))  # changes nothing, where exp alone would overflow
    logits = torch.stack([spread[torch.randperm(experts, generator=generator)] for _ in range(3)]) + shift
    bias = torch.zeros(experts)
    offset = data.draw(st.integers(0, experts - local))
    assert_routed(problem, routing_inputs(problem, logits, bias, offset))


def test_softmax_routing_of_extreme_logits():
    problem = problem_named("softmax")
    logits = torch.tensor([[-1e30, 1e30, 0.0, -torch.inf] * 4, [-200.0] * 16, [200.0] * 16])
    assert_routed(problem, routing_inputs(problem, logits, torch.zeros(16), 0))


def test_routing_of_extreme_logits():
    logits = torch.tensor([[-1e30, 1e30, 0.0, -torch.inf] * 4, [torch.inf] * 16, [-200.0] * 16, [200.0] * 16])
    assert_routed(SMALL, routing_inputs(SMALL, logits, torch.zeros(16), 0))


@pytest.mark.parametrize("name", ["24 experts", "odd lengths", "one group", "softmax", "a shared expert"])
def test_routing_of_nan(name):
    """NaN is the greatest score, and its group the best: not one more group is open by it."""
    problem = problem_named(name)
    logits = torch.randn((12, problem.num_experts), generator=torch.Generator().manual_seed(3))
    for token in range(11):
        logits[token, token % problem.num_experts] = torch.nan
    logits[3, -1], logits[4] = torch.nan, torch.nan
    bias = torch.zeros(problem.num_experts)
    for offset in {0, 3, problem.num_experts - problem.num_local_experts}:
        assert_routed(problem, routing_inputs(problem, logits, bias, offset))
        assert_routed(problem, routing_inputs(problem, logits, bias.index_fill(0, torch.tensor(2), torch.nan), offset))


@pytest.mark.parametrize(("tokens", "branch"), [(1, False), (9, False), (26, False), (9, True)])
def test_combine(tokens, branch, monkeypatch):
    """By a branch for each choice too, as with many tokens."""
    monkeypatch.setattr("hybrid_moe.kernels.combine.BRANCH_TOKENS", 1 if branch else 512)
    problem = problem_named("24 experts")
    inputs = inputs_of(problem, tokens, 5)
    limits = limits_for(problem)
    max_rows, hidden = max_local_rows(problem, tokens), problem.hidden_size
    rows = torch.randn((max_rows, hidden), generator=torch.Generator().manual_seed(0)).bfloat16().to(DEVICE)
    firsts = range(0, hidden, 128)
    steps = [functools.partial(combine, problem, limits, columns=128, first_column=first) for first in firsts]
    call = routed(problem, inputs, *steps, rows=[rows[:, first : first + 128].contiguous() for first in firsts])
    output = call["output"]

    start = torch.cat([torch.zeros(1, dtype=torch.int64), call["tokens_per_expert"].cpu().cumsum(0)])
    pair, e = call["pair"].cpu().long(), problem.num_local_experts
    picked = rows.cpu().float()[torch.where(pair >= 0, start[pair % e] + pair // e, 0)]
    picked[pair < 0] = 0
    wanted = (picked * call["pair_weight"].cpu().unsqueeze(2)).sum(dim=1)
    torch.testing.assert_close(output.cpu().float(), wanted, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("masked", [1, 10])
def test_routing_with_masked_experts(masked):
    """A bias of -inf masks an expert; groups of 3 and 5 leave places of no expert beside them."""
    for problem in (
        MoEProblem(15, 4, 6, 5, 2, 256, 128),
        MoEProblem(24, 6, 3, 8, 4, 256, 128),
    ):
        generator = torch.Generator().manual_seed(masked)
        logits = torch.randn((6, problem.num_experts), generator=generator)
        bias = torch.full((problem.num_experts,), -4.0)
        bias[: problem.group_size + 2] = 0.0
        bias[torch.randperm(problem.num_experts, generator=generator)[:masked]] = -torch.inf
        for offset in (0, problem.num_experts - problem.num_local_experts):
            assert_routed(problem, routing_inputs(problem, logits, bias, offset))
