"""Every shipped policy: whole, in its place, and made again from the records in this repository, byte for byte."""

import hashlib
from pathlib import Path

import pytest

from hybrid_moe.candidate import Candidate
from hybrid_moe.device import DeviceKey
from hybrid_moe.learn.learner import learn_from_files
from hybrid_moe.policy.select import choose, resolve
from hybrid_moe.policy.store import DIGESTS, dumps_policy, find_policy, load_policy, policy_path
from hybrid_moe.problem import MoEProblem

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "policies").glob("*/*.json"))
B200 = "nvidia_b200"


def data_files():
    """Digest -> path of every file of records in the repository."""
    files = [p for p in (ROOT / "benchmarks").rglob("*") if p.suffix in (".md", ".jsonl")]
    return {hashlib.sha256(path.read_bytes()).hexdigest(): path for path in files}


def test_there_is_one_for_b200():
    assert policy_path(ROOT / "policies", B200, MoEProblem()) in FILES


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.parent.name)
def test_it_is_what_its_data_gives(path):
    policy = load_policy(path)
    assert path == policy_path(ROOT / "policies", policy.device, policy.problem)
    known = data_files()
    for digest in policy.inputs:
        assert digest.sha256 in known, (
            f"{digest.name} isn't in benchmarks/, or has changed since the policy was learned"
        )
    inputs = [known[digest.sha256] for digest in policy.inputs]
    again = learn_from_files(inputs, policy.learner, policy.problem, policy.device, tolerance=policy.tolerance)
    assert dumps_policy(again) == path.read_text(encoding="utf-8"), "learn it again with `hybrid-moe learn`"


def test_the_list_of_digests_is_what_make_digests_writes():
    lines = [
        f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.relative_to(ROOT / 'policies').as_posix()}" for p in FILES
    ]
    assert (ROOT / "policies" / DIGESTS).read_text() == "".join(f"{line}\n" for line in lines), "run `make digests`"


@pytest.fixture(scope="module")
def b200():
    policy, where = find_policy(MoEProblem(), B200, ROOT / "policies")
    assert B200 in where
    return policy


def test_b200_runs_triton_from_14_to_32_alone(b200):
    table = resolve(b200, b200.problem, DeviceKey(B200))
    triton = [t for t in range(20001) if table.choice(t) == Candidate("triton_fused", {"gemm": "sgl_kernel"})]
    assert triton == list(range(14, 33))
    assert set(table.choices) == {Candidate("flashinfer_trtllm"), Candidate("triton_fused", {"gemm": "sgl_kernel"})}


@pytest.mark.parametrize(
    ("num_tokens", "backend", "source"),
    [
        (13, "flashinfer_trtllm", "default"),
        (14, "triton_fused", "regime"),
        (16, "triton_fused", "regime"),
        (32, "triton_fused", "regime"),
        (33, "flashinfer_trtllm", "default"),
        (901, "flashinfer_trtllm", "regime"),
    ],
)
def test_b200_explains_itself(b200, num_tokens, backend, source):
    decision = choose(b200, b200.problem, DeviceKey(B200), num_tokens).to_dict()
    assert (decision["backend"], decision["source"]) == (backend, source)
    assert decision["reasons"]


def test_b200_says_that_it_was_not_measured_by_this_package(b200):
    assert {regime.verified for regime in b200.regimes} == {"published"}
    assert [regime.label for regime in b200.regimes] == ["1-7", "14-32", "52-80", "901", "10001-"]
