"""The command line of learning and judging: traces, versions, evaluate, and what differs by explain and doctor."""

import json
from pathlib import Path

import pytest
from test_cli import cli, cli_json, fails
from test_learn import record
from test_traces import trace, written

from hybrid_moe.device import DeviceKey
from hybrid_moe.measure.records import append_record
from hybrid_moe.measure.workloads import DEEPSEEK_V3
from hybrid_moe.policy.store import load_policy, policy_path, save_policy, user_policy_dir
from hybrid_moe.policy.versions import installed_version
from hybrid_moe.problem import MoEProblem

ROOT = Path(__file__).parents[1]
DEFINITION = MoEProblem().definition
H100 = "nvidia_h100_80gb_hbm3"
SHIPPED = ROOT / "policies" / H100 / f"{DEFINITION}.json"
RECORDS = ROOT / "benchmarks" / "results" / H100 / "regenerate_quick.jsonl"
OTHERS = RECORDS.with_name("definition.jsonl")


# ---- learn ----


def test_learn_from_traces(tmp_path):
    slow, fast = (trace(name, t, ms) for name, ms in (("triton_fused", 0.2), ("mine=2", 0.1)) for t in (1,))
    path, output = written(tmp_path, [slow, fast]), tmp_path / "policy.json"
    result = cli("learn", path, "-o", output)
    assert "warning: not learned from, as no candidate is called so: the solution mine=2" in result.stderr
    assert load_policy(output).default.config == {"gemm": "triton"}
    result = cli("learn", path, "-o", output, "--solution", "mine=2=triton_fused[gemm=deep_gemm]")
    assert "warning" not in result.stderr
    policy = load_policy(output)
    assert policy.default.config == {"gemm": "deep_gemm"}
    assert policy.learner.solutions == {"mine=2": "triton_fused[gemm=deep_gemm]"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--solution", "mine"], "--solution: expected NAME=VALUE as my_kernel=triton_fused[gemm=triton], got 'mine'"),
        (["--solution", "mine=fast"], "solution 'mine': expected one of"),
        (["--solution", "x=flashinfer_trtllm"], "no trace is of the solution x; found: mine"),
        (["--solution", "mine=triton_fused", "--solution", "mine=torch_reference"], "names 'mine' twice"),
        (["--where", "triton"], "--where: expected NAME=VALUE as triton=3.6, got 'triton'"),
        (["--where", "triton=1.0", "--solution", "mine=triton_fused"], "where is triton=1.0; the records have"),
    ],
)
def test_learn_says_what_is_wrong_with_its_options(tmp_path, arguments, message):
    path, output = written(tmp_path, [trace("mine")]), tmp_path / "policy.json"
    assert message in fails("learn", path, "-o", output, *arguments)
    assert not output.exists()


def test_learn_where(tmp_path):
    path, output = tmp_path / "r.jsonl", tmp_path / "policy.json"
    for version, latency in (("3.6.0", 1.0), ("3.7.0", 9.0)):
        append_record(path, record("a", 1, latency, environment={"torch": version}))
        append_record(path, record("b", 1, 2.0, environment={"torch": version}))
    assert "--where torch=3.7.0" in fails("learn", path, "-o", output)
    assert cli_json("learn", path, "-o", output, "--where", "torch=3.6")["policy"]["default"]["backend"] == "a"
    assert cli_json("learn", path, "-o", output, "--where", "torch=3.7")["policy"]["default"]["backend"] == "b"


# ---- evaluate ----


def test_evaluate(tmp_path):
    """What docs/judging.md says of the shipped policy: other T and loads than it was learned from."""
    found = cli_json("evaluate", SHIPPED, OTHERS)
    assert found["learned_from"] == [] and found["timing"] == "cuda_graph"
    assert len(found["judged"]) == 42 and len({j["num_tokens"] for j in found["judged"]}) == 26
    assert 0 <= found["bound"]["mean"] <= found["policy"]["mean"] < 0.02 and found["policy"]["worst"] < 0.08
    ours = {f"triton_fused[gemm={gemm}]" for gemm in ("triton", "sgl_kernel", "deep_gemm")}
    assert {s["candidate"] for s in found["singles"]} == ours
    text = cli("evaluate", SHIPPED, OTHERS).stdout
    assert "judged at 42 workloads of 26 T" in text and "Measured noise is" in text
    assert "learned from" not in text


def test_evaluate_says_what_is_not_held_out():
    assert cli_json("evaluate", SHIPPED, RECORDS)["learned_from"] == [str(RECORDS)]
    assert "itself: regret there is training regret" in " ".join(cli("evaluate", SHIPPED, RECORDS).stdout.split())


def test_evaluate_by_traces(tmp_path):
    path = written(tmp_path, [trace(n, 5, ms, hardware="NVIDIA H100 80GB HBM3") for n, ms in (("a", 1.0), ("b", 2.0))])
    names = ["--solution", "a=triton_fused[gemm=sgl_kernel]", "--solution", "b=triton_fused"]
    assert "expected some timed with cuda_graph" in fails("evaluate", SHIPPED, path, *names)
    found = cli_json("evaluate", SHIPPED, path, *names, "--timing", "cupti")
    assert found["policy"]["mean"] == 1.0
    assert "wasn't measured" in cli("evaluate", SHIPPED, path, *names, "--timing", "cupti").stdout
    assert "the records are of none" in fails("evaluate", SHIPPED, path)


def test_evaluate_lists_what_it_cannot_judge(tmp_path):
    path = tmp_path / "r.jsonl"
    for r in (record("a", 5, 1.0), record("b", 5, 2.0), record("b", 6, 1.0)):
        append_record(path, r)
    save_policy(load_policy_of(tmp_path), tmp_path / "p.json")
    text = cli("evaluate", tmp_path / "p.json", path).stdout
    assert "not judged: T = 6, uniform, seed 0: a, which the policy runs at T = 6, has no right result" in " ".join(
        text.split()
    )


def load_policy_of(tmp_path):
    path = tmp_path / "learned.jsonl"
    for r in (record("a", 1, 1.0), record("b", 1, 2.0)):
        append_record(path, r)
    cli("learn", path, "-o", tmp_path / "learned.json")
    return load_policy(tmp_path / "learned.json")


# ---- What differs here ----


@pytest.fixture
def policy_of_this_machine(tmp_path):
    """A policy among the user's own, of a machine that is like this one but for torch and flashinfer."""
    device = DeviceKey.of("cpu").name
    path = tmp_path / "r.jsonl"
    for backend, latency in (("flashinfer_trtllm", 1.0), ("torch_reference", 2.0)):
        append_record(path, record(backend, 1, latency, device=device, environment={"torch": "1.0.0"}))
        append_record(path, record(backend, 9, 3 - latency, device=device, environment={"torch": "1.0.0"}))
    to = policy_path(user_policy_dir(), device, DEEPSEEK_V3)
    cli("learn", path, "-o", to, "--tie-margin", "0")
    return to


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


def test_explain_and_doctor_say_what_differs(no_gpu, policy_of_this_machine):
    soft = [f"torch 1.0.0, here {installed_version('torch')}"]
    explained = cli_json("explain", "--device", "cpu")["mismatch"]
    assert explained["soft"] == soft
    assert explained["hard"][0].startswith("flashinfer_trtllm (T = 1, the default): ")
    assert cli_json("doctor")["policies"]["mismatch"] == explained
    for command in (["explain", "--device", "cpu"], ["explain", "--device", "cpu", "--num-tokens", "9"], ["doctor"]):
        text = " ".join(cli(*command).stdout.split())
        assert "policy here: not all that it chooses can run here: flashinfer_trtllm" in text
        assert f"measured under other or unknown versions ({soft[0]})" in text and "hybrid-moe regenerate" in text


def test_explain_of_another_device_compares_nothing(no_gpu):
    assert cli_json("explain", "--device", "nvidia_b200")["mismatch"] is None
    assert "measured under" not in cli("explain", "--device", "nvidia_b200").stdout
    assert json.loads(cli("doctor", "--json").stdout)["policies"]["mismatch"] is None
