"""Kills a sweep again and again, and starts it again: python sweep_driver.py FILE KILLS SEED [TOTAL].

Imports torch once and forks: a sweep that is killed a moment later would spend its time importing.
"""

import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

from fake_bench import SMALL, A, B, C, FakeBench

from hybrid_moe.candidate import Candidate
from hybrid_moe.measure.sweep import journal
from hybrid_moe.measure.sweep.plan import Plan
from hybrid_moe.measure.sweep.process import Worker
from hybrid_moe.measure.sweep.run import sweep

REFUSED, CRASHING = Candidate("refused"), Candidate("crashing")
PLAN = Plan.make(SMALL, [A, REFUSED, B, CRASHING, C], quick=True, loads=("uniform", "zipf"), max_tokens=128)
BAD = {
    "refused": "refuse",
    "crashing": "exit",
    "fake_c@128 uniform": "hang eager",
    "fake_b@32 zipf": "wrong",
    "fake_a@8 uniform": "raise",
}
LIMIT_S = 1.0  # for what hangs; on a busy machine the others take a third of a second


def attempt(path, most=10**6):
    """One run; with ``most`` lines in the file it stands still, so that whoever kills it is never too late."""
    bench = FakeBench(bad=BAD, pause_s=0.003)

    def stand_still(record):
        if lines(path) >= most:
            time.sleep(1e6)

    wait_until_unlocked(path)
    with Worker(bench, path.with_name("log"), multiprocessing.get_context("fork")) as worker:
        identity = worker.identify()
        with journal.locked(path):
            journal.mend(path)
            records = journal.resume(path, identity, SMALL)
            sweep(PLAN, worker, identity, path, records, budget_s=1e9, limit_s=LIMIT_S, on_record=stand_still)


def wait_until_unlocked(path):
    """A worker that was forked in a sweep has its parent's lock, and ends a moment after it was killed."""
    for _ in range(1000):
        try:
            with journal.locked(path):
                return
        except ValueError:
            time.sleep(0.01)


def lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def killed(path, target, rng):
    """Run an attempt and kill it some time after the file has ``target`` lines."""
    child = os.fork()
    if child == 0:
        attempt(path, target + 4)
        os._exit(0)
    while lines(path) < target:
        assert not os.waitpid(child, os.WNOHANG)[0], f"the attempt for {target} lines ended by itself"
        time.sleep(0.0005)
    time.sleep(rng.uniform(0, 0.01))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), f"the attempt for {target} lines ended before it was killed"
    content = path.read_bytes() if path.exists() else b""  # killed before its first line
    assert not content or content.endswith(b"\n"), "a half line"


def main():
    path, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    rng = random.Random(seed)
    if kills:
        total = int(sys.argv[4])
        for target in sorted(rng.sample(range(total - 5), kills)):
            killed(path, target, rng)
    attempt(path)


if __name__ == "__main__":
    main()
