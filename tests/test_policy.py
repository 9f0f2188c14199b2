"""Policy files: strict reading, atomic writing, stable bytes, and the order in which policies are looked up."""

import dataclasses
import hashlib
import json
import os
import re
import time
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from typer.testing import CliRunner

from hybrid_moe.backends import BACKENDS
from hybrid_moe.candidate import Candidate
from hybrid_moe.cli import app
from hybrid_moe.numerics import Tolerance
from hybrid_moe.policy import store
from hybrid_moe.policy.schema import Evidence, LearnerOptions, Policy, PolicyError, Regime, RegretSummary
from hybrid_moe.policy.store import dumps_policy, find_policy, load_policy, policies_in, policy_path, save_policy, scan
from hybrid_moe.problem import MoEProblem

A, B = Candidate("a"), Candidate("b", {"x": 1, "flag": True, "name": "n"})
REGRET = RegretSummary(mean=0.01, worst=0.2, worst_num_tokens=16, num_tokens=19)


@pytest.fixture(autouse=True)
def known_backends(monkeypatch):
    for choice in (A, B):
        monkeypatch.setitem(BACKENDS, choice.backend, BACKENDS["torch_reference"])


def make_regime(low, high, choice=B, **changes):
    evidence = [Evidence(num_tokens=low, workloads=2, slowdown={str(B): 1.0, str(A): 1.25})]
    fields = dict(verdict="best", verified="measured", reason="r", expected_regret=0.0, evidence=evidence)
    return Regime(min_tokens=low, max_tokens=high, choice=choice, **(fields | changes))


def make_policy(**changes):
    problem = changes.get("problem", MoEProblem())
    fields = dict(
        device="gpu_x",
        problem=problem,
        definition=problem.definition,
        candidates=[A, B],
        default=A,
        default_reason="fastest",
        default_evidence=[],
        regimes=[make_regime(4, 8), make_regime(20, None)],
        training_regret=REGRET,
        leave_one_out_regret=None,
        learner=LearnerOptions(),
        tolerance=Tolerance(),
        inputs=[],
        environment={"torch": "2", "driver": "1"},
    )
    return Policy(**(fields | changes))


def test_round_trip_keeps_the_policy_and_its_bytes(tmp_path):
    policy = make_policy()
    path = tmp_path / "deep" / "er" / "p.json"
    save_policy(policy, path)
    loaded = load_policy(path)
    assert loaded == policy
    assert loaded.regimes[0].choice.config == {"flag": True, "name": "n", "x": 1}
    assert loaded.regimes[0].choice.config["flag"] is True
    assert path.read_text() == dumps_policy(policy) == dumps_policy(loaded)
    assert path.read_bytes().endswith(b"}\n")
    assert list(path.parent.iterdir()) == [path]


def test_shared_experts_are_part_of_the_problem_and_left_out_where_there_are_none():
    whole = MoEProblem(num_local_experts=256)
    shared = dataclasses.replace(whole, num_shared_experts=1)
    for problem in (whole, shared):
        written = dumps_policy(make_policy(problem=problem))
        assert Policy.model_validate_json(written).problem == problem
        assert ("num_shared_experts" in json.loads(written)["problem"]) == (problem == shared)
    assert policy_path(Path(), "gpu_x", whole) != policy_path(Path(), "gpu_x", shared)


def test_order_of_mappings_does_not_change_the_bytes():
    other = make_policy(environment={"driver": "1", "torch": "2"})
    assert dumps_policy(other) == dumps_policy(make_policy())


@given(cut=st.integers(min_value=0))
@settings(max_examples=60, deadline=None)
def test_a_file_cut_anywhere_is_reported(tmp_path_factory, cut):
    text = dumps_policy(make_policy()).rstrip()
    path = tmp_path_factory.mktemp("cut") / "p.json"
    path.write_text(text[: cut % len(text)])
    with pytest.raises(PolicyError) as error:
        load_policy(path)
    assert str(path) in str(error.value)
    assert "isn't whole" in str(error.value)
    assert "hybrid-moe regenerate" in str(error.value) and "hybrid-moe learn" in str(error.value)


@pytest.mark.parametrize("version", [0, 2, "1", None, True, 1.5])
def test_another_schema_version(tmp_path, version):
    path = tmp_path / "p.json"
    # Another version has other fields too; the version is what has to be told.
    path.write_text(json.dumps({"schema_version": version, "new_field": 1}))
    with pytest.raises(
        PolicyError, match=rf"p\.json: expected schema_version 1, got schema_version {version!r}.*hybrid-moe regenerate"
    ):
        load_policy(path)


def test_no_schema_version(tmp_path):
    path = tmp_path / "p.json"
    path.write_text("{}")
    with pytest.raises(PolicyError, match="no schema_version"):
        load_policy(path)


def test_missing_unreadable_and_not_an_object(tmp_path):
    with pytest.raises(PolicyError, match="doesn't exist"):
        load_policy(tmp_path / "none.json")
    with pytest.raises(PolicyError, match="can't be read"):
        load_policy(tmp_path)
    path = tmp_path / "p.json"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(PolicyError, match=r"p\.json isn't UTF-8 .byte 0xff in line 1"):
        load_policy(path)
    path.write_text("[1]")
    with pytest.raises(PolicyError, match="JSON list"):
        load_policy(path)


def edit(*keys, value):
    def change(data):
        for key in keys[:-1]:
            data = data[key]
        data[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edit("extra", value=1), r"extra: Extra inputs"),
        (edit("regimes", 0, "verdict", value="good"), r"regimes\.0\.verdict"),
        (edit("regimes", 0, "min_tokens", value="4"), r"regimes\.0\.min_tokens: .*integer"),
        (edit("regimes", 0, "choice", "config", value={"x": 1.5}), r"regimes\.0\.choice\.config\.x"),
        (edit("regimes", 0, "choice", value={"backend": "b"}), r"regimes\.0\.choice\.config: Field required"),
        (
            edit("regimes", 0, "choice", "backend", value="c"),
            r"regime 4-8: expected a choice of .*, got c\[",
        ),
        (edit("regimes", 0, "max_tokens", value=3), r"max_tokens: expected at least min_tokens=4, got 3"),
        (edit("regimes", 0, "max_tokens", value=20), r"regimes 4-20 and 20- overlap"),
        (edit("regimes", 0, "max_tokens", value=None), r"regimes 4- and 20- overlap"),
        (edit("default", "backend", value="c"), r"default: expected one of the candidates, got c"),
        (edit("candidates", 1, value={"backend": "a", "config": {}}), r"candidates has one twice"),
        (edit("definition", value="other"), r"definition: expected the problem's .*, got other"),
        (edit("problem", "top_k", value=999), r"problem: top_k: expected at most .*, got 999"),
        (edit("problem", "zzz", value=99), r"problem\.zzz"),
        (edit("problem", value={"num_experts": 256}), r"problem: lacks num_local_experts"),
        (edit("tolerance", value={"rtol": 0.2, "atol": 0.1}), r"tolerance: lacks required_matched_ratio"),
        (edit("device", value="../up"), r"device"),
        (edit("training_regret", "mean", value=float("nan")), r"training_regret\.mean"),
        (edit("learner", "tie_margin", value=1.0), r"learner\.tie_margin"),
    ],
)
def test_wrong_fields_are_named(tmp_path, change, message):
    data = json.loads(dumps_policy(make_policy()))
    change(data)
    path = tmp_path / "p.json"
    path.write_text(json.dumps(data))
    with pytest.raises(PolicyError, match=message) as error:
        load_policy(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_every_field_is_wanted(tmp_path):
    data = json.loads(dumps_policy(make_policy()))
    path = tmp_path / "p.json"
    for name in set(data) - {"schema_version"}:
        path.write_text(json.dumps({key: value for key, value in data.items() if key != name}))
        with pytest.raises(PolicyError, match=f"{name}: Field required"):
            load_policy(path)


def test_models_are_frozen():
    with pytest.raises(ValidationError):
        make_policy().device = "other"


@pytest.mark.parametrize("failing", ["replace", "fsync"])
def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, failing):
    path = tmp_path / "p.json"
    save_policy(make_policy(), path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="disk full"):
        save_policy(make_policy(default=B), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def dirs(tmp_path, monkeypatch):
    user, shipped = tmp_path / "user", tmp_path / "shipped"
    monkeypatch.setattr(store, "user_policy_dir", lambda: user)
    monkeypatch.setattr(store, "shipped_policy_dir", lambda: shipped)
    return user, shipped


def ship(policy, path, root):
    save_policy(policy, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    (root / store.DIGESTS).write_text(f"{digest}  {path.relative_to(root).as_posix()}\n")


def test_lookup_order(dirs, tmp_path):
    user, shipped = dirs
    problem = MoEProblem()
    found, where = find_policy(problem, "gpu_x")
    assert found is None
    assert str(user) in where and str(shipped) in where and "`hybrid-moe regenerate` makes one" in where

    ship(make_policy(default_reason="shipped"), policy_path(shipped, "gpu_x", problem), shipped)
    found, where = find_policy(problem, "gpu_x")
    assert found.default_reason == "shipped" and "shipped" in where

    save_policy(make_policy(default_reason="user"), policy_path(user, "gpu_x", problem))
    found, where = find_policy(problem, "gpu_x")
    assert found.default_reason == "user" and str(user) in where

    given_file = tmp_path / "mine.json"
    save_policy(make_policy(default_reason="file"), given_file)
    assert find_policy(problem, "gpu_x", given_file)[0].default_reason == "file"
    assert find_policy(problem, "gpu_x", str(shipped))[0].default_reason == "shipped"
    assert find_policy(problem, "gpu_x", shipped / "gpu_x")[0].default_reason == "shipped"
    given_policy = make_policy(default_reason="object")
    assert find_policy(problem, "gpu_x", given_policy)[0] is given_policy


def test_the_command_that_makes_a_missing_policy_is_whole(dirs, monkeypatch):
    problem = MoEProblem(
        num_experts=128, num_local_experts=16, n_group=1, topk_group=1, routing_method="softmax", gate_first=True
    )
    _, where = find_policy(problem, "gpu_x")
    command = (
        "hybrid-moe regenerate --num-experts 128 --num-local-experts 16 --n-group 1 --topk-group 1 "
        "--routing-method softmax --gate-first"
    )
    assert f"`{command}` makes one" in where
    # The command line takes it: no GPU is what stops it, not the options.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(app, command.split()[1:])
    assert result.exit_code == 2 and "regenerate measures on an NVIDIA GPU" in result.stderr


def test_the_inside_of_a_file_decides(dirs):
    user, _ = dirs
    other = dataclasses.replace(MoEProblem(), gate_first=True)  # the definition name is the same
    save_policy(make_policy(problem=other), user / "whatever" / "name.json")
    assert find_policy(MoEProblem(), "gpu_x")[0] is None
    assert find_policy(other, "gpu_x")[0] is not None
    assert find_policy(other, "whatever")[0] is None


def test_a_policy_is_for_one_routing(tmp_path):
    ungrouped = dataclasses.replace(MoEProblem(), n_group=1, topk_group=1)
    softmax = dataclasses.replace(ungrouped, routing_method="softmax")
    paths = [policy_path(tmp_path, "gpu_x", problem) for problem in (ungrouped, softmax)]
    assert paths[0] != paths[1]
    save_policy(make_policy(problem=softmax), paths[1])
    assert find_policy(softmax, "gpu_x", tmp_path)[0].problem == softmax
    with pytest.raises(PolicyError, match="routing_method=softmax"):
        find_policy(ungrouped, "gpu_x", paths[1])


def test_an_explicit_policy_must_match(tmp_path):
    path = tmp_path / "p.json"
    save_policy(make_policy(), path)
    other = dataclasses.replace(MoEProblem(), num_experts=512)
    for given_policy in (path, make_policy()):
        with pytest.raises(PolicyError, match="expected one for gpu_y with .*, got one for gpu_x with"):
            find_policy(MoEProblem(), "gpu_y", given_policy)
        with pytest.raises(PolicyError, match="num_experts=512.*num_experts=256"):
            find_policy(other, "gpu_x", given_policy)
    with pytest.raises(PolicyError, match="no policy in .* is for gpu_y .*it has: gpu_x with"):
        find_policy(MoEProblem(), "gpu_y", tmp_path)
    with pytest.raises(PolicyError, match="doesn't exist; make it with `hybrid-moe regenerate -o .*nowhere`"):
        find_policy(MoEProblem(), "gpu_x", tmp_path / "nowhere")


STRAYS = {
    "an empty object": lambda path: path.write_text("{}"),
    "half of a policy": lambda path: path.write_text('{"schema_version": 1,'),
    "AppleDouble": lambda path: path.write_bytes(b"\x00\x05\x16\x07" + bytes(78)),
    "a newer version": lambda path: path.write_text('{"schema_version": 2}'),
    "an empty file": lambda path: path.write_bytes(b""),
    "a list": lambda path: path.write_text("[1, 2]"),
    "deep": lambda path: path.write_text("[" * 100_000),
    "a number of 5,000 digits": lambda path: path.write_text('{"schema_version": ' + "1" * 5000 + "}"),
    "a dangling link": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a FIFO": lambda path: os.mkfifo(path),
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a folder": lambda path: path.mkdir(),
    "200 MB": lambda path: path.touch() or os.truncate(path, 200_000_000),
    "another backend": lambda path: path.write_text(
        dumps_policy(make_policy()).replace('"backend": "a"', '"backend": "triton_future\\u001b"')
    ),
    "a key twice": lambda path: path.write_text(
        dumps_policy(make_policy()).replace('"definition"', '"device": "gpu_y",\n  "definition"', 1)
    ),
}


@pytest.mark.parametrize("name", ["n.json", "._x.json", ".#x.json", "gpu_x/n.json"])
@pytest.mark.parametrize("kind", STRAYS)
def test_what_is_no_policy_is_skipped_and_said_once(dirs, kind, name):
    user, shipped = dirs
    ship(make_policy(), policy_path(shipped, "gpu_x", MoEProblem()), shipped)
    path = user / name
    path.parent.mkdir(parents=True)
    STRAYS[kind](path)
    begun = time.monotonic()
    with pytest.warns(UserWarning, match=f"{re.escape(str(path))}.*is skipped") as said:
        assert find_policy(MoEProblem(), "gpu_x")[0] == make_policy()
    assert len(said) == 1 and "\x1b" not in str(said[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find_policy(MoEProblem(), "gpu_x")[0] == make_policy()
        assert len(policies_in(user)) == 0 and path in scan(user).skipped
    assert time.monotonic() - begun < 1
    # Asked for itself it is an error that names it.
    if kind != "a folder":
        with pytest.raises(PolicyError, match=re.escape(str(path))) as refused:
            find_policy(MoEProblem(), "gpu_x", path)
        assert "\x1b" not in str(refused.value)


@pytest.mark.parametrize("kind", STRAYS)
def test_the_file_that_is_asked_for_must_be_whole(dirs, kind):
    user, shipped = dirs
    ship(make_policy(), policy_path(shipped, "gpu_x", MoEProblem()), shipped)
    path = policy_path(user, "gpu_x", MoEProblem())
    path.parent.mkdir(parents=True)
    STRAYS[kind](path)
    if kind in ("another backend", "a newer version"):  # good, but for another release
        with pytest.warns(UserWarning, match="is skipped"):
            assert find_policy(MoEProblem(), "gpu_x")[0] == make_policy()
    else:
        with pytest.raises(PolicyError, match=re.escape(str(path))):
            find_policy(MoEProblem(), "gpu_x")
    # Others don't depend on it.
    assert find_policy(MoEProblem(), "gpu_y")[0] is None


def test_a_backend_that_is_not_known_is_named_with_its_file(tmp_path):
    path = tmp_path / "p.json"
    STRAYS["another backend"](path)
    load_policy(path)  # to look at it
    with pytest.raises(PolicyError, match=r"policy file .*p\.json names the backend triton_future"):
        find_policy(MoEProblem(), "gpu_x", path)
    with pytest.raises(PolicyError, match="the policy given names the backend triton_future"):
        find_policy(MoEProblem(), "gpu_x", load_policy(path))


def test_a_shipped_policy_must_be_as_it_was_shipped(dirs):
    _, shipped = dirs
    path = policy_path(shipped, "gpu_x", MoEProblem())
    ship(make_policy(), path, shipped)
    assert find_policy(MoEProblem(), "gpu_x")[0] == make_policy()
    save_policy(make_policy(default_reason="changed"), path)
    with pytest.raises(PolicyError, match="isn't as it was shipped .expected the SHA-256.*install hybrid-moe again"):
        find_policy(MoEProblem(), "gpu_x")
    (shipped / store.DIGESTS).unlink()
    with pytest.raises(PolicyError, match="SHA256SUMS doesn't list it"):
        find_policy(MoEProblem(), "gpu_x")
    assert find_policy(MoEProblem(), "gpu_x", path)[0].default_reason == "changed"  # named outright, it is the caller's


def test_two_matches_in_a_folder_are_an_error(dirs):
    user, _ = dirs
    for name in ("one.json", "two.json"):
        save_policy(make_policy(), user / name)
    assert [path.name for path, _ in policies_in(user)] == ["one.json", "two.json"]
    assert find_policy(MoEProblem(), "gpu_x")[0] == make_policy()  # a copy, as editors make them
    save_policy(make_policy(default_reason="other"), user / "two.json")
    with pytest.raises(PolicyError, match=r"one\.json and .*two\.json"):
        find_policy(MoEProblem(), "gpu_x")


def test_the_folders_exist_where_they_should():
    assert store.user_policy_dir().parts[-2:] == ("hybrid_moe", "policies")
    shipped = store.shipped_policy_dir()
    assert shipped.is_dir()
    assert policy_path("r", "d", MoEProblem()) == Path("r") / "d" / f"{MoEProblem().definition}.json"
