"""Bugs in what goes to flashinfer-bench, and in what comes from it."""

from mutations import Mutation

SOLUTION = ("tests/test_solution.py",)


def runtime(old: str, new: str, wrong: str) -> Mutation:
    tests = [
        "test_a_row_of_the_table_holds_from_its_first_t_up_to_the_next_ones",
        "test_what_runs_in_place_of_a_choice_is_the_first_that_can_in_the_given_order",
        "test_options_are_checked_and_no_tokens_give_nothing",
        "test_where_nothing_can_run_every_reason_is_said",
    ]
    return Mutation("flashinfer_bench/runtime.py", old, new, wrong, tuple(f"{SOLUTION[0]}::{test}" for test in tests))


def solution(old: str, new: str, wrong: str, test: str) -> Mutation:
    return Mutation("flashinfer_bench/solution.py", old, new, wrong, (f"{SOLUTION[0]}::{test}",))


MUTATIONS = [
    runtime(
        "bisect_right(self._starts, tokens) - 1", "bisect_right(self._starts, tokens - 1) - 1", "rows begin one T late"
    ),
    runtime(
        "for choice in (wanted, *self._otherwise)",
        "for choice in (*self._otherwise, wanted)",
        "what may stand in always does",
    ),
    runtime(
        "for choice in (wanted, *self._otherwise)",
        "for choice in (wanted, *self._otherwise[::-1])",
        "the last that can stands in",
    ),
    runtime("if taken != wanted:", "if False:", "nobody hears what stands in"),
    runtime(
        "name not in self._known or self._known[name] != value", "name not in self._known", "another top_k is taken"
    ),
    runtime("        if tokens:\n", "        if True:\n", "no tokens run a kernel"),
    runtime(
        "for choice, why in refusals.items()])",
        "for choice, why in list(refusals.items())[:1]])",
        "one reason of several is said",
    ),
    solution(
        "(policy.default, *policy.candidates)]",
        "(*policy.candidates, policy.default)]",
        "the default is the last to stand in",
        "test_the_order_of_what_runs_instead_is_the_policys",
    ),
    solution(
        "for choice in dict.fromkeys(order) if choice in chosen]",
        "for choice in dict.fromkeys(order)]",
        "candidates that no regime runs are taken along",
        "test_the_order_of_what_runs_instead_is_the_policys",
    ),
    solution(
        '"destination_passing_style": False',
        '"destination_passing_style": True',
        "flashinfer-bench gives an output that nobody fills",
        "test_flashinfer_bench_accepts_and_builds_it",
    ),
]
