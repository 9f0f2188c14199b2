"""The planted bugs follow the code: their texts are in it exactly once, and so are the tests that should catch them."""

from dataclasses import replace

import mutations
import pytest


@pytest.mark.parametrize("area", mutations.mutations())
def test_the_planted_bugs_follow_the_code(area):
    assert mutations.misplaced(mutations.mutations(area)[area]) == []


RIGHT = mutations.Mutation("numerics.py", "RULE = 2", "RULE = 1", "", ("tests/test_numerics.py",))


@pytest.mark.parametrize(
    "change, error",
    [
        ({}, ""),
        ({"old": "RULE = 3"}, "expected once"),
        ({"old": "return "}, "expected once"),
        ({"new": "RULE = 2"}, "becomes the same"),
        ({"new": "RULE = ("}, "was never closed"),
        ({"file": "gone.py"}, "expected once"),
        ({"tests": ("tests/test_gone.py",)}, "isn't there"),
        ({"tests": ("tests/test_numerics.py::test_gone",)}, "isn't there"),
    ],
)
def test_what_is_misplaced(change, error):
    errors = mutations.misplaced([replace(RIGHT, **change)])
    assert error in errors[0] if error else errors == []
