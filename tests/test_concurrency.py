"""Forks beside threads, signal handlers and log handlers that call a layer: nothing waits for what never comes.

Each scenario has a process of its own, so that one that hangs is a failure and no hanging test run.
"""

import faulthandler
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time

import pytest
import torch

from hybrid_moe import HybridMoE, MoEProblem, backends
from hybrid_moe.backends.base import Backend, Runner
from hybrid_moe.measure.workloads import Workload, make_inputs, random_weights
from hybrid_moe.serving import metrics
from hybrid_moe.serving.metrics import Counter

PROBLEM = MoEProblem(
    num_experts=16, num_local_experts=4, top_k=4, n_group=4, topk_group=2, hidden_size=256, intermediate_size=256
)
SECONDS = 60.0
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="of systems with fork and signals")


def in_its_own_process(scenario):
    process = multiprocessing.get_context("spawn").Process(target=_begin, args=(scenario,))
    process.start()
    process.join(SECONDS)
    hangs = process.is_alive()
    if hangs:
        process.kill()
        process.join()
    assert not hangs, f"{scenario.__name__} hangs"
    assert process.exitcode == 0


def _begin(scenario):
    faulthandler.dump_traceback_later(SECONDS - 10)
    torch.set_num_threads(1)  # OpenMP's own threads are not in a forked child
    scenario()


class Spy(Backend):
    """Runs what a scenario puts in the middle of its calls, and writes what memory holds then."""

    name = "spy"
    middle = staticmethod(lambda memory: None)

    def not_supported_reasons(self, problem, device, config):
        return []

    def prepare(self, problem, device, config):
        return SpyRunner()


class SpyRunner(Runner):
    def run(self, inputs, output):
        self.run_in(inputs, output, None)

    def run_in(self, inputs, output, memory):
        if memory is not None:
            memory.fill_(inputs.num_tokens)
        Spy.middle(memory)
        output.fill_(inputs.num_tokens if memory is None else int(memory[0]))

    def workspace_bytes(self, num_tokens):
        return 4096

    def reserved_bytes(self, num_tokens):
        return 4096


def layer_and_calls(*counts):
    """A layer that keeps a workspace, and calls of it that check their result; each was made once."""
    backends.BACKENDS["spy"] = Spy()
    weights = random_weights(PROBLEM, "cpu")
    cases = [make_inputs(Workload(tokens, 4), PROBLEM, weights) for tokens in counts]
    layer = HybridMoE.from_inputs(cases[0], PROBLEM, backend="spy", max_num_tokens=16)

    def caller(inputs):
        def call():
            output = layer(inputs.routing_logits, inputs.hidden_states, inputs.hidden_states_scale)
            assert bool((output == inputs.num_tokens).all())

        call()
        return call

    return layer, [caller(inputs) for inputs in cases]


def forks_beside_threads():
    layer, (call, other) = layer_and_calls(4, 7)
    stop = threading.Event()
    Spy.middle = lambda memory: time.sleep(0.001)  # in which others run, and the fork comes

    def work():
        while not stop.is_set():
            other()
            metrics.snapshot()

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(20):
            time.sleep(0.003)
            child = os.fork()
            if child == 0:
                before = sum(sample.calls for sample in metrics.snapshot())
                call()
                # A layer that is made there shares the memory, and its counts are the child's own.
                _, (again,) = layer_and_calls(3)
                again()
                os._exit(0 if sum(sample.calls for sample in metrics.snapshot()) == before + 3 else 1)
            assert _exit_code(child, 10.0) == 0
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def _exit_code(child, seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "it hangs"


def test_a_child_that_is_forked_beside_threads_calls_the_layer():
    in_its_own_process(forks_beside_threads)


def a_signal_in_the_middle_of_a_call():
    layer, (call, other) = layer_and_calls(4, 7)
    memories = []

    def handler(number, frame):
        other()
        metrics.snapshot()

    def middle(memory):
        memories.append(memory)
        if memory is not None:
            signal.raise_signal(signal.SIGUSR1)

    signal.signal(signal.SIGUSR1, handler)
    Spy.middle = middle
    call()
    # The interrupted call keeps its memory; the other one, in the middle of it, has none of it.
    assert [memory is None for memory in memories] == [False, True]
    memories.clear()
    Spy.middle = memories.append
    other()
    assert memories[0] is not None


def test_a_signal_handler_calls_the_layer_that_it_interrupts():
    in_its_own_process(a_signal_in_the_middle_of_a_call)


def signals_at_any_place():
    layer, (call, other) = layer_and_calls(4, 7)
    metrics._BATCH = 8  # added up at almost every call
    counter, handled = Counter(), 0

    def handler(number, frame):
        nonlocal handled
        handled += 1
        counter.add(1)
        counter.totals()
        metrics.snapshot()
        other()

    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.0005)
    end, calls, before = time.monotonic() + 3, 0, 0
    while time.monotonic() < end:
        call()
        for _ in range(20):
            counter.add(1)
        calls += 1
        metrics.Counters()  # joins the process's, and buries the one before
        now = counter.totals()[0]
        assert now >= before
        before = now
    signal.setitimer(signal.ITIMER_REAL, 0)
    time.sleep(0.01)
    assert handled > 100
    assert counter.totals() == (20 * calls + handled, 20 * calls + handled)
    assert {s.calls for s in layer.stats()} == {calls + handled + 2}
    assert len(counter._items) < 100


def test_a_signal_handler_reads_and_calls_at_any_place():
    in_its_own_process(signals_at_any_place)


class CallingHandler(logging.Handler):
    """Calls a layer for every record, in a thread of its own too, and waits for it."""

    def __init__(self, call):
        super().__init__()
        self.call, self.records = call, []

    def emit(self, record):
        self.records.append(record)
        self.call()
        thread = threading.Thread(target=self.call)
        thread.start()
        thread.join()


def a_log_handler_that_calls_the_layer():
    layer, (call, other) = layer_and_calls(4, 7)
    handler = CallingHandler(other)
    logger = logging.getLogger("hybrid_moe")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    call()
    assert not handler.records  # it was said before
    from hybrid_moe.serving import dispatch

    dispatch._ANNOUNCED.forget()
    HybridMoE.from_inputs(inputs_of(4), PROBLEM, backend="spy", max_num_tokens=16)(*activations(inputs_of(4)))
    assert len(handler.records) == 1


def inputs_of(tokens):
    return make_inputs(Workload(tokens, 4), PROBLEM, random_weights(PROBLEM, "cpu"))


def activations(inputs):
    return inputs.routing_logits, inputs.hidden_states, inputs.hidden_states_scale


def test_a_log_handler_calls_the_layer():
    in_its_own_process(a_log_handler_that_calls_the_layer)


def test_threads_wait_for_one_another_on_a_stream(monkeypatch):
    """What the lock is for: with none, two calls would be in the same memory."""
    monkeypatch.setitem(backends.BACKENDS, "spy", Spy())
    backends.prepare.cache_clear()
    monkeypatch.setattr(Spy, "middle", staticmethod(lambda memory: time.sleep(0.0005)))
    layer, calls = layer_and_calls(*range(1, 9))
    errors = []
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)

    def work(call):
        try:
            for _ in range(20):
                call()
        except AssertionError as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(call,)) for call in calls]
    try:
        for thread in threads:
            thread.start()
    finally:
        for thread in threads:
            thread.join()
        sys.setswitchinterval(before)
        backends.prepare.cache_clear()
    assert not errors
