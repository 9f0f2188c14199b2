"""What a call must do at the least, the figures of samples, and times by a clock that is known."""

import pytest
import torch
from known_clock import KnownClock

from hybrid_moe.kernels import read
from hybrid_moe.measure import timing
from hybrid_moe.measure.timing import (
    PeakRates,
    Probe,
    Work,
    measure_peak_rates,
    multiply_probe,
    read_probe,
    summarize,
    time_eager,
    time_graph,
)
from hybrid_moe.measure.workloads import Workload, make_inputs, random_weights
from hybrid_moe.problem import MoEProblem

PROBLEM = MoEProblem(32, 8, 4, 4, 2, 256, 128)


@pytest.mark.parametrize("routing", ["concentrated", "none"])
def test_work_counts_active_experts_once(routing):
    inputs = make_inputs(Workload(5, 8, routing), PROBLEM, random_weights(PROBLEM, "cpu"))
    work = Work.of(inputs, PROBLEM)
    rows, active = (20, 4) if routing == "concentrated" else (0, 0)
    weights = (256 * 256 + 256 * 128) + 4 * (2 * 2 + 2 * 1)
    call = 5 * (32 * 4 + 256 + 2 * 4 + 256 * 2) + 32 * 2
    assert (work.local_rows, work.active_experts) == (rows, active)
    assert work.bytes == active * weights + call
    assert work.flop == rows * 2 * (256 * 256 + 256 * 128)
    assert work.floor_us(PeakRates(1e6, 1e18)) == pytest.approx(work.bytes)
    assert work.floor_us(PeakRates(1e18, 1e6)) == pytest.approx(max(work.flop, work.bytes / 1e12))


def test_samples_are_summarised():
    latency = summarize([5.0, 1.0, 2.0, 3.0, 4.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0])
    assert (latency.median, latency.p10, latency.p90, latency.runs) == (6.0, 2.0, 10.0, 11)


def calls(clock, device_us, host_us=0.0):
    return [lambda us=us: clock.work(host_us, us) for us in device_us]


def test_a_graphs_time_is_that_of_one_call():
    clock = KnownClock()
    latency = time_graph(calls(clock, [5.0] * 12, host_us=40.0), 7, clock)
    assert (latency.median, latency.p10, latency.p90, latency.runs) == (5.0, 5.0, 5.0, 7)
    assert clock.graphs == [9]  # one graph, replayed twice and then seven times
    assert time_graph(calls(clock, [1.0, 2.0, 3.0, 6.0]), 3, clock).median == 3.0


def test_the_first_two_replays_do_not_count():
    for slow, runs in ((2, 3), (1, 1)):
        latency = time_graph(calls(clock := KnownClock(slow_replays=slow), [5.0] * 10), runs, clock)
        assert (latency.median, latency.p90, latency.runs) == (5.0, 5.0, runs)
    # The third does.
    assert time_graph(calls(clock := KnownClock(slow_replays=3), [5.0] * 10), 1, clock).median == 50.0


def test_eager_time_is_the_devices_and_the_hosts_by_itself():
    clock = KnownClock()
    device, host = time_eager(calls(clock, [20.0] * 10, host_us=3.0), 5, clock)
    # The first kernel starts when the host has queued it.
    assert device.median == pytest.approx(20.3) and host.median == pytest.approx(3.0)
    assert device.runs == host.runs == 5
    # A device that is faster than the host waits for it.
    device, host = time_eager(calls(clock, [1.0] * 10, host_us=3.0), 5, clock)
    assert device.median == pytest.approx(3.1) and host.median == pytest.approx(3.0)


def test_eager_loops_do_not_overlap_and_the_first_does_not_count():
    clock, costs = KnownClock(), iter([500.0] + [5.0] * 4)
    clock.device = 1000.0  # still busy with something else
    device, _ = time_eager([lambda: clock.work(1.0, next(costs))], 4, clock)
    assert device.p10 == device.p90 == pytest.approx(6.0)


def test_a_rate_is_the_amount_over_the_median_time():
    clock, costs = KnownClock(), iter([900.0, 800.0, 3.0, 1.0, 2.0])
    assert Probe(lambda: clock.work(0.0, next(costs)), 6000).per_second(3, clock) == pytest.approx(6000 / 2e-6)


def test_the_read_probe_reads_every_byte_once(monkeypatch):
    launched = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda source, sink, blocks, **options: launched.append((grid, source, sink, blocks, options))

    monkeypatch.setattr(read, "read_kernel", Kernel())
    probe = read_probe(4 * 8192, 3, "cpu")
    probe.call()
    ((grid, source, sink, blocks, options),) = launched
    assert grid == (3,) and blocks * options["BLOCK"] == source.numel() and sink.numel() == options["BLOCK"]
    assert probe.amount == source.untyped_storage().nbytes() == 4 * 8192 * 4


def test_the_multiply_probe():
    probe = multiply_probe(64, "cpu")
    assert probe.amount == 2 * 64**3
    assert probe.call().shape == (64, 64) and probe.call().dtype == torch.bfloat16


def test_the_peak_rates(monkeypatch):
    clock = KnownClock()

    class Properties:
        multi_processor_count = 7

    made = []

    def probe(amount, us):
        def make(*arguments):
            made.append(arguments)
            return Probe(lambda: clock.work(1.0, us), amount)

        return make

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(timing, "read_probe", probe(3000, 2.0))
    monkeypatch.setattr(timing, "multiply_probe", probe(8000, 4.0))
    assert made == []
    rates = measure_peak_rates(clock)
    # From the call, which the host takes a microsecond for, to the end of its work.
    assert rates.read_bytes_per_s == pytest.approx(3000 / 3e-6) and rates.fp8_flop_per_s == pytest.approx(8000 / 5e-6)
    assert made == [(2**30, 56, "cuda"), (8192, "cuda")]
