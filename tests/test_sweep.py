"""Sweeps and the policy made from them, with a bench that needs no GPU."""

import contextlib
import fcntl
import functools
import io
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from fake_bench import SMALL, A, B, C, FakeBench, latency_us
from hypothesis import given
from hypothesis import strategies as st
from known_clock import KnownClock
from rich.console import Console
from test_cli import SMALL_OPTIONS, cli, fails

from hybrid_moe import backends
from hybrid_moe.candidate import Candidate
from hybrid_moe.cli import watch
from hybrid_moe.cli.regenerate import Shown, print_result
from hybrid_moe.device import DeviceKey
from hybrid_moe.learn.learner import learn
from hybrid_moe.learn.regenerate import Regeneration, candidates_of, loads_of
from hybrid_moe.measure import bench
from hybrid_moe.measure.bench import record_fields
from hybrid_moe.measure.provenance import code
from hybrid_moe.measure.readers import read_records
from hybrid_moe.measure.records import BenchRecord, GpuState, append_record
from hybrid_moe.measure.sweep import gpu, journal
from hybrid_moe.measure.sweep.plan import TIMINGS, Plan, Results, next_job
from hybrid_moe.measure.sweep.process import Identity, SweepError, Worker
from hybrid_moe.measure.sweep.run import sweep
from hybrid_moe.measure.timing import PeakRates
from hybrid_moe.measure.workloads import DEEPSEEK_V3, DEFINITION_WORKLOADS, Workload, random_weights
from hybrid_moe.policy.schema import LearnerOptions
from hybrid_moe.policy.select import NoBackendError, resolve
from hybrid_moe.policy.store import load_policy, policy_path, user_policy_dir
from hybrid_moe.problem import MoEProblem

DRIVER = Path(__file__).with_name("sweep_driver.py")
CANDIDATES = (A, B, C)
# The processes of these tests are forked, as importing torch for each would take seconds; one test below spawns.
FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Layers this small are slower on several threads, which wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def record(plan, job, timing, us, device="cpu", environment=None):
    """Of a wrong result where ``us`` is None."""
    result = (
        {"status": "failed", "reason": "wrong"} if us is None else {"status": "passed", "latency_us": {"median": us}}
    )
    fields = record_fields(device, plan.problem, job.workload, job.choice, environment or {})
    return BenchRecord(**fields, timing=timing, **result)


def planned(plan, latency, records=(), most=10**6):
    """What the planner gives if nothing fails: the records, without any process."""
    results, made = Results(records), list(records)
    while len(made) < most and (job := next_job(plan, results)) is not None:
        for timing in job.timings:
            made.append(record(plan, job, timing, latency(job.choice, job.workload.num_tokens)))
            results.add(made[-1])
    return made


def swept(path, plan, measuring, *, budget_s=1e9, limit_s=5.0, retry=False, context=FORK):
    """One run as the command does it, with a policy neither learned nor installed."""
    with Worker(measuring, path.with_suffix(".log"), context) as worker:
        identity = worker.identify()
        with journal.locked(path):
            journal.mend(path)
            records = journal.resume(path, identity, plan.problem)
            return sweep(plan, worker, identity, path, records, budget_s=budget_s, limit_s=limit_s, retry=retry)


def small_plan(candidates=CANDIDATES, max_tokens=8, loads=("uniform",)):
    return Plan.make(SMALL, candidates, quick=True, loads=loads, max_tokens=max_tokens)


def keys(path):
    return [record.key for record in read_records(path)]


# ---- The planner ----


def test_the_full_plan_has_the_definitions_workloads_and_the_quick_one_fewer():
    full, quick = (Plan.make(DEEPSEEK_V3, CANDIDATES, quick=quick) for quick in (False, True))
    assert {w.num_tokens for w in DEFINITION_WORKLOADS} <= set(full.anchors)
    assert set(quick.anchors) < set(full.anchors)
    assert quick.most_workloads < full.most_workloads
    for plan in (full, quick):
        assert {1, 16384} <= set(plan.anchors)
        tokens = sorted(plan.anchors)
        assert all(high <= 2 * low for low, high in zip(tokens, tokens[1:], strict=False))
    for known in DEFINITION_WORKLOADS:
        assert full.workload(known.num_tokens, "uniform") == known
        assert full.workload(known.num_tokens, "zipf").uuid is None


def test_from_901_tokens_on_a_rank_has_three_shares():
    plan = Plan.make(DEEPSEEK_V3, CANDIDATES, loads=("uniform", "zipf"))
    assert plan.loads_at(900) == ("uniform", "zipf")
    assert plan.loads_at(901) == ("light_rank", "mean_rank", "busy_rank", "zipf")
    assert [w.routing for w in plan.workloads(14107)] == list(plan.loads_at(14107))
    made = planned(plan, latency_us)
    assert {r.routing for r in made if r.num_tokens >= 901} == set(plan.loads_at(901))
    assert len({(r.num_tokens, r.routing) for r in made}) <= plan.most_workloads
    # One rank alone has no share.
    whole = replace(DEEPSEEK_V3, num_local_experts=256, intermediate_size=256)
    assert Plan.make(whole, CANDIDATES, loads=("uniform",)).loads_at(901) == ("uniform",)
    assert Plan.make(DEEPSEEK_V3, CANDIDATES, loads=("zipf",)).loads_at(901) == ("zipf",)


def test_the_range_is_seen_early():
    anchors = Plan.make(DEEPSEEK_V3, CANDIDATES).anchors
    assert set(anchors[:2]) == {1, 16384} and anchors[2] == 128


@given(st.integers(1, 20000), st.booleans())
def test_anchors_hold_to_the_largest_t(max_tokens, quick):
    anchors = Plan.make(DEEPSEEK_V3, CANDIDATES, quick=quick, max_tokens=max_tokens).anchors
    assert max(anchors) == max_tokens and min(anchors) == 1 and len(set(anchors)) == len(anchors)


def test_every_candidate_is_measured_once_at_every_workload_in_rotating_order():
    plan = small_plan(max_tokens=64, loads=("uniform", "zipf"))
    made = planned(plan, latency_us)
    assert len({r.key for r in made}) == len(made)
    firsts, seen = [], {}
    for r in made:
        seen.setdefault((r.num_tokens, r.routing), []).append(r.choice)
    for choices in seen.values():
        assert sorted(map(str, choices)) == sorted(str(c) for c in CANDIDATES for _ in range(2))
        firsts.append(choices[0])
    assert firsts[:4] == [A, B, C, A]
    assert {load for _, load in seen} == {"uniform", "zipf"}


@functools.cache
def whole():
    return tuple(planned(small_plan(max_tokens=64, loads=("uniform", "zipf")), latency_us))


@given(st.data())
def test_the_plan_depends_on_the_records_alone(data):
    plan = small_plan(max_tokens=64, loads=("uniform", "zipf"))
    cut = data.draw(st.integers(0, len(whole())))
    again = planned(plan, latency_us, whole()[:cut])
    assert [r.key for r in again] == [r.key for r in whole()]


def costs_of(crossing, slope):
    """Two candidates whose latencies cross at one T, and their ratio there by powers of T."""
    return lambda choice, t: 100.0 if choice == A else 100.0 * (t / crossing) ** -slope


def learned(plan, made, tie_margin=0.0):
    options = LearnerOptions(tie_margin=tie_margin, max_gap=2.0, timing="cuda_graph")
    return learn(made, options, problem=plan.problem, inputs=[])


@given(st.floats(2.0, 12000.0), st.floats(0.05, 2.0), st.booleans())
def test_crossings_are_found(crossing, slope, quick):
    plan = Plan.make(DEEPSEEK_V3, (A, B), quick=quick, loads=("uniform",))
    latency = costs_of(crossing, slope)
    policy = learned(plan, planned(plan, latency))
    table = resolve(policy, plan.problem, DeviceKey("cpu"))
    for t in sorted({round(1.03**n) for n in range(329)}):
        ratio = t / crossing
        # Between neighbouring whole numbers there is nothing to measure.
        if max(ratio, 1 / ratio) > 1.1 and abs(t - crossing) > 1:
            assert table.choice(t) == (A if t < crossing else B), (t, crossing)


def test_three_candidates_and_two_crossings():
    plan = Plan.make(DEEPSEEK_V3, CANDIDATES, quick=True)
    made = planned(plan, latency_us)
    policy = learned(plan, made)
    assert [regime.choice for regime in policy.regimes] == [A, B, C]
    bounds = [regime.max_tokens for regime in policy.regimes]
    for found, true in zip(bounds, (50, 1889), strict=False):
        assert 1 / 1.15 < found / true < 1.15
    assert policy.training_regret.worst < 0.01


def test_it_looks_where_the_choice_is_in_doubt():
    plan = Plan.make(DEEPSEEK_V3, CANDIDATES, quick=True, loads=("uniform",))
    tokens = list(dict.fromkeys(r.num_tokens for r in planned(plan, latency_us)))
    refined = tokens[len(plan.anchors) :]
    assert len(refined) == plan.refinements
    assert {t for t in refined if 32 <= t <= 64} and {t for t in refined if 1024 <= t <= 2048}
    # One is far ahead at both ends: nothing there is in doubt.
    assert not [t for t in refined if t < 16 or t > 8192]


def test_one_candidate_alone_needs_no_refinement():
    plan = Plan.make(DEEPSEEK_V3, (A,), quick=True)
    assert {r.num_tokens for r in planned(plan, latency_us)} == set(plan.anchors)


@pytest.mark.parametrize("wrong, refined", [(False, True), (True, False)])
def test_one_that_is_wrong_at_a_load_is_not_compared(wrong, refined):
    plan, results = Plan.make(DEEPSEEK_V3, (A, B), quick=True, loads=("uniform", "zipf")), Results([])
    tokens = set()
    while (job := next_job(plan, results)) is not None:
        tokens.add(job.workload.num_tokens)
        fails = wrong and job.choice == B and job.workload.routing == "zipf"
        us = None if fails else latency_us(job.choice, job.workload.num_tokens)
        for timing in job.timings:
            results.add(record(plan, job, timing, us))
    assert (tokens > set(plan.anchors)) == refined


def test_a_quick_sweep_is_the_start_of_a_full_one():
    quick, full = (Plan.make(DEEPSEEK_V3, CANDIDATES, quick=q, loads=("uniform",)) for q in (True, False))
    made = planned(quick, latency_us)
    more = planned(full, latency_us, made)
    assert len({r.key for r in more}) == len(more)
    assert {w.num_tokens for w in DEFINITION_WORKLOADS} <= {r.num_tokens for r in more}
    assert len({r.num_tokens for r in more}) <= len(full.anchors) + full.refinements


# ---- Killed and started again ----


def drive(*arguments):
    command = [sys.executable, str(DRIVER), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": f"{DRIVER.parents[1]}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_killed_ten_times_it_measures_what_it_would_have_measured(tmp_path):
    through, killed = tmp_path / "through" / "records.jsonl", tmp_path / "killed" / "records.jsonl"
    drive(through, 0, 0)
    wanted = keys(through)
    assert len(set(wanted)) == len(wanted) > 100
    statuses = {(r.choice.backend, r.status) for r in read_records(through)}
    assert {
        ("refused", "unsupported"),
        ("crashing", "failed"),
        ("fake_c", "timeout"),
        ("fake_b", "failed"),
        ("fake_a", "failed"),
    } <= statuses
    drive(killed, 10, 1, len(wanted))
    assert killed.read_bytes().endswith(b"\n")
    assert keys(killed) == wanted  # none lost, none twice, in the same order
    assert [(r.status, r.latency_us) for r in read_records(killed)] == [
        (r.status, r.latency_us) for r in read_records(through)
    ]


def _sweep_for_ever(path, pids):
    swept(path, small_plan(), FakeBench(bad={"fake_b": "hang"}, pids=pids), limit_s=1e6)


def alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"  # dead, and waiting for somebody to ask


def eventually(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.skipif(sys.platform != "linux", reason="by Linux's means")
def test_a_hanging_process_does_not_outlive_a_killed_sweep(tmp_path):
    path, pids = tmp_path / "records.jsonl", tmp_path / "pids"
    run = FORK.Process(target=_sweep_for_ever, args=(path, pids))
    run.start()
    eventually(lambda: path.exists() and len(keys(path)) >= 2)
    worker = int(pids.read_text())
    assert alive(worker)
    os.kill(run.pid, signal.SIGKILL)
    run.join()
    eventually(lambda: not alive(worker))
    # What it was at is measured again, and nothing else.
    outcome = swept(path, small_plan(), FakeBench())
    assert len(keys(path)) == len(set(keys(path))) == len(outcome.records)
    assert outcome.added == len(outcome.records) - 2


# ---- A candidate that misbehaves costs its own records only ----


@pytest.mark.parametrize(
    ("kind", "status", "reason"),
    [
        ("hang", "timeout", "no result in 0.3 s"),
        ("exit", "failed", "exit code 7"),
        ("segfault", "failed", "SIGSEGV"),
        ("raise", "failed", "RuntimeError: CUDA error"),
        ("break", "failed", "RuntimeError: CUDA error"),
        ("wrong", "failed", "relative_l2 is 0.7"),
        ("unencodable", "failed", r"RuntimeError: \udcff\x1b[2J"),
        ("mute", "failed", "_Mute: (its message can't be made: RuntimeError)"),
    ],
)
def test_one_bad_workload_costs_its_own_records(tmp_path, kind, status, reason):
    path = tmp_path / "records.jsonl"
    plan = small_plan()
    outcome = swept(path, plan, FakeBench(bad={"fake_b@4 uniform": kind}), limit_s=0.3)
    bad = [r for r in outcome.records if r.status != "passed"]
    assert [(r.choice, r.num_tokens, r.timing) for r in bad] == [(B, 4, "cuda_graph"), (B, 4, "eager")]
    assert all(r.status == status and reason in r.reason for r in bad)
    good = swept(tmp_path / "good.jsonl", plan, FakeBench())
    assert {r.key for r in outcome.records} >= {r.key for r in good.records if r.num_tokens in plan.anchors}
    assert not Results(outcome.records).left_out(CANDIDATES)
    # Resumed, a failure isn't tried again; on demand it is, and the later record counts.
    assert swept(path, plan, FakeBench()).added == 0
    again = swept(path, plan, FakeBench(), retry=True)
    assert [(r.choice, r.num_tokens, r.status) for r in again.records[len(outcome.records) :]] == [(B, 4, "passed")] * 2


def test_a_grandchild_that_outlives_its_process_does_not_hide_how_that_ended(tmp_path):
    begun = time.monotonic()
    pids = tmp_path / "pids"
    bench = FakeBench(bad={"fake_b@4 uniform": "leave a child"}, pids=pids)
    outcome = swept(tmp_path / "records.jsonl", small_plan(max_tokens=4), bench, limit_s=20.0)
    assert time.monotonic() - begun < 15
    bad = [(r.status, r.reason) for r in outcome.records if r.status != "passed"]
    assert bad == [("failed", "its process ended with exit code 5")] * 2
    # Nobody is left of the groups: the next timing has the GPU to itself.
    assert not running_in_groups(set(pids.read_text().split()))


def running_in_groups(groups):
    running = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, group, *_ = stat.read_text().rpartition(")")[2].split()
            running += [stat.parent.name] if group in groups and state != "Z" else []
    return running


@pytest.mark.parametrize("kind", ["refuse", "exit"])
def test_one_that_was_left_out_comes_back_on_demand(tmp_path, kind):
    path, plan = tmp_path / "records.jsonl", small_plan()
    swept(path, plan, FakeBench(bad={"fake_b": kind}))
    outcome = swept(path, plan, FakeBench(), retry=True)
    assert not Results(outcome.records).left_out(CANDIDATES)
    assert {r.num_tokens for r in outcome.records if r.choice == B and r.status == "passed"} >= set(plan.anchors)
    assert swept(path, plan, FakeBench()).added == 0


def test_what_came_before_a_hang_stands(tmp_path):
    outcome = swept(
        tmp_path / "records.jsonl", small_plan(), FakeBench(bad={"fake_b@4 uniform": "hang eager"}), limit_s=0.3
    )
    found = {r.timing: r.status for r in outcome.records if (r.choice, r.num_tokens) == (B, 4)}
    assert found == {"cuda_graph": "passed", "eager": "timeout"}


@pytest.mark.parametrize("kind", ["hang", "exit", "break"])
def test_given_up_after_two_losses(tmp_path, kind):
    path = tmp_path / "records.jsonl"
    outcome = swept(path, small_plan(), FakeBench(bad={"fake_b": kind}), limit_s=0.2)
    assert len({r.num_tokens for r in outcome.records if r.choice == B}) == 2
    assert {r.num_tokens for r in outcome.records if r.choice == A} >= set(small_plan().anchors)
    reasons = Results(outcome.records).left_out(CANDIDATES)
    assert list(reasons) == [B] and "given up after 2" in reasons[B]
    assert swept(path, small_plan(), FakeBench()).added == 0


def test_one_that_only_raises_is_not_given_up(tmp_path):
    outcome = swept(tmp_path / "records.jsonl", small_plan(), FakeBench(bad={"fake_b": "raise"}))
    assert {r.num_tokens for r in outcome.records if r.choice == B} >= set(small_plan().anchors)


def test_a_refused_candidate_is_recorded_once(tmp_path):
    path = tmp_path / "records.jsonl"
    outcome = swept(path, small_plan(), FakeBench(bad={"fake_b": "refuse"}))
    refused = [r for r in outcome.records if r.choice == B]
    assert [(r.status, r.reason, r.timing) for r in refused] == [
        ("unsupported", "no such GPU", timing) for timing in ("cuda_graph", "eager")
    ]
    assert Results(outcome.records).left_out(CANDIDATES) == {B: "no such GPU"}


def test_a_workload_that_cannot_be_made_is_nobodys_fault(tmp_path):
    path = tmp_path / "records.jsonl"
    with pytest.raises(SweepError, match=r"uniform with T = 1 can't be made ready.*no room for the weights.*\.log"):
        swept(path, small_plan(), FakeBench(bad={"load": "raise"}))
    assert not path.exists()


def test_a_spawned_process(tmp_path):
    # As the command does it.
    outcome = swept(tmp_path / "records.jsonl", small_plan(max_tokens=2), FakeBench(), limit_s=60, context=None)
    assert len(outcome.records) == 2 * 3 * 2
    assert "a library prints what it likes" in (tmp_path / "records.log").read_text()


# ---- Budget ----


def test_the_budget_ends_it_between_two_t(tmp_path):
    path, plan = tmp_path / "records.jsonl", small_plan(max_tokens=64, loads=("uniform", "zipf"))
    slow = FakeBench(pause_s=0.005)
    first = swept(path, plan, slow, budget_s=0.1)
    assert first.out_of_time and 0 < first.added and first.spent_s >= 0.1
    per_t = len(plan.loads) * len(CANDIDATES) * 2
    assert first.added % per_t == 0
    # What was spent is in the records: the same budget buys nothing more, and a larger one goes on.
    again = swept(path, plan, slow, budget_s=0.1)
    assert again.added == 0 and again.spent_s == pytest.approx(first.spent_s, abs=0.01)
    last = swept(path, plan, slow, budget_s=100)
    assert not last.out_of_time
    assert [r.key for r in last.records] == [r.key for r in planned(plan, latency_us)]


# ---- The file ----


def test_a_torn_line_is_cut_off_and_measured_again(tmp_path):
    path, plan = tmp_path / "records.jsonl", small_plan()
    swept(path, plan, FakeBench())
    wanted, content = keys(path), path.read_bytes()
    lines = content.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:5]) + lines[5][:40])
    assert "cut off its last 40 bytes" in journal.mend(path)
    assert path.read_bytes() == b"".join(lines[:5])
    swept(path, plan, FakeBench())
    assert keys(path) == wanted


def test_a_whole_record_without_its_newline_is_kept(tmp_path):
    path = tmp_path / "records.jsonl"
    swept(path, small_plan(max_tokens=1), FakeBench())
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    assert "newline" in journal.mend(path)
    assert path.read_bytes() == content
    assert journal.mend(path) == ""


@pytest.mark.parametrize("content", [b"", b"\n"])
def test_nothing_to_mend(tmp_path, content):
    path = tmp_path / "records.jsonl"
    assert journal.mend(path) == ""
    path.write_bytes(content)
    assert journal.mend(path) == "" and path.read_bytes() == content


def test_a_damaged_line_in_the_middle_is_named_and_left_alone(tmp_path):
    path = tmp_path / "records.jsonl"
    swept(path, small_plan(max_tokens=1), FakeBench())
    path.write_bytes(b"garbage\n" + path.read_bytes())
    before = path.read_bytes()
    with pytest.raises(ValueError, match="line 1 is no benchmark record"):
        swept(path, small_plan(), FakeBench())
    assert path.read_bytes() == before


# Whole or cut short, with or without lines of ours: none of this was written by a sweep.
_RECORD = b'{"schema_version":1,"device":"cpu","problem":"p","backend":"b","num_tokens":1,"local_expert_offset":0,'
_RECORD += b'"routing":"uniform","seed":0,"status":"failed","reason":"r","timing":"eager"}'
FOREIGN = {
    "a picture": b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 4,
    "one JSON line": b'{"a": 1}',
    "a whole JSON line": b'{"a": 1}\n',
    "text": b"dear diary,\n\ntoday",
    "a policy": b'{"schema_version":1,"device":"cpu","problem":{"num_experts":256},"definition":"d"}',
    "a policy cut short": b'{"schema_version":1,"device":"cpu","problem":{"num_ex',
    "a record and a JSON value": _RECORD + b'\n{"a": 1}',
    "a record and text": _RECORD + b"\ndear diary",
    "a record with an unknown status": _RECORD.replace(b"failed", b"fine") + b"\n",
    "spaces": b"   ",
    "zeros": bytes(100),
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_a_file_that_is_not_ours_is_refused_and_untouched(tmp_path, content):
    path = tmp_path / "precious"
    path.write_bytes(content)
    before = os.stat(path)
    with pytest.raises(ValueError, match="precious, line . is no benchmark record.*nothing was changed"):
        task(path).perform(FakeBench(costs=REAL_COSTS), FORK)
    for attempt in (journal.mend, lambda p: journal.resume(p, Identity("cpu", {}), SMALL)):
        with pytest.raises(ValueError, match="precious, line"):
            attempt(path)
    assert path.read_bytes() == content and os.stat(path).st_mtime_ns == before.st_mtime_ns
    assert os.listdir(tmp_path) == ["precious"]


@pytest.mark.parametrize("kind", ["a picture", "text", "a policy", "a policy cut short", "zeros"])
def test_only_records_are_set_aside(tmp_path, kind):
    path = tmp_path / "precious"
    path.write_bytes(FOREIGN[kind])
    with pytest.raises(ValueError, match="no benchmark record"):
        task(path, fresh=True).perform(FakeBench(costs=REAL_COSTS), FORK)
    assert os.listdir(tmp_path) == ["precious"] and path.read_bytes() == FOREIGN[kind]


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_every_beginning_of_a_record_is_known_as_one(tmp_path, kept):
    path = tmp_path / "records.jsonl"
    swept(path, small_plan(max_tokens=1), FakeBench())
    lines = path.read_bytes().splitlines(keepends=True)
    whole = b"".join(lines[:kept])
    for cut in range(1, len(lines[kept]) - 1):
        for zeros in (b"", bytes(7)):
            path.write_bytes(whole + lines[kept][:cut] + zeros)
            assert "cut off" in journal.mend(path)
            assert path.read_bytes() == whole


def test_a_link_to_the_records_is_followed(tmp_path):
    real, link = tmp_path / "real.jsonl", tmp_path / "link.jsonl"
    link.symlink_to(real)
    result = task(link, REAL[:1]).perform(FakeBench(costs=REAL_COSTS), FORK)
    assert link.is_symlink() and result.records == real
    task(link, REAL[:1], fresh=True).perform(FakeBench(costs=REAL_COSTS), FORK)
    assert link.is_symlink() and len(list(tmp_path.glob("real.until-*.jsonl"))) == 1


def test_links_and_pipes_in_the_place_of_files_of_ours(tmp_path):
    path, precious = tmp_path / "records.jsonl", tmp_path / "precious"
    precious.write_bytes(b"data")
    for name in (".records.jsonl.lock", "records.jsonl.log", "records.unverified.json"):
        (tmp_path / name).unlink(missing_ok=True)
        (tmp_path / name).symlink_to(precious)
        with pytest.raises((ValueError, SweepError)):
            task(path).perform(FakeBench(costs=REAL_COSTS), FORK)
        assert precious.read_bytes() == b"data"
    os.mkfifo(path)
    with pytest.raises(ValueError, match="FIFO"):
        task(path).perform(FakeBench(costs=REAL_COSTS), FORK)


def test_the_records_are_not_the_policy(tmp_path):
    path = tmp_path / "records.jsonl"
    with pytest.raises(ValueError, match="--output is .* read as well"):
        task(path, output=path).perform(FakeBench(costs=REAL_COSTS), FORK)
    (tmp_path / "photo.json").write_bytes(FOREIGN["a picture"])
    with pytest.raises(ValueError, match="isn't a policy"):
        task(path, output=tmp_path / "photo.json").perform(FakeBench(costs=REAL_COSTS), FORK)
    assert (tmp_path / "photo.json").read_bytes() == FOREIGN["a picture"] and not path.exists()


@pytest.mark.parametrize("seconds", [b"null", b"NaN", b'"7"', b"-5", b"true", b"1e999", b"9" * 4000, b"[]"])
def test_durations_that_are_none_count_nothing(tmp_path, seconds):
    path, plan = tmp_path / "records.jsonl", small_plan(max_tokens=2)
    swept(path, plan, FakeBench())
    first, *rest = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(re.sub(rb'"seconds":[0-9.e-]+', b'"seconds":' + seconds, first) + b"".join(rest))
    assert seconds in path.read_bytes()
    outcome = swept(path, plan, FakeBench(), budget_s=1e9)
    assert 0 <= outcome.spent_s < 60 and outcome.added == 0


@pytest.mark.parametrize(
    ("identity", "problem", "wanted"),
    [
        (Identity("cpu", {"torch": "2.0"}), SMALL, "torch 1.0, here 2.0"),
        (Identity("cpu", {"torch": "1.0", "sglang-kernel": "0.4.5"}), SMALL, "sglang-kernel not there, here 0.4.5"),
        (Identity("cpu", {}), SMALL, "torch 1.0, here not there"),
        (Identity("nvidia_h200", {"torch": "1.0"}), SMALL, "device cpu, here nvidia_h200"),
        (Identity("cpu", {"torch": "1.0"}), DEEPSEEK_V3, "problem moe_fp8"),
        (Identity("cpu", {"torch": "1.0"}), replace(SMALL, gate_first=True), "gate_first=False"),
    ],
)
def test_other_circumstances_are_refused(tmp_path, identity, problem, wanted):
    path = tmp_path / "records.jsonl"
    swept(path, small_plan(max_tokens=1), FakeBench())
    before = path.read_bytes()
    with pytest.raises(ValueError, match=wanted) as refused:
        journal.resume(path, identity, problem)
    assert "--records" in str(refused.value) and "--fresh" in str(refused.value)
    assert path.read_bytes() == before


def test_one_at_a_time(tmp_path):
    path = tmp_path / "records.jsonl"
    with journal.locked(path):
        with pytest.raises(ValueError, match="another run is writing"), journal.locked(path):
            pass
    with journal.locked(path):  # given back
        pass


def test_a_second_run_is_refused_and_changes_nothing(tmp_path):
    path = tmp_path / "records.jsonl"
    with open(path.with_name(f".{path.name}.lock"), "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another run is writing"):
            task(path).perform(FakeBench(), FORK)
    assert not path.exists()


# ---- From the sweep to the policy ----


class Twin(type(backends.BACKENDS["torch_reference"])):
    """The reference under another name: a second candidate that is right on the CPU."""

    name = "twin_for_tests"


class Wrong(Twin):
    name = "wrong_for_tests"

    def prepare(self, problem, device, config):
        class Zeros(backends.Runner):
            def run(self, inputs, output):
                output.zero_()

            def workspace_bytes(self, num_tokens):
                return 0

        return Zeros()


@pytest.fixture(autouse=True)
def more_backends(monkeypatch):
    for backend in (Twin(), Wrong()):
        monkeypatch.setitem(backends.BACKENDS, backend.name, backend)


REAL = (Candidate("torch_reference"), Candidate(Twin.name))
REAL_COSTS = {REAL[0]: (10.0, 4.0), REAL[1]: (20.0, 0.1)}  # from T = 3 on the second is faster


def task(records, candidates=REAL, **others):
    options = LearnerOptions(tie_margin=0.0, max_gap=2.0, timing="cuda_graph")
    given = {"plan": small_plan(candidates), "options": options, "budget_s": 1e9, "limit_s": 5.0}
    return Regeneration(records=records, **(given | others))


def cpu_policy_path():
    return policy_path(user_policy_dir(), "cpu", SMALL)


def test_regenerate_makes_verifies_and_installs(capsys):
    result = task(None).perform(FakeBench(costs=REAL_COSTS), FORK)
    assert result.installed and result.verified and result.path == cpu_policy_path()
    assert result.records == journal.default_path("cpu", SMALL) and result.records.is_file()
    policy = load_policy(result.path)
    table = resolve(policy, SMALL, DeviceKey("cpu"))
    assert [table.choice(t) for t in (1, 2, 3, 8, 100)] == [REAL[0]] * 2 + [REAL[1]] * 3
    assert policy.inputs[0].name == result.records.name
    assert policy.environment["torch"] == "1.0"
    print_result(result)
    shown = capsys.readouterr().out
    assert "written to" in shown and "training regret" in shown and "verified" in shown
    assert json.dumps(result.to_dict())
    # Again: nothing is measured, and the bytes are the same.
    before = result.path.read_bytes()
    again = task(None).perform(FakeBench(costs=REAL_COSTS), FORK)
    assert again.outcome.added == 0 and again.path.read_bytes() == before
    # `hybrid-moe learn` gives them too.
    other = result.path.with_name("again.json.txt")
    cli("learn", result.records, "-o", other, "--tie-margin", 0, "--max-gap", 2, "--timing", "cuda_graph")
    assert other.read_bytes() == before
    assert not list(result.records.parent.glob("*.unverified.json"))


def test_a_policy_that_fails_its_verification_is_not_installed(tmp_path, capsys):
    wrong = Candidate(Wrong.name)
    task(tmp_path / "old.jsonl", REAL[:1]).perform(FakeBench(costs=REAL_COSTS), FORK)
    before = cpu_policy_path().read_bytes()
    result = task(tmp_path / "new.jsonl", (*REAL[:1], wrong)).perform(
        FakeBench(costs={REAL[0]: (10.0, 1.0), wrong: (1.0, 0.1)}), FORK
    )
    assert not result.verified and not result.installed
    assert "failed" in {finding.status for finding in result.findings}
    assert cpu_policy_path().read_bytes() == before
    assert result.path == tmp_path / "new.failed-verification.json"
    assert load_policy(result.path) == result.policy
    print_result(result)
    assert "not installed" in capsys.readouterr().out


def test_what_cannot_run_here_is_not_installed(tmp_path):
    # Measured on another device, as far as this one can tell.
    result = task(tmp_path / "records.jsonl", REAL[:1]).perform(FakeBench(device="gpu_x", costs=REAL_COSTS), FORK)
    assert not result.installed and "unverified" in {finding.status for finding in result.findings}


def test_without_installing_and_elsewhere(tmp_path):
    kept = task(tmp_path / "records.jsonl", REAL[:1], install=False).perform(FakeBench(costs=REAL_COSTS), FORK)
    assert kept.path == tmp_path / "records.policy.json" and kept.verified and not kept.installed
    assert not cpu_policy_path().exists()
    named = tmp_path / "mine.json"
    result = task(tmp_path / "records.jsonl", REAL[:1], output=named).perform(FakeBench(costs=REAL_COSTS), FORK)
    assert result.path == named and load_policy(named) == kept.policy
    assert not cpu_policy_path().exists()


def test_the_policy_of_another_problem_is_not_overwritten(tmp_path):
    task(tmp_path / "records.jsonl", REAL[:1]).perform(FakeBench(costs=REAL_COSTS), FORK)
    before = cpu_policy_path().read_bytes()
    problem = replace(SMALL, gate_first=True)
    plan = Plan.make(problem, REAL[:1], quick=True, loads=("uniform",), max_tokens=2)
    other = tmp_path / "other.jsonl"
    with pytest.raises(ValueError, match="would be lost"):
        task(other, plan=plan).perform(FakeBench(problem=problem, costs=REAL_COSTS), FORK)
    assert cpu_policy_path().read_bytes() == before and not other.exists()


def test_fresh_sets_earlier_records_aside(tmp_path):
    path = tmp_path / "records.jsonl"
    task(path, REAL[:1]).perform(FakeBench(costs=REAL_COSTS), FORK)
    old = path.read_bytes()
    newer = FakeBench(costs=REAL_COSTS, environment={"torch": "2.0"})
    with pytest.raises(ValueError, match="torch 1.0, here 2.0"):
        task(path, REAL[:1]).perform(newer, FORK)
    assert path.read_bytes() == old
    for _ in range(2):
        result = task(path, REAL[:1], fresh=True).perform(newer, FORK)
        assert result.policy.environment["torch"] == "2.0"
    aside = list(tmp_path.glob("records.until-*.jsonl"))
    assert len(aside) == 2 and old in [p.read_bytes() for p in aside]


def test_no_time_and_no_records(tmp_path):
    with pytest.raises(ValueError, match="give more --minutes"):
        task(tmp_path / "records.jsonl", budget_s=0.0).perform(FakeBench(), FORK)


def test_no_candidate_can_run(tmp_path):
    with pytest.raises(NoBackendError, match="torch_reference: no such GPU"):
        task(tmp_path / "records.jsonl", REAL[:1]).perform(FakeBench(bad={"torch_reference": "refuse"}), FORK)


def test_only_wrong_answers_at_one_t(tmp_path):
    wrong = FakeBench(costs=REAL_COSTS, bad={"torch_reference@8 uniform": "wrong"})
    with pytest.raises(ValueError, match=r"no right one at T = 8.*--retry") as refused:
        task(tmp_path / "records.jsonl", REAL[:1]).perform(wrong, FORK)
    assert "--max-tokens" in str(refused.value)
    smaller = small_plan(REAL[:1], max_tokens=4)
    assert task(tmp_path / "records.jsonl", plan=smaller).perform(wrong, FORK).verified
    assert task(tmp_path / "records.jsonl", REAL[:1], retry=True).perform(FakeBench(costs=REAL_COSTS), FORK).verified


# ---- The command ----


@pytest.fixture
def as_if_with_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    costs = dict.fromkeys(candidates_of(None), (5.0, 0.0)) | REAL_COSTS
    monkeypatch.setattr("hybrid_moe.cli.regenerate.GpuBench", lambda problem, copies: FakeBench(problem, costs=costs))


def test_the_command(as_if_with_a_gpu, tmp_path):
    arguments = ["regenerate", "--quick", "--max-tokens", 2, "--candidate", "torch_reference", *SMALL_OPTIONS]
    result = cli(*arguments, "--json")
    found = json.loads(result.stdout)
    assert found["installed"] and found["verified"] and found["path"] == str(cpu_policy_path())
    assert found["measured_now"] == found["measured_in_all"] == 2 * 3 * 2
    assert load_policy(cpu_policy_path()).model_dump(mode="json") == found["policy"]
    lines = result.stderr.splitlines()
    assert len(lines) == 6
    assert "/30 T = 1 uniform: torch_reference 14.0 us cuda_graph, 28.0 us eager" in lines[0]
    assert "left]" in lines[-1]
    text = cli(*arguments).stdout
    assert "0 of them new" in text and "written to" in text


def test_a_terminal_gets_a_bar(tmp_path, monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(watch, "err", Console(file=shown, force_terminal=True, width=150, highlight=False))
    bad = {"torch_reference@2 uniform": "exit"}
    others = {"candidates": REAL, "install": False}
    task(tmp_path / "records.jsonl", **others).perform(
        FakeBench(costs=REAL_COSTS, bad=bad, pause_s=0.02), FORK, Shown()
    )
    text = shown.getvalue()
    assert "T = 4 uniform" in text and "left" in text
    assert "torch_reference at T = 2 uniform, eager: failed: its process ended with exit code 7" in text


def test_the_command_says_that_the_verification_failed(as_if_with_a_gpu):
    # Nothing that a GPU is needed for can be verified here.
    arguments = ["--quick", "--max-tokens", 1, "--candidate", "triton_fused[gemm=deep_gemm]", "--routing", "uniform"]
    text = cli("regenerate", *arguments, *SMALL_OPTIONS, code=1).stdout
    assert "not installed" in text and "unverified" in text
    assert not cpu_policy_path().exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_is_wanted():
    assert "NVIDIA GPU" in fails("regenerate", "--quick")


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--prefer", "nobody"], "nobody"),
        (["--candidate", "nobody"], "flashinfer_trtllm, triton_fused"),
        (["--candidate", "triton_fused[gemm=paper]"], "gemm=paper"),
        (["--routing", "wild"], "uniform, zipf, concentrated"),
        (["--tie-margin", "2"], "tie_margin"),
        (["--max-gap", "0.5"], "max_gap"),
        (["--timing", "cupti"], "cuda_graph"),
        (["--minutes", "-1"], "minutes"),
        (["--no-install", "--output", "x.json"], "leave one of them out"),
    ],
)
def test_bad_arguments(arguments, wanted):
    assert wanted in " ".join(fails("regenerate", *arguments).split())


def test_candidates():
    every = candidates_of(None)
    assert Candidate("triton_fused", {"gemm": "sgl_kernel"}) in every and Candidate("torch_reference") not in every
    triton = Candidate("triton_fused", {"gemm": "triton"})
    assert candidates_of(["triton_fused[gemm=triton]", "torch_reference"]) == [triton, REAL[0]]
    assert {c.backend for c in candidates_of(["triton_fused"])} == {"triton_fused"} and len(every) > 1


def test_loads_that_cannot_be_made_are_left_out():
    assert loads_of(DEEPSEEK_V3, None) == (("uniform", "zipf", "concentrated"), {})
    all_local = MoEProblem(num_experts=32, num_local_experts=32, n_group=1, topk_group=1)
    with pytest.raises(ValueError, match="none"):
        loads_of(all_local, ["none"])


# ---- What runs on the GPU ----


class Ticking(KnownClock):
    """Every replay of a graph takes 12 us, every look at the host's clock one."""

    def device_us(self, call):
        call()
        return 12.0

    def now_s(self):
        self.host += 1.0
        return super().now_s()


def test_the_bench_of_the_command_at_a_small_size(monkeypatch, tmp_path):
    # All but the GPU itself: weights and calls on the CPU, and its clock.
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(gpu, "_RUNS", 2)
    for module in (bench, gpu):
        monkeypatch.setattr(module, "versions", lambda: {"torch": "1.0", "cuda": None})
    monkeypatch.setattr(gpu, "measure_peak_rates", lambda clock: PeakRates(1e12, 1e15))
    monkeypatch.setattr(gpu, "random_weights", lambda problem, device, seed: random_weights(problem, "cpu", seed))
    monkeypatch.setattr(gpu, "gpu_state", lambda: GpuState(sm_mhz=1980))
    monkeypatch.setattr(gpu.DeviceKey, "of", lambda device: DeviceKey("cpu"))
    measuring = gpu.GpuBench(SMALL, copies=2, clock=Ticking())
    identity = measuring.identify()
    assert identity.environment["weight_copies"] == 2
    path = tmp_path / "records.jsonl"
    for choice in (REAL[0], Candidate(Wrong.name), Candidate("flashinfer_trtllm")):
        for load in ("uniform", "zipf", "concentrated"):
            measuring.load(Workload(4, 8, load))
            for r in measuring.measure(choice, TIMINGS):
                append_record(path, r)
    records = journal.resume(path, identity, SMALL)  # none of them measured in other circumstances
    assert {(r.backend, r.status) for r in records} == {
        ("torch_reference", "passed"),
        (Wrong.name, "failed"),
        ("flashinfer_trtllm", "unsupported"),
    }
    assert len(records) == 3 * 3 * 2
    assert all(r.gpu_before == r.gpu_after == GpuState(sm_mhz=1980) for r in records)
    assert {r.timing for r in records} == set(TIMINGS)
    passed = [r.latency_us for r in records if r.status == "passed"]
    assert {latency.runs for latency in passed} == {2} and passed[0].median == 1.0
    assert all(r.environment["weight_copies"] == 2 and r.code == code() for r in records)
    # Times of other caches can't be compared.
    for other in (gpu.GpuBench(SMALL, copies=3), gpu.GpuBench(SMALL, copies=1)):
        with pytest.raises(ValueError, match=f"weight_copies 2, here {other.copies}"):
            journal.resume(path, other.identify(), SMALL)


def test_the_gpus_state(monkeypatch):
    class NVMLError(Exception):
        pass

    def not_supported(*arguments):
        raise NVMLError

    nvml = ModuleType("pynvml")
    for name, value in {
        "NVMLError": NVMLError,
        "NVML_CLOCK_SM": 1,
        "NVML_CLOCK_MEM": 2,
        "NVML_TEMPERATURE_GPU": 0,
        "nvmlInit": lambda: None,
        "nvmlDeviceGetHandleByUUID": lambda uuid: uuid,
        "nvmlDeviceGetClockInfo": lambda device, kind: {1: 1980, 2: 3201}[kind],
        "nvmlDeviceGetTemperature": lambda device, sensor: 41,
        "nvmlDeviceGetPowerUsage": not_supported,
        "nvmlDeviceGetCurrentClocksEventReasons": lambda device: 0x04 | 0x40 | 0x01,
    }.items():
        setattr(nvml, name, value)
    properties = type("Properties", (), {"uuid": "1234"})
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *arguments: properties)
    assert gpu.gpu_state().model_dump(exclude_unset=True) == {
        "sm_mhz": 1980,
        "memory_mhz": 3201,
        "temperature_c": 41,
        "slowed_by": ["power cap", "hardware thermal slowdown"],
    }
    monkeypatch.setattr(nvml, "nvmlDeviceGetHandleByUUID", not_supported)
    assert not gpu.gpu_state().model_fields_set
