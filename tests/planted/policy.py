"""Bugs in what a policy says and in finding it."""

from mutations import Mutation

SELECT = ("tests/test_select.py",)
NEAREST = ("tests/test_nearest.py",)


def select(old: str, new: str, wrong: str, tests: tuple[str, ...] = SELECT, equivalent: str = "") -> Mutation:
    return Mutation("policy/select.py", old, new, wrong, tests, equivalent)


def nearest(old: str, new: str, wrong: str, tests: tuple[str, ...] = NEAREST, equivalent: str = "") -> Mutation:
    return Mutation("policy/nearest.py", old, new, wrong, tests, equivalent)


def resolve(old: str, new: str, wrong: str, tests: tuple[str, ...], equivalent: str = "") -> Mutation:
    return Mutation("policy/resolve.py", old, new, wrong, tests, equivalent)


def versions(old: str, new: str, wrong: str, tests: tuple[str, ...] = ("tests/test_versions.py",)) -> Mutation:
    return Mutation("policy/versions.py", old, new, wrong, tests)


MUTATIONS = [
    Mutation(
        "policy/schema.py",
        "if value or name not in _LATER",
        "if name not in _LATER",
        "a policy of a layer with shared experts is one of the layer without",
        ("tests/test_policy.py::test_shared_experts_are_part_of_the_problem_and_left_out_where_there_are_none",),
    ),
    Mutation(
        "problem.py",
        'f"_s{self.num_shared_experts}" if self.num_shared_experts else ""',
        '""',
        "records of a layer with shared experts are of the layer without",
        ("tests/test_problem.py::test_shared_experts_and_weights_on_the_input",),
    ),
    select(
        "bisect_right(self._starts, num_tokens) - 1",
        "bisect_right(self._starts, num_tokens + 1) - 1",
        "regimes begin one T early",
    ),
    select("starts[regime.max_tokens + 1] = False", "starts[regime.max_tokens] = False", "a regime ends one T early"),
    select(
        "for choice in policy.candidates:", "for choice in policy.candidates[::-1]:", "the policy's order backwards"
    ),
    select(
        'yield "default", policy.default, policy.default_reason',
        'yield "default", policy.candidates[-1], policy.default_reason',
        "another candidate is the default",
    ),
    select(
        "if refused := refusals.get(choice):\n            reasons",
        "if refused := ():\n            reasons",
        "what is refused runs",
    ),
    select(
        "    if refused:\n        raise BackendUnsupportedError",
        "    if False:\n        raise BackendUnsupportedError",
        "an explicit choice that is refused runs",
    ),
    select(
        "return at if at.num_tokens == num_tokens else replace(at, num_tokens=num_tokens)",
        "return at",
        "a decision names the T where its regime begins",
    ),
    select(
        "elif policy.device != device.name or policy.problem != problem:",
        "elif policy.device != device.name:",
        "a policy for another problem is taken",
    ),
    select(
        "starts = sorted({max(start, 1) for start in self._starts})",
        "starts = sorted(self._starts)",
        "spans begin at no tokens",
    ),
    nearest(
        "old.top_k * problem.num_experts, old.num_experts * problem.top_k",
        "old.num_experts * problem.top_k, old.top_k * problem.num_experts",
        "scaled the wrong way",
    ),
    nearest(
        "math.ceil((regime.max_tokens + 1) * factor) - 1",
        "math.ceil(regime.max_tokens * factor)",
        "neighbouring regimes overlap or part",
    ),
    nearest(
        "first = math.ceil(regime.min_tokens * factor)",
        "first = math.floor(regime.min_tokens * factor)",
        "a regime begins too early",
    ),
    nearest(
        "other.routing_method != problem.routing_method, distance(",
        "other.routing_method == problem.routing_method, distance(",
        "the other routing method first",
    ),
    nearest("sum(abs(math.log2(", "sum((math.log2(", "smaller problems are the nearest"),
    nearest("if last is not None and last < first:", "if False:", "empty regimes"),
    resolve(
        "CPU_ORDER: tuple[Candidate, ...] = DEFAULT_ORDER[::-1]",
        "CPU_ORDER: tuple[Candidate, ...] = DEFAULT_ORDER",
        "the interpreter runs in place of the reference",
        ("tests/test_api.py",),
    ),
    resolve(
        "        if not late:\n            break",
        "        break",
        "what can't be prepared is chosen",
        ("tests/test_api.py", "tests/test_serving.py"),
    ),
    resolve(
        "if policy.device == device]",
        "if policy.device]",
        "regimes of another device",
        ("tests/test_nearest.py", "tests/test_api.py"),
    ),
    resolve(
        '(found is None or note is not None) and device.name != "cpu"',
        "False",
        "nobody hears that there is no policy",
        ("tests/test_nearest.py", "tests/test_api.py"),
    ),
    versions("if measured is None or here is None:", "if measured is None:", "an unknown version fits"),
    versions('".".join(public.split(".")[:numbers])', "public", "a patch release is another version"),
    versions("if policy.device != device:", "if False:", "a policy of another GPU fits"),
]
