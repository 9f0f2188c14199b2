"""Ranks of a group choose alike, or say on which of them what differs: three processes with gloo on the CPU."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_api import PROBLEM, inputs_of, layer_of

from hybrid_moe.measure.workloads import random_weights

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "tests" / "agreement_ranks.py"
RANKS = 3
ALL, WITHOUT_ONE = ["one", "two", "torch_reference"], ["torch_reference", "two", "torch_reference"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each scenario of `agreement_ranks.py` gave on each rank."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TRITON_INTERPRET": "1",
        "XDG_DATA_HOME": str(folder / "user_data"),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(rank), str(RANKS), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(RANKS)
    ]
    try:
        for process in processes:
            out, _ = process.communicate(timeout=180)
            assert process.returncode == 0, out
    finally:
        for process in processes:
            process.kill()
    of_ranks = [json.loads((folder / f"results{rank}.json").read_text()) for rank in range(RANKS)]
    return {name: [found[name] for found in of_ranks] for name in of_ranks[0]}


@pytest.mark.parametrize(
    "scenario, expected", [("alike", ALL), ("one_named_backend", ["two"] * 3)], ids=["policy", "backend"]
)
def test_the_same_everywhere(results, scenario, expected):
    assert results[scenario] == [expected] * RANKS


def test_what_differs_is_named_with_its_ranks(results):
    digest = r"[0-9a-f]{64}"
    for found in results["another_policy"]:
        assert re.fullmatch(
            r"RanksDifferError: expected ranks that are alike.*differ in\n  "
            rf"policy: {digest} \(policy file .*policy1.json\) on ranks 0, 1; "
            rf"{digest} \(policy file .*policy2.json\) on rank 2",
            found,
        )
    assert all(
        found.endswith("differ in\n  backend: two on ranks 0, 2; one on rank 1") for found in results["another_backend"]
    )
    for found in results["another_release_of_this_package"]:
        assert re.search(r"differ in\n  hybrid-moe: \S+ on ranks 0, 1; 0.0.1 on rank 2$", found)


@pytest.mark.parametrize(
    "scenario, rank, reason",
    [
        ("a_package_that_one_rank_lacks", 1, r"package flashing isn't installed"),
        ("a_failure_to_prepare", 2, r"in quarantine since \S+, as it raised when it was prepared: no such symbol"),
    ],
)
def test_what_one_rank_refuses_none_runs(results, scenario, rank, reason):
    for number, found in enumerate(results[scenario]):
        assert found[:3] == WITHOUT_ONE
        named = "" if number == rank else f"rank {rank}: "
        assert re.fullmatch(f"policy regime 0-4: one passed over, as it can't run here: {named}{reason}", found[3])


def test_a_refusal_that_shows_once_another_is_known(results):
    for number, found in enumerate(results["a_refusal_that_follows_from_another"]):
        assert found[:3] == ["torch_reference"] * 3
        reasons = "\n".join(found)
        assert ("one passed over, as it can't run here: " + ("" if number == 0 else "rank 0: ") + "not here") in reasons
        assert (("" if number == 2 else "rank 2: ") + "its library doesn't load") in reasons


def test_an_error_of_one_rank_keeps_none_waiting(results):
    zero, one, two = results["a_rank_that_raises"]
    assert one.startswith("PolicyError: policy file") and "doesn't exist" in one
    assert zero == two
    assert zero.startswith("RanksDifferError: expected all ranks to go on, but these raised:\n  rank 1: PolicyError: ")
    zero, one, two = results["a_rank_that_cannot_warm_up"]
    assert (zero, two) == (one, "OSError: no kernel image")
    assert zero.endswith("\n  rank 2: OSError: no kernel image")


def test_nothing_that_all_can_run(results):
    zero, one, two = results["nothing_that_all_can_run"]
    assert all(found.startswith("NoBackendError: no backend can run on cpu:") for found in (zero, one, two))
    assert "two: ranks 1, 2: in quarantine" in zero and "one: rank 0: in quarantine" in one == two


def test_quarantine_holds_on_its_rank_at_once_and_on_all_after_agreeing(results):
    zero, one, two = results["quarantine_and_release"]
    assert zero == two == [ALL, WITHOUT_ONE, WITHOUT_ONE, ALL]
    assert one == [WITHOUT_ONE, WITHOUT_ONE, ALL, ALL]


def test_what_fails_to_warm_up_on_one_rank_is_warmed_up_on_none(results):
    assert results["a_failure_to_warm_up"] == [["torch_reference", "two", *WITHOUT_ONE]] * RANKS


def test_another_policy_later_leaves_the_old_one(results):
    for found in results["another_policy_later"]:
        assert "(the policy given) on rank 0; " in found[0]
        assert found[1:] == ALL


def test_other_versions_are_a_warning(results):
    assert (
        results["another_release"]
        == [["ranks run the same candidates under several versions of torch: 1.0 on ranks 0, 1; 9.9 on rank 2"]] * RANKS
    )


def test_a_group_of_some_ranks_names_them_by_their_global_numbers(results):
    zero, one, two = results["some_of_the_ranks"]
    assert zero is None
    assert one[0].endswith("can't run here: rank 2: not here")
    assert two[0].endswith("can't run here: not here")


def test_a_warning_is_of_the_place_that_makes_the_layer(results):
    assert results["no_policy"] == [[["agreement_ranks.py", "no policy for device nvidia_thing and pr"]]] * RANKS


def test_a_copy_belongs_to_no_group(results):
    assert results["a_copy"] == [ALL, WITHOUT_ONE, ALL]


def test_agreeing_wants_a_group():
    layer = layer_of(inputs_of(random_weights(PROBLEM, "cpu"), 7), backend="torch_reference")
    with pytest.raises(ValueError, match="agree: expected a layer with group=, got one without"):
        layer.agree()
