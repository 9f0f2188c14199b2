"""Bugs in records, and in which of them may be compared."""

from mutations import Mutation

RECORDS = ("tests/test_records.py",)
LEARN = ("tests/test_learn.py",)
TRACES = ("tests/test_traces.py",)


def records(old: str, new: str, wrong: str, tests: tuple[str, ...] = RECORDS, equivalent: str = "") -> Mutation:
    return Mutation("measure/records.py", old, new, wrong, tests, equivalent)


def readers(old: str, new: str, wrong: str, tests: tuple[str, ...] = RECORDS, equivalent: str = "") -> Mutation:
    return Mutation("measure/readers.py", old, new, wrong, tests, equivalent)


def compare(old: str, new: str, wrong: str, tests: tuple[str, ...] = LEARN, equivalent: str = "") -> Mutation:
    return Mutation("learn/compare.py", old, new, wrong, tests, equivalent)


MUTATIONS = [
    records('if self.status != "passed" and speeds:', "if False:", "a wrong answer keeps its speed"),
    records('if self.status == "passed" and len(speeds) != 1:', "if False:", "a passed record needs no speed"),
    records(
        "return 1.0 / self.speedup_vs_reference",
        "return self.speedup_vs_reference",
        "the slowest is the fastest",
        LEARN,
    ),
    records("/ (2 * latency.median)", "/ latency.median", "twice the noise", LEARN),
    records("self.seed, self.workload or", "0, self.workload or", "seeds are one workload"),
    records(
        "self.choice, self.at, self.timing)", 'self.choice, self.at, "eager")', "graph and eager are one measurement"
    ),
    readers("if not lines.complete:", "if False:", "a line cut short is read"),
    readers(
        "line {number} is no benchmark record: {describe(error)}",
        "line {number - 1} is no benchmark record: {describe(error)}",
        "an error names the line before",
    ),
    compare(
        "time <= self._times[other]", "time < self._times[other]", "a record of the same time undoes a wrong answer"
    ),
    compare("if line <= self._lines[file]:", "if False:", "a passed line before the wrong one undoes it"),
    compare(
        "math.inf if time is None else time", "0.0 if time is None else time", "a wrong answer without a time is old"
    ),
    compare("kept = dict(passed)", "return dict(passed)", "wrong answers are forgotten"),
    compare("latency = {choice: statistics.median(", "latency = {choice: min(", "the best of repeated records counts"),
    compare(
        "set.intersection(*(set(w.slowdown) for w in ws)) - wrong",
        "set.intersection(*(set(w.slowdown) for w in ws))",
        "one that was wrong at a load runs",
    ),
    compare("had > want]", "had > want * 10]", "looser bounds are learned from"),
    compare("if ratio is not None and ratio < wanted:", "if False:", "a smaller matched ratio is learned from"),
    compare(
        "math.fsum(math.log(w.slowdown[c]) for w in ws) / len(ws)",
        "math.fsum(w.slowdown[c] - 1 for w in ws) / len(ws)",
        "arithmetic mean of slowdowns",
    ),
    compare('if "," in devices:', "if False:", "two devices are compared"),
    compare("if any(by_speedup) and not all(by_speedup):", "if False:", "latencies are compared with speedups"),
]
