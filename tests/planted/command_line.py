"""Bugs in what the commands find, print and leave with."""

from mutations import Mutation

CLI = "tests/test_cli.py"
RUN = (f"{CLI}::test_run_fails_on_a_wrong_result", f"{CLI}::test_run_checks_on_the_cpu")
VERIFY = (
    f"{CLI}::test_verify_fails_on_a_wrong_result",
    f"{CLI}::test_verify_of_what_cannot_run_here_is_unverified",
    f"{CLI}::test_verify_fails_for_what_no_backend_is_called",
    f"{CLI}::test_verify_runs_what_can_run_here",
)
ERRORS = (f"{CLI}::test_a_bug_keeps_its_traceback", f"{CLI}::test_user_error_in_a_process")


def learn_verify(old: str, new: str, wrong: str) -> Mutation:
    return Mutation("learn/verify.py", old, new, wrong, VERIFY)


MUTATIONS = [
    Mutation(
        "cli/run.py",
        "if correctness is not None and not correctness.passed:\n        raise typer.Exit(1)",
        "",
        "a wrong result leaves with 0",
        RUN,
    ),
    Mutation(
        "measure/single.py",
        "output, reference, work, tolerance_of(choice)",
        "reference.bfloat16(), reference, work, tolerance_of(choice)",
        "the reference is checked instead of the result",
        RUN,
    ),
    Mutation(
        "cli/verify.py", "    if failed:\n        raise typer.Exit(1)", "", "a policy that fails leaves with 0", VERIFY
    ),
    learn_verify(
        'return Finding(what, str(choice), num_tokens, "failed", "; ".join(result.failures))',
        'return Finding(what, str(choice), num_tokens, "verified", figures)',
        "a wrong result is verified",
    ),
    learn_verify(
        'findings.append(Finding(what, str(choice), None, "unverified", reason))',
        'findings.append(Finding(what, str(choice), None, "failed", reason))',
        "what can't run here has failed",
    ),
    learn_verify(
        'findings.append(Finding(what, str(choice), None, "failed", unknown))',
        'findings.append(Finding(what, str(choice), None, "unverified", unknown))',
        "a backend that isn't there may be right elsewhere",
    ),
    learn_verify(
        "output = poisoned_output(inputs, policy.problem)",
        "output = poisoned_output(inputs, policy.problem).zero_()",
        "an output that nothing wrote is looked at as zeros",
    ),
    Mutation(
        "cli/__init__.py",
        "raise typer.Exit(2) from error",
        "raise typer.Exit(0) from error",
        "an error leaves with 0",
        ERRORS,
    ),
    Mutation("cli/__init__.py", "or not _is_users(error):", "or False:", "a bug is shown as a user's error", ERRORS),
    Mutation(
        "cli/__init__.py",
        "raise typer.Exit(130) from None",
        "raise typer.Exit(0) from None",
        "an interrupted command leaves with 0",
        (f"{CLI}::test_an_interrupted_command_says_so",),
    ),
    Mutation(
        "cli/regenerate.py",
        "    if not result.verified:\n        raise typer.Exit(1)",
        "",
        "a policy that fails its verification leaves with 0",
        ("tests/test_sweep.py",),
    ),
    Mutation(
        "cli/demo.py",
        "        raise typer.Exit(1)",
        "        pass",
        "a demo with a wrong result leaves with 0",
        (f"{CLI}::test_demo_leaves_with_1_if_something_failed",),
    ),
]
