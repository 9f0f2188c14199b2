"""The command line: what scripts read from it, its exit codes, and one whole demo."""

import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from hybrid_moe import backends
from hybrid_moe.backends.base import Backend, Runner
from hybrid_moe.candidate import Candidate
from hybrid_moe.cli import app, demo
from hybrid_moe.cli.common import print_json, this_device
from hybrid_moe.cli.demo import SMALL
from hybrid_moe.device import DeviceKey
from hybrid_moe.learn import verify as verifying
from hybrid_moe.measure.records import BenchRecord, append_record
from hybrid_moe.measure.workloads import DEEPSEEK_V3, KIMI_K2, QWEN3_235B
from hybrid_moe.policy import resolve, store
from hybrid_moe.policy.select import Decision
from hybrid_moe.policy.store import load_policy, save_policy, user_policy_dir
from hybrid_moe.problem import MoEProblem
from hybrid_moe.serving import call
from hybrid_moe.serving.quarantine import QUARANTINE, release_quarantine

ROOT = Path(__file__).parents[1]
DATA = ROOT / "benchmarks" / "data" / "nvidia_b200_2026-02-02.md"
SHIPPED = ROOT / "policies" / "nvidia_b200" / f"{MoEProblem().definition}.json"
B200_OPTIONS = ["--regimes", "1-7,14-32,52-80,901,10001-", "--tie-margin", "0.05", "--prefer", "triton_fused"]
SMALL_OPTIONS = [
    *("--num-experts", "32", "--num-local-experts", "8", "--top-k", "4", "--n-group", "4"),
    *("--topk-group", "2", "--hidden-size", "512", "--intermediate-size", "256"),
]


def cli(*arguments, code=0):
    """Run the command; an exception that isn't an exit is a failure of the test."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def cli_json(*arguments, code=0):
    return json.loads(cli(*arguments, "--json", code=code).stdout)


def fails(*arguments):
    """The message of a user error: exit code 2, nothing on stdout, no traceback."""
    result = cli(*arguments, code=2)
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return result.stderr


# ---- explain ----


@pytest.mark.parametrize(
    ("num_tokens", "backend", "config", "regime"),
    [
        (13, "flashinfer_trtllm", {}, None),
        (14, "triton_fused", {"gemm": "sgl_kernel"}, {"min_tokens": 14, "max_tokens": 32}),
        (16, "triton_fused", {"gemm": "sgl_kernel"}, {"min_tokens": 14, "max_tokens": 32}),
        (32, "triton_fused", {"gemm": "sgl_kernel"}, {"min_tokens": 14, "max_tokens": 32}),
        (33, "flashinfer_trtllm", {}, None),
        (901, "flashinfer_trtllm", {}, {"min_tokens": 901, "max_tokens": 901}),
        (20000, "flashinfer_trtllm", {}, {"min_tokens": 10001, "max_tokens": None}),
    ],
)
def test_explain_b200(num_tokens, backend, config, regime):
    found = cli_json("explain", "--device", "nvidia_b200", "--num-tokens", num_tokens)
    decision = Decision(Candidate("any"), 1, None, "explicit", (), (), None)
    assert list(found) == list(decision.to_dict())
    assert (found["backend"], found["config"], found["regime"]) == (backend, config, regime)
    assert found["num_tokens"] == num_tokens
    assert found["source"] == ("default" if regime is None else "regime")
    assert found["reasons"]


def test_explain_says_what_t_16_costs():
    found = cli_json("explain", "--device", "nvidia_b200", "--num-tokens", 16)
    slowdown = {e["num_tokens"]: e["slowdown"][f"{found['backend']}[gemm=sgl_kernel]"] for e in found["evidence"]}
    assert slowdown == {
        14: 1.0,
        15: 1.0,
        16: pytest.approx(32.04 / 26.44, rel=1e-5),
        32: pytest.approx(32.25 / 31.44, rel=1e-5),
    }
    assert found["expected_regret"] == pytest.approx(sum(slowdown.values()) / 4 - 1, rel=1e-5)


def test_explain_for_people():
    text = cli("explain", "--device", "nvidia_b200", "--num-tokens", 16).stdout
    assert "triton_fused[gemm=sgl_kernel]" in text and "regime 14-32" in text and "5.9%" in text and "1.212" in text


def test_explain_all_regimes():
    text = cli("explain", "--device", "nvidia_b200").stdout
    for label in ("1-7", "14-32", "52-80", "901", "10001-", "otherwise"):
        assert f" {label} " in text
    found = cli_json("explain", "--device", "nvidia_b200")
    assert found["device"] == "nvidia_b200" and len(found["regimes"]) == 5


def test_explain_takes_device_and_problem_from_a_policy_file():
    assert cli_json("explain", "--policy", SHIPPED, "--num-tokens", 14)["backend"] == "triton_fused"


def test_explain_here_applies_what_this_machine_cannot_run(monkeypatch):
    refused = {"triton_fused": ["no such GPU here"]}
    monkeypatch.setattr(backends, "not_supported_reasons", lambda problem, key, c: tuple(refused.get(c.backend, ())))
    arguments = ("explain", "--device", "nvidia_b200", "--num-tokens", 14)
    assert cli_json(*arguments)["backend"] == "triton_fused"
    found = cli_json(*arguments, "--here")
    assert (found["backend"], found["source"]) == ("flashinfer_trtllm", "default")
    assert "no such GPU here" in " ".join(found["reasons"])
    monkeypatch.setattr("hybrid_moe.cli.common.out.width", 160)
    assert "runs here" in cli("explain", "--device", "nvidia_b200", "--here").stdout


def test_explain_unknown_device_lists_the_known_ones():
    message = fails("explain", "--device", "nvidia_b300", "--num-tokens", 1)
    assert "nvidia_b300" in message and "nvidia_b200" in message


def test_explain_a_problem_without_a_policy_says_whose_regimes_it_gets():
    text = cli("explain", "--device", "nvidia_b200", "--num-tokens", 4, *SMALL_OPTIONS).stdout
    assert "nothing was measured for moe_fp8_block_scale_ds_routing_topk4_ng4_kg2_e8_h512_i256: it takes" in text
    assert "topk8_ng8_kg4_e32_h7168_i2048" in text
    # 32 experts and 4 choices instead of 256 and 8: a quarter of the T.
    found = cli_json("explain", "--device", "nvidia_b200", "--num-tokens", 4, *SMALL_OPTIONS)
    assert found["regime"] == {"min_tokens": 4, "max_tokens": 8} and found["backend"] == "triton_fused"
    assert "nearest problem" in cli_json("explain", "--device", "nvidia_b200", *SMALL_OPTIONS)["where"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device to explain")
def test_explain_without_a_gpu_wants_a_device():
    assert "--device" in fails("explain", "--num-tokens", 1)


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--num-tokens", "-1"], "an integer of at least 0"),
        (["--top-k", "1000"], "top_k: expected at most"),
        (["--policy", "nowhere.json"], "doesn't exist"),
    ],
)
def test_explain_bad_arguments(arguments, wanted):
    assert wanted in fails("explain", "--device", "nvidia_b200", *arguments)


# ---- learn ----


def test_learn_gives_the_shipped_bytes(tmp_path):
    path = tmp_path / "policy.json"
    cli("learn", DATA, "-o", path, *B200_OPTIONS)
    assert path.read_bytes() == SHIPPED.read_bytes()


def test_learn_auto_without_a_margin_gives_14_and_15(tmp_path):
    path = tmp_path / "policy.json"
    text = cli("learn", DATA, "-o", path, "--regimes", "auto", "--tie-margin", "0").stdout
    assert "14-15" in text
    runs = {
        t: cli_json("explain", "--policy", path, "--num-tokens", t)["backend"] for t in (1, 13, 14, 15, 16, 32, 901)
    }
    assert [t for t, backend in runs.items() if backend == "triton_fused"] == [14, 15]
    assert set(runs.values()) == {"triton_fused", "flashinfer_trtllm"}


def test_learn_writes_to_the_user_and_is_found_first(user_data):
    found = cli_json("learn", DATA, "--tie-margin", "0")
    path = Path(found["path"])
    assert path.is_relative_to(user_data)
    assert load_policy(path).model_dump(mode="json") == found["policy"]
    # The shipped policy has triton_fused there.
    assert cli_json("explain", "--device", "nvidia_b200", "--num-tokens", 16)["backend"] == "flashinfer_trtllm"


@pytest.mark.parametrize(
    ("content", "arguments", "wanted"),
    [
        (None, [], "No such file"),
        ("nothing of the kind", [], "neither benchmark records"),
        ('{"schema_version": 1, "dev', [], "line 1 is cut short"),
        ('{"schema_version": 1}\n', [], "line 1 is no benchmark record"),
        (DATA, ["--tie-margin", "1.5"], "tie_margin"),
        (DATA, ["--regimes", "9-1"], "smaller bound"),
        (DATA, ["--prefer", "nobody"], "nobody"),
        (DATA, ["--timing", "sundial"], "timing"),
        (DATA, ["--device", "nvidia_h100"], "nvidia_b200"),
        (DATA, ["--problem", "moe"], "a name as moe_fp8_block_scale"),
    ],
)
def test_learn_bad_input_leaves_the_file_alone(tmp_path, content, arguments, wanted):
    source, path = tmp_path / "records", tmp_path / "policy.json"
    if content is not None:
        source.write_text(content.read_text() if isinstance(content, Path) else content)
    before = '{"schema_version": 1, "device": "x", "problem": {}}'
    path.write_text(before)
    assert wanted in fails("learn", source, "-o", path, *arguments)
    assert path.read_text() == before
    assert {p.name for p in tmp_path.iterdir()} <= {"records", "policy.json", "user_data"}


def test_learn_eats_no_input_and_replaces_policies_alone(tmp_path):
    source, other = tmp_path / "r.md", tmp_path / "other.jsonl"
    source.write_bytes(DATA.read_bytes())
    other.write_text("measured elsewhere\n")
    assert "--output is" in fails("learn", source, "-o", source)
    assert "isn't a policy" in fails("learn", source, "-o", other)
    assert source.read_bytes() == DATA.read_bytes() and other.read_text() == "measured elsewhere\n"


def test_learn_wants_a_file_name(tmp_path):
    assert "got a folder" in fails("learn", DATA, "-o", tmp_path)


# ---- run ----


@pytest.mark.parametrize("num_tokens", [0, 5])
def test_run_checks_on_the_cpu(num_tokens):
    arguments = ["--device", "cpu", "--backend", "torch_reference", "--num-tokens", num_tokens, *SMALL_OPTIONS]
    found = cli_json("run", "--check", *arguments)
    assert found["decision"]["backend"] == "torch_reference" and found["decision"]["source"] == "explicit"
    assert found["correctness"]["passed"] and found["correctness"]["max_relative_l2"] == 0.026
    assert found["workload"]["num_tokens"] == num_tokens
    assert (found["workload"]["local_rows"] > 0) == (num_tokens > 0)
    assert found["time"]["median_us"] > 0


def test_run_for_people():
    text = cli("run", "--device", "cpu", "--backend", "torch_reference", "--check", *SMALL_OPTIONS).stdout
    assert "torch_reference" in text and "pass: relative L2" in text


def test_run_the_layer_of_a_model():
    sizes = ["--hidden-size", 256, "--intermediate-size", 128]
    run = ["run", "--device", "cpu", "--backend", "torch_reference", "--check", *sizes]
    found = cli_json(*run, "--model", "qwen3-235b")
    assert found["correctness"]["passed"]
    wanted = dataclasses.replace(QWEN3_235B, hidden_size=256, intermediate_size=128)
    assert found["problem"] == dataclasses.asdict(wanted)
    # The same, said by its sizes.
    options = dataclasses.asdict(wanted)
    named = options.keys() - {"block", "gate_first", "weight_on_input"}
    given = [f"--{name.replace('_', '-')}={options[name]}" for name in named]
    assert cli_json(*run, *given)["problem"] == found["problem"]


def test_explain_a_model():
    text = cli("explain", "--device", "nvidia_b200", "--model", "kimi-k2", "--num-tokens", 16).stdout
    assert f"nothing was measured for {KIMI_K2.definition}" in " ".join(text.split())


def test_run_without_check_says_nothing_about_it():
    found = cli_json("run", "--device", "cpu", "--backend", "torch_reference", *SMALL_OPTIONS)
    assert found["correctness"] is None


class _Broken(Backend):
    """Leaves the output as it was: the poison must show."""

    name = "broken_for_tests"

    def not_supported_reasons(self, problem, device, config):
        return []

    def prepare(self, problem, device, config):
        class Nothing(Runner):
            def run(self, inputs, output):
                pass

            def workspace_bytes(self, num_tokens):
                return 0

        return Nothing()


def test_run_fails_on_a_wrong_result(monkeypatch):
    monkeypatch.setitem(backends.BACKENDS, _Broken.name, _Broken())
    arguments = ["--device", "cpu", "--backend", _Broken.name, *SMALL_OPTIONS]
    found = cli_json("run", "--check", *arguments, code=1)
    assert not found["correctness"]["passed"] and "not finite" in " ".join(found["correctness"]["failures"])
    assert found["correctness"]["relative_l2"] is None
    cli("run", *arguments)


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--workload", "zz"], "2e69caee (T = 15)"),
        (["--workload", "2e69", "--num-tokens", "3"], "--num-tokens"),
        (["--offset", "225"], "0 to 224"),
        (["--top-k", "0"], "--top-k"),
        (["--routing", "wild"], "wild"),
        (["--model", "gpt"], "qwen3-235b"),
        (["--routing-method", "softmax"], "n_group: expected 1 with"),
        (["--hidden-size", "500"], "multiple of block"),
        (["--backend", "nope", *SMALL_OPTIONS], "flashinfer_trtllm, triton_fused, flashinfer_cutlass, torch_reference"),
        (["--backend", "triton_fused[gemm=paper]", *SMALL_OPTIONS], "gemm='paper'"),
        (["--backend", "flashinfer_trtllm", *SMALL_OPTIONS], "compute capability"),
        (["--policy", str(SHIPPED), *SMALL_OPTIONS], "got one for nvidia_b200"),
    ],
)
def test_run_bad_arguments(arguments, wanted):
    assert wanted in fails("run", "--device", "cpu", *arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_run_on_a_missing_gpu():
    assert "no GPU" in fails("run", "--device", "cuda", *SMALL_OPTIONS)


# ---- verify ----


def cpu_policy(folder, backend):
    """A policy for the CPU and the small problem, learned from invented records of one backend."""
    records = folder / "records.jsonl"
    for num_tokens in (1, 4):
        record = BenchRecord(
            device="cpu",
            problem=SMALL.definition,
            num_experts=SMALL.num_experts,
            backend=backend,
            num_tokens=num_tokens,
            local_expert_offset=0,
            routing="uniform",
            seed=0,
            status="passed",
            timing="eager",
            latency_us={"median": 100.0},
        )
        append_record(records, record)
    cli("learn", records, "-o", folder / "policy.json")
    return folder / "policy.json"


@pytest.mark.skipif(torch.cuda.is_available() and DeviceKey.of("cuda").name == "nvidia_b200", reason="this is a B200")
def test_verify_of_what_cannot_run_here_is_unverified():
    found = cli_json("verify", SHIPPED)
    assert found["passed"]
    assert [f["status"] for f in found["findings"]] == ["verified"] + ["unverified"] * 6
    assert found["findings"][0]["reason"].endswith("its records passed by rule 1 (the whole alone)")
    assert all("this machine's device is" in f["reason"] for f in found["findings"][1:])
    assert "unverified" in cli("verify", SHIPPED).stdout


def test_verify_fails_where_a_file_reads_back_differently(tmp_path, monkeypatch):
    policy = load_policy(cpu_policy(tmp_path, "torch_reference"))
    other = policy.model_copy(update={"default_reason": "another"})
    monkeypatch.setattr(verifying, "load_policy", lambda path: other)
    finding = verifying.verify_policy(policy)[0]
    assert finding.status == "failed" and "default_reason" in finding.reason


def test_a_policy_file_is_read_once(tmp_path, monkeypatch):
    path, read = cpu_policy(tmp_path, "torch_reference"), []
    monkeypatch.setattr(store, "read_whole", lambda path: read.append(path) or path.read_bytes())
    assert str(path) in cli("explain", "--policy", path).stdout.replace("\n", "")
    assert cli("solution", "--policy", path, "-o", tmp_path / "solution.json")
    assert read == [path, path]


def test_verify_runs_what_can_run_here(tmp_path):
    found = cli_json("verify", cpu_policy(tmp_path, "torch_reference"))
    assert found["passed"] and {f["status"] for f in found["findings"]} == {"verified"}
    assert {f["num_tokens"] for f in found["findings"]} >= {None, 1, 4}


def test_verify_fails_on_a_wrong_result(tmp_path, monkeypatch):
    path = cpu_policy(tmp_path, _Broken.name)
    monkeypatch.setitem(backends.BACKENDS, _Broken.name, _Broken())
    found = cli_json("verify", path, code=1)
    assert not found["passed"]
    assert {f["status"] for f in found["findings"][1:]} == {"failed"}
    assert all("not finite" in f["reason"] for f in found["findings"][1:])  # what nothing wrote is no zero


def test_verify_of_a_backend_that_is_refused_is_unverified(tmp_path):
    found = cli_json("verify", cpu_policy(tmp_path, "flashinfer_trtllm"))
    assert found["passed"]
    assert {f["status"] for f in found["findings"][1:]} == {"unverified"}


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (lambda text: text[: len(text) // 2], "isn't whole JSON"),
        (lambda text: text.replace('"schema_version": 1', '"schema_version": 2'), "schema_version 2"),
        (lambda text: "[]", "list"),
    ],
)
def test_verify_of_an_unusable_file(tmp_path, change, wanted):
    path = tmp_path / "policy.json"
    path.write_text(change(SHIPPED.read_text()))
    assert wanted in fails("verify", path)


# ---- doctor and the rest ----


def test_doctor():
    found = cli_json("doctor")
    assert found["versions"]["torch"] and found["versions"]["hybrid-moe"]
    assert {row["backend"] for row in found["backends"]} == set(backends.BACKENDS)
    for row in found["backends"]:
        assert row["works"] == (not row["reasons"])
    by_name = {row["backend"]: row for row in found["backends"]}
    assert by_name["torch_reference"]["works"]
    shipped = found["policies"]["looked_up"][1]["policies"]
    assert "nvidia_b200" in {policy["device"] for policy in shipped}
    assert "torch_reference" in cli("doctor").stdout


def test_json_has_no_nan(capsys):
    print_json({"a": math.nan, "b": [math.inf, 1.5]})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [None, 1.5]}


def test_a_bug_keeps_its_traceback(monkeypatch):
    def bug(*arguments):
        raise KeyError("bug")

    monkeypatch.setattr("hybrid_moe.cli.doctor.policy_or_nearest", bug)
    with pytest.raises(KeyError):
        cli("doctor")

    def another(*arguments):
        raise RuntimeError("a bug of torch's kind")

    monkeypatch.setattr("hybrid_moe.cli.doctor.policy_or_nearest", another)
    with pytest.raises(RuntimeError, match="a bug of torch's kind"):
        cli("doctor")


def test_an_interrupted_command_says_so(monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("hybrid_moe.cli.doctor.policy_or_nearest", interrupt)
    assert "interrupted" in cli("doctor", code=130).stderr


def test_traceback_of_a_user_error_on_demand():
    with pytest.raises(ValueError, match="nvidia_b300"):
        cli("--traceback", "explain", "--device", "nvidia_b300")


def in_process(*arguments):
    """The console script's own entry, in a process of its own."""
    command = [sys.executable, "-c", "from hybrid_moe.cli import main; main()", *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)


def test_user_error_in_a_process():
    done = in_process("explain", "--device", "nvidia_b300")
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith("error: ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU it runs the definition's workloads")
def test_demo_without_a_gpu():
    done = in_process("demo")
    assert done.returncode == 0, done.stdout + done.stderr
    for wanted in (
        "Byte for byte what is shipped",
        "nothing on B200 was measured by us",
        "worst 21.2% at T = 16",
        "leave-one-T-out regret",
        "torch_reference",
        "triton_fused[gemm=triton]",
        "All checks passed",
    ):
        assert wanted in " ".join(done.stdout.split()), wanted


@pytest.mark.parametrize("failures", [[], ["triton_fused is wrong at T = 7"]])
def test_demo_leaves_with_1_if_something_failed(monkeypatch, failures):
    for way in ("_on_gpu", "_without_gpu"):
        monkeypatch.setattr(demo, way, lambda: failures)
    shown = cli("demo", code=len(failures)).stdout
    assert all(failure in shown for failure in failures) and ("All checks passed." in shown) == (not failures)


def test_demo_runs_what_the_policy_chooses(monkeypatch, capsys):
    # The way that a GPU takes, at a size for a CPU. Without a policy the first of the order runs.
    monkeypatch.setitem(backends.BACKENDS, _Broken.name, _Broken())
    monkeypatch.setattr(call, "_cached_dispatch", call._cached_dispatch.__wrapped__)
    monkeypatch.setattr("hybrid_moe.cli.common.out.width", 160)  # names instead of letters
    cpu = torch.device("cpu")
    for first in ("torch_reference", _Broken.name):
        monkeypatch.setattr(resolve, "CPU_ORDER", (Candidate(first), Candidate("flashinfer_trtllm")))
        failures = demo._run_all(SMALL, demo.SMALL_WORKLOADS, [None], DeviceKey.of(cpu), cpu)
        shown = capsys.readouterr().out
        assert shown.count(first) == len(demo.SMALL_WORKLOADS)
        failed = {failure.partition(":")[0] for failure in failures}
        wrong = demo.SMALL_WORKLOADS if first == _Broken.name else ()
        assert failed == {f"{first} at T = {w.num_tokens}" for w in wrong}
        assert shown.count("pass") == len(demo.SMALL_WORKLOADS) - len(wrong)


@pytest.mark.gpu
def test_demo_on_a_gpu():
    done = in_process("demo")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "14107" in done.stdout and "All checks passed" in done.stdout


def test_help_shows_brackets():
    for command, texts in {"run": ("[default: 16]", "name[key=value]"), "learn": ("[default: auto]",)}.items():
        flat = " ".join(cli(command, "--help").output.replace("│", " ").split())
        for text in texts:
            assert text in flat, (command, text)


def test_doctor_shows_what_fails_when_it_is_prepared_or_is_in_quarantine(monkeypatch):
    def broken(self, problem, device, config):
        raise OSError("libmoe.so: undefined symbol")

    choice = Candidate("torch_reference")
    backends.prepare.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(type(backends.BACKENDS["torch_reference"]), "prepare", broken)
        row = next(row for row in cli_json("doctor")["backends"] if row["backend"] == "torch_reference")
        assert not row["works"]
        assert row["reasons"] == ["it raises when it is prepared: OSError: libmoe.so: undefined symbol"]
    QUARANTINE.put(DeviceKey.of(this_device()), DEEPSEEK_V3, choice, "shadow_check", "relative L2 0.4 is above 0.05")
    try:
        row = next(row for row in cli_json("doctor")["backends"] if row["backend"] == "torch_reference")
    finally:
        release_quarantine()
    assert not row["works"] and "it failed the shadow check: relative L2 0.4 is above 0.05" in row["reasons"][0]


def test_doctor_names_the_nearest_policy_where_there_is_no_other(tmp_path, monkeypatch):
    policy = load_policy(cpu_policy(tmp_path, "torch_reference"))
    save_policy(policy, user_policy_dir() / "cpu" / "small.json")
    monkeypatch.setattr("hybrid_moe.cli.doctor.this_device", lambda: torch.device("cpu"))
    found = cli_json("doctor")["policies"]
    assert (
        found["applies"] and "regimes of the nearest problem" in found["found"] and SMALL.definition in found["found"]
    )
    assert "Without one" not in cli("doctor").stdout


def test_doctor_survives_a_policy_that_cannot_be_read():
    broken = user_policy_dir() / "gpu_x" / "policy.json"
    broken.parent.mkdir(parents=True)
    broken.write_text('{"schema_version": 2}')
    report = json.loads(cli("doctor", "--json").output)
    assert any("schema_version" in problem for problem in report["policies"]["unreadable"])
    shown = cli("doctor").output
    assert str(broken) in shown and "Without one, torch_reference runs" in shown
    asked_for = user_policy_dir() / "cpu" / f"{MoEProblem().definition}.json"
    asked_for.parent.mkdir()
    asked_for.write_text("{")
    assert "mended or removed" in cli("doctor").output


def test_verify_fails_for_what_no_backend_is_called(tmp_path):
    path = tmp_path / "policy.json"
    path.write_text(SHIPPED.read_text().replace("flashinfer_trtllm", "nope"))
    assert "no backend is called" in " ".join(cli("verify", path, code=1).output.split())


def test_hundreds_of_regimes_are_shortened_for_people_and_whole_in_json(tmp_path):
    path = tmp_path / "policy.json"
    policy = load_policy(SHIPPED)
    regime = policy.regimes[0]
    many = [regime.model_copy(update={"min_tokens": t, "max_tokens": t}) for t in range(1, 6001, 2)]
    save_policy(policy.model_copy(update={"regimes": tuple(many)}), path)
    begun = time.monotonic()
    shown = cli("explain", "--policy", path).stdout
    firsts = [line.split()[0] for line in shown.splitlines() if line.strip()]
    assert "... 2801 more" in shown and {"1", "5999"} <= set(firsts) and "3001" not in firsts
    assert len(shown.splitlines()) < 300
    assert len(cli_json("explain", "--policy", path)["regimes"]) == 3000
    assert "more: --json has all of them" in cli("verify", path).stdout
    assert time.monotonic() - begun < 60
