"""What serving does besides calling: warming up, and taking another policy in the middle of it."""

import copy
import itertools
import sys
import threading
import time
import warnings

import pytest
import torch
from test_api import PROBLEM, REFERENCE, call, forget, inputs_of, layer_of, make_policy, spies  # noqa: F401

from hybrid_moe import (
    BackendUnsupportedError,
    Candidate,
    DeviceKey,
    NoBackendError,
    PolicyError,
    backends,
    fused_moe,
    quarantined,
    save_policy,
)
from hybrid_moe.measure.workloads import random_weights
from hybrid_moe.policy.select import resolve
from hybrid_moe.policy.store import policy_path, user_policy_dir
from hybrid_moe.reference import quantize_rows
from hybrid_moe.serving import call as calling
from hybrid_moe.serving import metrics, warmup


@pytest.fixture(autouse=True)
def afresh():
    forget()
    yield
    forget()


@pytest.fixture(scope="module")
def weights():
    return random_weights(PROBLEM, "cpu")


# Warming up


def test_every_regime_is_warmed_up_at_its_bounds(weights, spies):  # noqa: F811
    layer = layer_of(inputs_of(weights, 1), policy=make_policy())
    seen = []
    done = layer.warm_up(max_num_tokens=40, progress=seen.append)
    one, two = Candidate("one"), Candidate("two")
    wanted = [(1, one), (2, one), (4, one), (5, two), (8, two), (9, two), (10, REFERENCE), (16, REFERENCE)]
    wanted += [(32, REFERENCE), (40, REFERENCE)]
    assert [(w.num_tokens, w.choice) for w in done] == wanted
    assert seen == list(done) and all(w.seconds > 0 for w in done)
    for spy, counts in zip(spies, ([1, 2, 4], [5, 8, 9]), strict=True):
        assert [inputs.num_tokens for inputs in spy.runs] == counts


def test_replays_are_counted_beside_calls(weights, spies):  # noqa: F811
    layer = layer_of(inputs_of(weights, 3), policy=make_policy())
    call(layer, inputs_of(weights, 3))
    layer.count_replay(3)
    layer.count_replay(7)
    assert [(s.label.choice, s.calls, s.tokens) for s in layer.stats()] == [
        (Candidate("one"), 2, 6),
        (Candidate("two"), 1, 7),
    ]
    assert [len(spy.runs) for spy in spies] == [1, 0]
    with pytest.raises(ValueError, match="num_tokens: expected an integer of at least 1, got 0"):
        layer.count_replay(0)


def test_warming_up_at_given_t(weights, spies):  # noqa: F811
    layer = layer_of(inputs_of(weights, 1), policy=make_policy())
    assert [(w.num_tokens, str(w.choice)) for w in layer.warm_up([7, 3, 7])] == [(3, "one"), (7, "two")]
    assert layer.warm_up([]) == ()
    # More than the bound of the default ones: as asked for.
    assert [w.num_tokens for w in layer.warm_up([50], max_num_tokens=8)] == [50]


def test_what_warms_up_is_what_a_call_gives(weights, spies):  # noqa: F811
    """All that a backend takes, and none of it counted as served."""
    inputs = inputs_of(weights, 5)
    layer = layer_of(inputs, backend="one")
    before = metrics.snapshot()
    layer.warm_up([5])
    call(layer, inputs)
    warmed, served = spies[0].runs
    for one, other in zip(warmed[:8], served[:8], strict=True):
        assert (one.dtype, one.shape, one.stride(), one.device) == (
            other.dtype,
            other.shape,
            other.stride(),
            other.device,
        )
    assert warmed[4:] == served[4:] and warmed.routing_bias is served.routing_bias
    assert bool((warmed.hidden_states_scale > 0).all())
    assert [s.calls for s in layer.stats()] == [1]
    assert sum(s.calls for s in metrics.snapshot()) == sum(s.calls for s in before) + 1


def test_warming_up_goes_through_the_quantisation(weights, monkeypatch):
    """So that its kernel is compiled too, for hidden states in bfloat16."""
    layer, seen = layer_of(inputs_of(weights, 1), backend=REFERENCE), []
    monkeypatch.setattr(
        "hybrid_moe.serving.quantize_input.quantize_rows", lambda h: (seen.append(h.dtype), quantize_rows(h))[1]
    )
    layer.warm_up([3])
    assert seen == [torch.bfloat16]


@pytest.mark.parametrize("given", [dict(token_counts=[0]), dict(token_counts=[1, -3]), dict(token_counts=[2.0])])
def test_no_number_of_tokens(weights, given):
    with pytest.raises(ValueError, match="token_counts: expected integers of at least 1, got .*"):
        layer_of(inputs_of(weights, 1), backend=REFERENCE).warm_up(**given)


def test_no_bound(weights):
    with pytest.raises(ValueError, match="max_num_tokens: expected an integer of at least 1, got 0"):
        layer_of(inputs_of(weights, 1), backend=REFERENCE).warm_up(max_num_tokens=0)


def test_an_error_of_an_explicit_backend_while_warming_up_is_the_callers(weights, spies, monkeypatch):  # noqa: F811
    layer = layer_of(inputs_of(weights, 1), backend="two")

    def broken(self, inputs, output):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(type(layer._dispatch.runner(7)), "run", broken)
    with pytest.raises(RuntimeError, match="no such kernel"):
        layer.warm_up([7])
    assert quarantined() == () and layer.choice(7) == Candidate("two")


@pytest.mark.parametrize(
    ("starts", "bound", "wanted"),
    [
        ((0,), 1, (1,)),
        ((0,), 9, (1, 2, 4, 8, 9)),
        ((0, 1, 100), 9, (1, 2, 4, 8, 9)),
        ((0, 3, 6), 7, (1, 2, 3, 4, 5, 6, 7)),
        ((0, 14, 33, 901, 902), 1000, (1, 2, 4, 8, 13, 14, 16, 32, 33, 64, 128, 256, 512, 900, 901, 902, 1000)),
    ],
)
def test_the_t_to_warm_up(starts, bound, wanted):
    assert warmup.token_counts(starts, bound) == wanted


# Another policy


def other_policy(**changes):
    """The reverse of `make_policy`: ``two`` runs at every T."""
    return make_policy(default=Candidate("two"), regimes=[], **changes)


def value_of(layer, inputs):
    (value,) = call(layer, inputs).unique().tolist()
    return value


def test_a_layer_takes_another_policy(weights, spies, tmp_path):  # noqa: F811
    inputs = inputs_of(weights, 3)
    layer = layer_of(inputs, policy=make_policy())
    assert value_of(layer, inputs) == 1.0
    save_policy(other_policy(), tmp_path / "other.json")
    for policy in (other_policy(), tmp_path / "other.json", str(tmp_path / "other.json")):
        layer.reload_policy(policy)
        assert value_of(layer, inputs) == 2.0
        assert layer.choice(3) == layer.explain(3).choice == Candidate("two")
        assert layer.workspace_bytes(3) == 30
        layer.reload_policy(make_policy())
        assert value_of(layer, inputs) == 1.0
    assert {s.label.choice.backend: s.calls for s in layer.stats()} == {"one": 4, "two": 3}


def test_without_an_argument_it_is_looked_up_anew(weights, spies):  # noqa: F811
    inputs = inputs_of(weights, 3)
    path = policy_path(user_policy_dir(), "cpu", PROBLEM)
    save_policy(make_policy(), path)
    layer = layer_of(inputs)
    save_policy(other_policy(), path)
    assert value_of(layer, inputs) == 1.0
    layer.reload_policy()
    assert value_of(layer, inputs) == 2.0


def test_an_error_leaves_the_old_policy(weights, spies, tmp_path, monkeypatch):  # noqa: F811
    inputs = inputs_of(weights, 3)
    layer = layer_of(inputs, policy=make_policy())
    (tmp_path / "cut.json").write_text("{")

    def check(policy, error, message):
        with pytest.raises(error, match=message):
            layer.reload_policy(policy)
        assert value_of(layer, inputs) == 1.0 and layer.explain(3).regime == (0, 4)

    check(tmp_path / "cut.json", PolicyError, "isn't whole JSON")
    check(tmp_path / "none.json", PolicyError, "doesn't exist")
    check(make_policy(device="nvidia_x"), PolicyError, "nvidia_x")
    check(3, TypeError, "policy: expected .*, got 3")
    with monkeypatch.context() as patch:
        patch.setattr(backends, "not_supported_reasons", lambda *_: ("asleep",))
        check(other_policy(), NoBackendError, "asleep")
    # What refuses when the last of the new runners is prepared.
    real = backends.prepare

    def refuse(problem, device, choice):
        if choice.backend == "two":
            raise BackendUnsupportedError(choice, ["no memory"])
        return real(problem, device, choice)

    with monkeypatch.context() as patch:
        table = resolve(make_policy(), PROBLEM, DeviceKey("cpu"))
        patch.setattr(calling, "decision_table", lambda *_, **__: table)
        patch.setattr(backends, "prepare", refuse)
        check(other_policy(), BackendUnsupportedError, "no memory")


def test_an_explicit_backend_is_not_changed_by_a_policy(weights, spies):  # noqa: F811
    layer = layer_of(inputs_of(weights, 3), backend="one")
    with pytest.raises(ValueError, match="policy: expected a layer without a backend, got one with one"):
        layer.reload_policy(make_policy())
    assert layer.choice(3) == Candidate("one")


def test_compiled_code_takes_the_new_policy(weights, spies):  # noqa: F811
    inputs = inputs_of(weights, 3)
    layer = layer_of(inputs, policy=make_policy())
    torch.compiler.reset()
    run = torch.compile(lambda *tensors: layer(*tensors), backend="aot_eager", fullgraph=True)
    arguments = (inputs.routing_logits, inputs.hidden_states, inputs.hidden_states_scale)
    assert bool((run(*arguments) == 1.0).all())
    layer.reload_policy(other_policy())
    with torch.compiler.set_stance("fail_on_recompile"):
        assert bool((run(*arguments) == 2.0).all())


def test_calls_of_threads_see_the_old_policy_or_the_new_one(weights, spies):  # noqa: F811
    """Regimes and choices of both, never of one and the other; every call is counted where it ran."""
    cases = {tokens: inputs_of(weights, tokens) for tokens in (3, 7)}
    layer = layer_of(cases[3], policy=make_policy())
    policies = make_policy(), other_policy()
    stop, seen, wrong = threading.Event(), {3: [], 7: []}, []
    before = sys.getswitchinterval()

    def work(tokens):
        while not stop.is_set():
            seen[tokens].append(value_of(layer, cases[tokens]))
            decision = layer.explain(tokens)
            if (decision.choice.backend, decision.regime) not in {("one", (0, 4)), ("two", (5, 9)), ("two", None)}:
                wrong.append(decision)

    threads = [threading.Thread(target=work, args=(tokens,)) for tokens in (3, 7, 3, 7)]
    sys.setswitchinterval(1e-5)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for thread in threads:
                thread.start()
            # Until the calls have seen both: on a busy machine sixty reloads may pass between two of them.
            end = time.monotonic() + 60
            for number in itertools.count():
                if number >= 60 and len(set(seen[3])) == 2 or time.monotonic() > end:
                    break
                layer.reload_policy(policies[1 - number % 2])
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(before)
    assert not wrong
    assert set(seen[3]) == {1.0, 2.0} and set(seen[7]) == {2.0}
    ran = {s.label.choice.backend: 0 for s in layer.stats()}
    for sample in layer.stats():
        ran[sample.label.choice.backend] += sample.calls
    assert ran == {"one": seen[3].count(1.0), "two": seen[3].count(2.0) + len(seen[7])}


def test_a_policy_that_is_reloaded_goes_with_a_copy(weights, spies):  # noqa: F811
    inputs = inputs_of(weights, 3)
    layer = layer_of(inputs, policy=make_policy())
    layer.reload_policy(other_policy())
    assert value_of(copy.copy(layer), inputs) == 2.0


def test_the_function_looks_at_a_policy_once(weights, spies):  # noqa: F811
    inputs = inputs_of(weights, 3)
    policy = make_policy()
    for _ in range(2):
        fused_moe(*inputs, top_k=3, n_group=4, topk_group=2, policy=policy)
    assert spies[0].prepared == 1 and len(spies[0].runs) == 2
