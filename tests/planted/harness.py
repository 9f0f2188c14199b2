"""Bugs in what measures: timing, the check around it, samples, and what a record says of them."""

from mutations import Mutation

CLOCK = ("tests/test_timing.py",)
BENCH = ("tests/test_bench.py",)


def timing(old: str, new: str, wrong: str, tests: tuple[str, ...] = CLOCK, equivalent: str = "") -> Mutation:
    return Mutation("measure/timing.py", old, new, wrong, tests, equivalent)


def bench(old: str, new: str, wrong: str, tests: tuple[str, ...] = BENCH, equivalent: str = "") -> Mutation:
    return Mutation("measure/bench.py", old, new, wrong, tests, equivalent)


def sample(old: str, new: str, wrong: str, tests: tuple[str, ...] = BENCH, equivalent: str = "") -> Mutation:
    return Mutation("measure/sample.py", old, new, wrong, tests, equivalent)


def provenance(old: str, new: str, wrong: str, tests: tuple[str, ...] = BENCH, equivalent: str = "") -> Mutation:
    return Mutation("measure/provenance.py", old, new, wrong, tests, equivalent)


def plan(old: str, new: str, wrong: str, tests: tuple[str, ...], equivalent: str = "") -> Mutation:
    return Mutation("measure/sweep/plan.py", old, new, wrong, tests, equivalent)


def workloads(old: str, new: str, wrong: str) -> Mutation:
    return Mutation("measure/workloads.py", old, new, wrong, ("tests/test_workloads.py",))


MUTATIONS = [
    # Times
    timing("[clock.device_us(replay) / len(calls) for", "[clock.device_us(replay) for", "a graph's time, not a call's"),
    timing("return summarize(samples[_WARM_UP_REPLAYS:])", "return summarize(samples)", "replays that warm up count"),
    timing(
        "_WARM_UP_REPLAYS, _WARM_UP_LOOPS = 2, 1", "_WARM_UP_REPLAYS, _WARM_UP_LOOPS = 1, 1", "the second replay counts"
    ),
    timing("device.append((done - began)", "device.append((queued - began)", "eager time is the host's"),
    timing("host.append((queued - began)", "host.append((done - began)", "the host's time is the device's"),
    timing(
        "summarize(device[_WARM_UP_LOOPS:]), summarize(host[_WARM_UP_LOOPS:])",
        "summarize(device), summarize(host)",
        "the first eager loop counts",
    ),
    timing(
        "        clock.synchronize()\n        began",
        "        began",
        "an eager loop waits for what was queued before it",
        equivalent="each loop ends with a synchronize, and the first, which waits for what was queued, doesn't count",
    ),
    timing("math.floor(0.1 * last)", "math.floor(0.5 * last)", "p10 is the median"),
    timing("math.ceil(0.9 * last)", "math.ceil(0.5 * last)", "p90 is the median"),
    timing("source.numel() * source.element_size()", "source.numel() * 2", "half of the bandwidth"),
    timing("return Probe(multiply, 2 * n**3)", "return Probe(multiply, n**3)", "half of the FP8 rate"),
    timing("self.amount / (statistics.median", "self.amount / (max", "the rate of the slowest run"),
    timing("read_probe(2**30, num_sms * 8", "read_probe(2**10, num_sms * 8", "the read fits into the cache"),
    timing("rows * 6 * h * i)", "rows * 4 * h * i)", "a third of the operations is left out"),
    timing("return max(self.bytes / peak", "return min(self.bytes / peak", "the lower of the two floors"),
    # Copies and checks
    bench("copies = [number % len(self.runs) for", "copies = [0 for", "always the same weight copy"),
    bench("roll(number, dims=1)", "roll(0, dims=1)", "every copy has the same hidden states"),
    bench("torch.full(shape, torch.nan,", "torch.full(shape, 0.0,", "no poison before the first check"),
    bench("output.fill_(torch.nan)", "output.fill_(0)", "no poison before the timed calls"),
    bench("        rotation.poison()\n", "", "what the warm-up wrote is checked after the timed calls"),
    bench(
        'if wrong := judged(f"after {runs} timed runs,"):',
        "if wrong := '':",
        "outputs of the timed calls aren't checked",
    ),
    bench(
        "for copy, out in enumerate(self.outputs)]",
        "for copy, out in enumerate(self.outputs[:1])]",
        "one copy is checked",
    ),
    bench("case.references[copy]", "case.references[0]", "every copy is compared with the first one's reference"),
    bench("broken[case.checked] = False", "broken[:] = False", "tokens outside of the sample may be NaN"),
    bench("(is_computed | ~has_work)", "is_computed", "tokens without work outside of the sample aren't checked"),
    bench(
        "_of_tokens(one, computed)", "_of_tokens(one, computed.flip(0))", "the sample's references are of other tokens"
    ),
    bench("return OWN_KERNELS_TOLERANCE if", "return DEFAULT_TOLERANCE if", "our kernels are judged as others'"),
    bench(">= 2 * clock.cache_bytes()", ">= 0 * clock.cache_bytes()", "a warm cache is called cold"),
    bench(
        'yield BenchRecord(**common, timing=timing, status="unsupported"',
        'yield BenchRecord(**common, timing=timing, status="failed"',
        "a refusal is a wrong answer",
    ),
    bench('        "code": code(),\n', "", "a record doesn't say what measured it"),
    # Samples
    sample("ranks[(place == 0) | (place == last)] = 0", "ranks[place == 0] = 0", "last rows of experts aren't sampled"),
    sample("ranks[(at == 0) | (at == tile - 1)]", "ranks[at == 0]", "last rows of tiles aren't sampled"),
    sample("ranks[~chosen] =", "ranks[chosen & ~chosen] =", "rows of other experts count as an expert's"),
    sample("wanted = max(count,", "wanted = min(count,", "an expert's ends are cut off"),
    # Provenance
    provenance('"dirty": changes != ""', '"dirty": False', "a changed tree is called clean"),
    provenance("if commit is None or not tracked:", "if commit is None:", "somebody else's commit"),
    provenance('rglob("*.py")', 'glob("*.py")', "the digest leaves folders out"),
    # Sweeps
    plan(
        "middle = math.isqrt(low * high)",
        "middle = low + 1",
        "refines beside what was measured",
        ("tests/test_sweep.py",),
    ),
    plan(
        "if len(known) == len(medians):",
        "if known:",
        "a candidate that fails at a load is compared",
        ("tests/test_sweep.py::test_one_that_is_wrong_at_a_load_is_not_compared",),
    ),
    plan(
        "shift = results.order(workload) % len(plan.candidates)",
        "shift = 0",
        "the first candidate always runs first",
        ("tests/test_sweep.py",),
    ),
    plan(">= LOSSES:", ">= LOSSES + 99:", "what crashes is tried again for ever", ("tests/test_sweep.py",)),
    Mutation(
        "measure/sweep/journal.py",
        "for name in dict.fromkeys([*PACKAGES, *here]):",
        "for name in PACKAGES:",
        "times with another number of weight copies are gone on with",
        ("tests/test_sweep.py::test_the_bench_of_the_command_at_a_small_size",),
    ),
    Mutation(
        "measure/sweep/run.py",
        'if not retry or record.status == "passed")',
        ")",
        "--retry measures nothing again",
        ("tests/test_sweep.py",),
    ),
    # Inputs
    workloads(
        "logits[:, first : first + count] += 2.0 - popularity",
        "logits[:, first : first + count] += 2.0",
        "zipf is even",
    ),
    workloads("logits[:, local] -= 30.0", "logits[:, local] -= 0.0", "tokens have local work where none was wanted"),
]
