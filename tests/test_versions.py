"""Versions: what may be learned together, and what is said where a policy is used on something else."""

import dataclasses
import warnings

import pytest
from test_learn import PROBLEM, learned, record
from test_policy import make_policy, make_regime

from hybrid_moe import backends
from hybrid_moe.candidate import Candidate
from hybrid_moe.device import DeviceKey
from hybrid_moe.learn.compare import check_one_version, is_of
from hybrid_moe.learn.learner import learn, learn_from_files
from hybrid_moe.measure.records import append_record
from hybrid_moe.policy import resolve, versions
from hybrid_moe.policy.schema import LearnerOptions
from hybrid_moe.policy.store import dumps_policy
from hybrid_moe.policy.versions import PolicyMismatchWarning, installed_versions, mismatch, packages_of, release

TRITON = Candidate("triton_fused", {"gemm": "triton"})
SGL = Candidate("triton_fused", {"gemm": "sgl_kernel"})
DEEP = Candidate("triton_fused", {"gemm": "deep_gemm"})
HERE = {"torch": "2.11.0", "triton": "3.6.0", "sglang-kernel": "0.4.5", "sgl-deep-gemm": "0.1.4.post1"}


def of(choice, num_tokens=1, latency=1.0, **environment):
    environment = {name.replace("_", "-"): value for name, value in environment.items()}
    return record(choice.backend, num_tokens, latency, config=dict(choice.config), environment=environment)


def test_every_candidate_says_what_it_uses():
    assert packages_of(TRITON) == ("torch", "triton")
    assert packages_of(SGL) == ("torch", "triton", "sglang-kernel")
    assert packages_of(DEEP) == ("torch", "triton", "sgl-deep-gemm")
    assert packages_of(Candidate("triton_fused")) == ("torch", "triton")
    assert packages_of(Candidate("flashinfer_trtllm")) == ("torch", "flashinfer-python")
    assert packages_of(Candidate("of another release")) == ("torch",)
    assert set(installed_versions()) == {"torch", "triton", "sglang-kernel", "sgl-deep-gemm", "flashinfer-python"}
    assert installed_versions()["torch"] is not None


def test_releases():
    assert release("2.11.0+cu130") == "2.11.0"
    assert release("0.1.4.post1", 2) == "0.1"
    assert release("580.159.04", 1) == "580"


# ---- Records ----


@pytest.mark.parametrize(
    ("one", "other", "found"),
    [
        (dict(torch="2.10.0"), dict(torch="2.11.0"), r"torch 2\.10\.0 \(1 records\), 2\.11\.0 \(1 records\)"),
        (dict(triton="3.6.0"), dict(triton="3.6.1"), r"triton 3\.6\.0 .*--where triton=3\.6\.1"),
        (dict(driver="580.159.04"), dict(driver="575.1"), r"driver 575 .*580 .*--where driver=580"),
        (dict(hybrid_moe="0.1.3"), dict(hybrid_moe="0.2.0"), r"hybrid-moe 0\.1 .*0\.2"),
        (dict(cuda="12.8"), dict(cuda="13.0"), r"cuda 12\.8 .*13\.0"),
    ],
)
def test_records_of_several_versions_are_refused(one, other, found):
    with pytest.raises(ValueError, match=f"under several versions: .*{found}"):
        learned([of(TRITON, **one), of(DEEP, **other)])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (dict(torch="2.11.0"), dict(torch="2.11.0+cu130")),
        (dict(hybrid_moe="0.1.3"), dict(hybrid_moe="0.1.9")),
        (dict(driver="580.159.04"), dict(driver="580.2")),
        (dict(python="3.11", read_tb_per_s=3.0), dict(python="3.12", read_tb_per_s=3.1)),
        (dict(torch="2.11.0"), dict()),  # one that doesn't say goes with any
        # The library of another candidate.
        (dict(sglang_kernel="0.4.5"), dict(sglang_kernel="0.4.6")),
    ],
)
def test_what_may_differ(one, other):
    learned([of(TRITON, **one), of(DEEP, **other)])


def test_only_those_that_use_a_package_have_to_agree():
    old, new = dict(sgl_deep_gemm="0.1.4"), dict(sgl_deep_gemm="0.1.5")
    check_one_version([of(TRITON, **old), of(DEEP, **new), of(SGL, **old)])
    with pytest.raises(ValueError, match="sgl-deep-gemm 0.1.4 .*0.1.5"):
        check_one_version([of(DEEP, **old), of(DEEP, **new)])


def test_failures_of_another_version_do_not_count():
    wrong = record("triton_fused", 2, 0, "failed", config={"gemm": "triton"}, environment={"triton": "3.5.0"})
    learned([of(TRITON, 1, triton="3.6.0"), of(DEEP, 2, triton="3.6.0"), of(DEEP, 1, triton="3.6.0"), wrong])


def test_where_splits():
    records = [of(TRITON, 1, 1.0, triton="3.6.0"), of(DEEP, 1, 2.0, triton="3.6.0")]
    records += [of(TRITON, 1, 3.0, triton="3.7.0"), of(DEEP, 1, 2.0, triton="3.7.0"), of(TRITON, 1, 9.0)]
    for version, fastest in (("3.6.0", TRITON), ("3.7", DEEP), ("3.7.0", DEEP)):
        policy = learned(records, where={"triton": version}, tie_margin=0.0)
        assert policy.default == fastest
        assert policy.learner.where == {"triton": version}
    with pytest.raises(ValueError, match=r"where is triton=3\.8; the records have triton 3\.6\.0, 3\.7\.0, None"):
        learned(records, where={"triton": "3.8"})


def test_where_names_a_version_and_not_its_beginning():
    assert is_of(of(TRITON, triton="3.6.0"), {"triton": "3.6"})
    assert is_of(of(TRITON, torch="2.11.0+cu130"), {"torch": "2.11.0"})
    assert not is_of(of(TRITON, triton="3.60.0"), {"triton": "3.6"})
    assert not is_of(of(TRITON), {"triton": "3.6"})
    assert not is_of(of(TRITON), {"driver": "580"})
    # What the candidate doesn't use doesn't count.
    assert is_of(of(TRITON, sglang_kernel="0.4.6"), {"sglang-kernel": "0.4.5"})
    assert not is_of(of(SGL, sglang_kernel="0.4.6"), {"sglang-kernel": "0.4.5"})


def test_options_that_were_not_given_are_not_in_the_file(tmp_path):
    path = tmp_path / "r.jsonl"
    append_record(path, of(TRITON, triton="3.6.0"))
    plain = learn_from_files([path], LearnerOptions())
    assert '"where"' not in dumps_policy(plain) and '"solutions"' not in dumps_policy(plain)
    assert '"where"' in dumps_policy(learn_from_files([path], LearnerOptions(where={"triton": "3.6"})))


# ---- A policy on this machine ----


def policy_of(**environment):
    environment = {name.replace("_", "-"): value for name, value in environment.items()}
    return make_policy(
        candidates=[TRITON, DEEP],
        default=TRITON,
        regimes=[make_regime(1, 8, TRITON), make_regime(9, None, DEEP)],
        environment=environment,
    )


MEASURED = policy_of(torch="2.11.0", triton="3.6.0", sgl_deep_gemm="0.1.4", driver="580.1")


def test_a_policy_where_it_was_measured():
    for here in (HERE, HERE | {"triton": "3.6.9", "torch": "2.11.0+cu130"}, HERE | {"sglang-kernel": "9"}):
        found = mismatch(MEASURED, "gpu_x", {}, here)
        assert not found and found.messages("p") == []


def test_soft_mismatches():
    found = mismatch(MEASURED, "gpu_x", {}, HERE | {"triton": "3.7.0", "torch": "3.11.0"})
    assert found.hard == ()
    assert found.soft == ("torch 2.11.0, here 3.11.0", "triton 3.6.0, here 3.7.0")
    (message,) = found.messages("my policy")
    assert message.startswith("my policy: measured under other or unknown versions (torch 2.11.0, here 3.11.0; ")
    assert "hybrid-moe regenerate" in message


def test_unknown_versions_are_soft():
    assert mismatch(policy_of(), "gpu_x", {}, HERE).soft == (
        "sgl-deep-gemm unknown, here 0.1.4.post1",
        "torch unknown, here 2.11.0",
        "triton unknown, here 3.6.0",
    )
    assert mismatch(MEASURED, "gpu_x", {}, HERE | {"triton": None}).soft == ("triton 3.6.0, here unknown",)


def test_several_versions_in_the_policy():
    several = policy_of(torch="2.10.0 | 2.11.0", triton="3.6.0", sgl_deep_gemm="0.1.4")
    assert not mismatch(several, "gpu_x", {}, HERE)
    assert mismatch(several, "gpu_x", {}, HERE | {"torch": "2.9.0"}).soft == ("torch 2.10.0 | 2.11.0, here 2.9.0",)


def test_hard_mismatches():
    refusals = {DEEP: ["sgl-deep-gemm is not installed"], SGL: ["not in this policy"]}
    found = mismatch(MEASURED, "gpu_x", refusals, HERE | {"sgl-deep-gemm": None})
    assert found.hard == ("triton_fused[gemm=deep_gemm] (T = 9-): sgl-deep-gemm is not installed",)
    assert found.soft == ()  # what doesn't run has no version to compare
    assert mismatch(MEASURED, "gpu_y", {}, HERE).hard == ("it is for gpu_x, this is gpu_y",)
    both = mismatch(MEASURED, "gpu_x", refusals, HERE | {"torch": "3.0"}).messages("p")
    assert len(both) == 2 and "can run here" in both[0] and "regenerate" in both[1]


def test_it_is_said_once_a_policy(monkeypatch):
    reference = Candidate("torch_reference")
    problem = dataclasses.replace(PROBLEM, hidden_size=256)
    missing = Candidate("flashinfer_trtllm")
    policy = make_policy(
        device="cpu",
        problem=problem,
        candidates=[reference, missing],
        default=reference,
        regimes=[make_regime(1, 2, missing)],
        environment={"torch": "1.0.0"},
    )
    resolve.warn_once.cache_clear()
    with pytest.warns(PolicyMismatchWarning) as caught:
        for _ in range(3):
            assert resolve.decision_table(problem, DeviceKey("cpu"), policy).choice(1) == reference
    hard, soft = (str(warning.message) for warning in caught)
    assert "flashinfer_trtllm (T = 1-2): " in hard and "torch" not in hard
    assert f"torch 1.0.0, here {versions.installed_version('torch')}" in soft
    measured_here = policy.model_copy(
        update={"environment": {"torch": versions.installed_version("torch")}, "regimes": ()}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resolve.decision_table(problem, DeviceKey("cpu"), measured_here)


def test_records_of_this_machine_give_a_policy_that_fits_it():
    names = {name: value for name, value in installed_versions().items() if value is not None}
    records = [record("torch_reference", t, 1.0, device="cpu", environment=names) for t in (1, 2)]
    policy = learn(records, LearnerOptions(), problem=PROBLEM, inputs=[])
    refusals = {c: backends.not_supported_reasons(PROBLEM, DeviceKey("cpu"), c) for c in policy.candidates}
    assert not mismatch(policy, "cpu", refusals, installed_versions())
