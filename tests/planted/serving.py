"""Bugs around a call: dispatch, counts, shared memory, quantisation of the inputs."""

from mutations import Mutation

METRICS = ("tests/test_metrics.py",)
WORKSPACE = ("tests/test_workspace.py",)
SERVING = ("tests/test_serving.py",)
INPUTS = ("tests/test_activations.py",)


def dispatch(old: str, new: str, wrong: str, tests: tuple[str, ...], equivalent: str = "") -> Mutation:
    return Mutation("serving/dispatch.py", old, new, wrong, tests, equivalent)


def metrics(old: str, new: str, wrong: str, tests: tuple[str, ...] = METRICS, equivalent: str = "") -> Mutation:
    return Mutation("serving/metrics.py", old, new, wrong, tests, equivalent)


def workspace(old: str, new: str, wrong: str, tests: tuple[str, ...] = WORKSPACE, equivalent: str = "") -> Mutation:
    return Mutation("serving/workspace.py", old, new, wrong, tests, equivalent)


def quantize(old: str, new: str, wrong: str, tests: tuple[str, ...] = INPUTS, equivalent: str = "") -> Mutation:
    return Mutation("serving/quantize_input.py", old, new, wrong, tests, equivalent)


MUTATIONS = [
    dispatch(
        "at = bisect_right(self.starts, num_tokens) - 1",
        "at = bisect_right(self.starts, num_tokens - 1) - 1",
        "a regime's first T runs the one before",
        SERVING + METRICS,
    ),
    dispatch(
        "return self._runners[at]",
        "return self._runners[0]",
        "the first regime's runner always runs",
        METRICS + SERVING,
    ),
    dispatch(
        "return self._runners[bisect_right(self.starts, num_tokens) - 1]",
        "return self._runners[-1]",
        "warming up takes the last regime's runner",
        SERVING,
    ),
    dispatch(
        "ends = [*self.starts[1:], max_num_tokens + 1]",
        "ends = [*self.starts[1:], max_num_tokens]",
        "the largest T has no memory promised",
        WORKSPACE,
    ),
    dispatch(
        "return runner.most_reserved_bytes(first, last)",
        "return runner.most_reserved_bytes(last, last)",
        "only the largest T is asked for its memory",
        WORKSPACE,
    ),
    dispatch(
        "if self._counters[at].add(num_tokens):",
        "if self._counters[0].add(num_tokens):",
        "every call counts for the first regime",
        METRICS,
    ),
    dispatch("not _ANNOUNCED.is_new(label)", "False", "a decision is logged by every layer", METRICS),
    metrics(
        "calls + len(added), tokens + sum(added)",
        "calls + len(added), tokens + len(added)",
        "calls are counted as tokens",
    ),
    metrics(
        "self.items[: len(taken)] = shorter(taken)",
        "self.items[:] = shorter(taken)",
        "counts of other threads are lost",
    ),
    metrics(
        "        if owner() is None:  # nobody counts any more\n            gone = _totals([counters], gone)",
        "        if owner() is None:  # nobody counts any more\n            pass",
        "counts go with their layer",
    ),
    workspace("if size > self.size:", "if size >= 0:", "a smaller layer shrinks the memory"),
    workspace(
        "            if self.busy:\n                return launch(None)",
        "            if False:\n                return launch(None)",
        "a call inside of a call has its memory",
        ("tests/test_concurrency.py", *WORKSPACE),
    ),
    workspace(
        "        with self._lock:\n            if self.busy",
        "        with threading.RLock():\n            if self.busy",
        "two threads have the same memory at once",
        ("tests/test_concurrency.py", *WORKSPACE),
    ),
    workspace(
        "elif torch.cuda.is_current_stream_capturing():\n            return None",
        "elif torch.cuda.is_current_stream_capturing():\n            stream = 0",
        "a graph keeps what others write",
    ),
    quantize("    check_unquantized(hidden)\n", "", "activations of any dtype are taken"),
    quantize("hidden_states_scale=scale)", "hidden_states_scale=scale * 1.01)", "scales 1% too large"),
]
