"""Traces of flashinfer-bench, written with its own models, and what is learned from them."""

import json
import warnings
from pathlib import Path

import pytest
from flashinfer_bench.data import (
    Correctness,
    Environment,
    Evaluation,
    EvaluationStatus,
    Performance,
    RandomInput,
    ScalarInput,
    Trace,
    Workload,
    append_jsonl_file,
    save_jsonl_file,
)

from hybrid_moe.backends import BACKENDS
from hybrid_moe.candidate import Candidate
from hybrid_moe.flashinfer_bench.traces import candidate_of, is_trace, solution_name
from hybrid_moe.learn.learner import learn, learn_from_files
from hybrid_moe.measure.readers import read_any, read_records, read_with_digest
from hybrid_moe.measure.records import Latency
from hybrid_moe.policy.schema import LearnerOptions
from hybrid_moe.policy.store import dumps_policy, load_policy, save_policy
from hybrid_moe.problem import MoEProblem, problem_of_definition

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "benchmarks" / "results" / "nvidia_h200" / "definition.jsonl"
TRITON = Candidate("triton_fused", {"gemm": "triton"})
SGL = Candidate("triton_fused", {"gemm": "sgl_kernel"})
DEEP = Candidate("triton_fused", {"gemm": "deep_gemm"})
OPTIONS = dict(tie_margin=0.03, max_gap=2.5, prefer="triton_fused[gemm=triton]")


def trace(solution, num_tokens=16, latency_ms=0.1, status="PASSED", hardware="NVIDIA X", **changes):
    """A trace as the benchmark makes one; ``changes`` are fields of evaluation or workload."""
    workload = dict(
        uuid=f"uuid-{num_tokens}",
        axes={"seq_len": num_tokens},
        inputs={
            "hidden_states": RandomInput(),
            "local_expert_offset": ScalarInput(value=32),
            "routed_scaling_factor": ScalarInput(value=2.5),
        },
    )
    evaluation = dict(
        status=EvaluationStatus(status),
        environment=Environment(hardware=hardware, libs={"torch": "2.11.0+cu130", "triton": "3.6.0", "cuda": "13.0"}),
        timestamp="2026-01-01T00:00:00",
    )
    if status in ("PASSED", "INCORRECT_NUMERICAL"):
        evaluation["correctness"] = Correctness(max_relative_error=0.1, max_absolute_error=0.02)
    if status == "PASSED":
        evaluation["performance"] = Performance(latency_ms=latency_ms)  # as without the reference: no speedup
    workload |= {name: changes.pop(name) for name in ("uuid", "axes", "inputs") if name in changes}
    return Trace(
        definition=changes.pop("definition", MoEProblem().definition),
        workload=Workload(**workload),
        solution=solution,
        evaluation=Evaluation(**(evaluation | changes)),
    )


def trace_of(record):
    """The trace that the benchmark would have written in a record's place."""
    environment = Environment(
        hardware=record.environment["gpu"],
        libs={name: str(record.environment[name]) for name in ("torch", "triton", "cuda")},
    )
    return trace(
        str(record.choice),
        record.num_tokens,
        record.latency_us.median / 1e3,
        uuid=record.workload or f"between-{record.num_tokens}",
        inputs={"local_expert_offset": ScalarInput(value=record.local_expert_offset)},
        environment=environment,
        timestamp=record.timestamp,
    )


def written(tmp_path, traces, name="traces.jsonl"):
    path = tmp_path / name
    save_jsonl_file(traces, path)
    return path


def test_the_same_policy_as_from_the_records_they_came_from(tmp_path):
    records = [r for r in read_records(RECORDS) if r.timing == "cuda_graph" and r.routing == "uniform"]
    # A trace has one time and no percentiles, by which measured noise would widen a margin.
    records = [
        r.model_copy(update={"latency_us": Latency(median=r.latency_us.median)})
        for r in records
        if not r.backend.startswith("peer:")
    ]
    path = written(tmp_path, [trace_of(r) for r in records])
    of_traces = learn_from_files([path], LearnerOptions(**OPTIONS))
    of_records = learn(records, LearnerOptions(**OPTIONS), problem=MoEProblem(), inputs=[])
    same = ("device", "problem", "definition", "candidates", "default", "default_reason", "default_evidence")
    for name in (*same, "regimes", "training_regret", "leave_one_out_regret"):
        assert getattr(of_traces, name) == getattr(of_records, name), name
    assert {regime.choice for regime in of_traces.regimes} == {TRITON, DEEP}
    assert of_traces.environment["timing"] == "cupti"
    assert (of_traces.environment["torch"], of_traces.environment["gpu"]) == ("2.11.0", "NVIDIA H200")
    assert [(d.name, d.records) for d in of_traces.inputs] == [("traces.jsonl", len(records))]


def test_the_fields_of_a_record(tmp_path):
    (record,) = read_any([written(tmp_path, [trace("triton_fused[gemm=deep_gemm]", 7, 0.25)])])
    assert (record.device, record.problem, record.choice) == ("nvidia_x", MoEProblem().definition, DEEP)
    assert (record.num_tokens, record.local_expert_offset, record.workload) == (7, 32, "uuid-7")
    assert (record.status, record.timing, record.solution) == ("passed", "cupti", "triton_fused[gemm=deep_gemm]")
    assert record.latency_us.median == 250 and record.speedup_vs_reference is None
    assert record.correctness.max_abs_error == 0.02
    assert record.environment["torch"] == "2.11.0+cu130"
    assert record.timestamp == "2026-01-01T00:00:00"


def test_later_layouts_add_fields(tmp_path):
    data = json.loads(trace("triton_fused").model_dump_json())
    data["evaluation"]["performance"] |= {"profile": None, "e2e_ms": 9.0, "kernel_ms": 8.0, "l2_cache_mode": "cold"}
    data["workload"]["tolerance"] = {"rtol": 0.2}
    path = tmp_path / "head.jsonl"
    path.write_text(json.dumps(data) + "\n")
    (record,) = read_any([path])
    assert record.choice == TRITON and record.latency_us.median == pytest.approx(100)


def test_only_passed_keeps_its_time(tmp_path):
    statuses = [status.value for status in EvaluationStatus]
    traces = [trace("triton_fused", 1, status=s, log="first\nno kernel image\n") for s in statuses]
    records = read_any([written(tmp_path, traces)])
    found = {
        status: (r.status, r.reason, r.latency_us is not None) for status, r in zip(statuses, records, strict=True)
    }
    assert found.pop("PASSED") == ("passed", None, True)
    assert found.pop("TIMEOUT") == ("timeout", "TIMEOUT: no kernel image", False)
    assert set(found) == set(statuses) - {"PASSED", "TIMEOUT"}
    for status, what in found.items():
        assert what == ("failed", f"{status}: no kernel image", False)


def test_a_wrong_answer_is_not_chosen_where_it_was_wrong(tmp_path):
    nan = Correctness(max_relative_error=float("nan"), max_absolute_error=float("inf"))
    traces = [
        trace("triton_fused", 1, 0.2),
        trace("triton_fused", 2, 0.2),
        trace(str(DEEP), 1, status="INCORRECT_NUMERICAL", correctness=nan),
        trace(str(DEEP), 2, 0.1),
    ]
    path = written(tmp_path, traces)
    assert read_any([path])[2].correctness.max_abs_error is None
    policy = learn_from_files([path], LearnerOptions(tie_margin=0.0))
    assert [(r.label, r.choice) for r in policy.regimes] == [("1", TRITON), ("2-", DEEP)]


def test_hardware_is_split(tmp_path):
    path = written(tmp_path, [trace("triton_fused", 1), trace("triton_fused", 1, hardware="NVIDIA Y")])
    with pytest.raises(ValueError, match="several devices: nvidia_x, nvidia_y; name one as device="):
        learn_from_files([path], LearnerOptions())
    assert learn_from_files([path], LearnerOptions(), device="nvidia_y").device == "nvidia_y"


def test_two_workloads_of_one_size_are_two(tmp_path):
    # Same T and offset: the UUID alone tells them apart. a is 4 times slower at one, b 3 times at the other.
    traces = [
        trace(str(TRITON), 8, 0.4, uuid="x"),
        trace(str(TRITON), 8, 0.1, uuid="y"),
        trace(str(SGL), 8, 0.1, uuid="x"),
        trace(str(SGL), 8, 0.3, uuid="y"),
    ]
    policy = learn_from_files([written(tmp_path, traces)], LearnerOptions(tie_margin=0.0))
    (evidence,) = policy.regimes[0].evidence
    assert (policy.default, evidence.workloads) == (SGL, 2)
    assert evidence.slowdown == {str(TRITON): pytest.approx(2.0), str(SGL): pytest.approx(3**0.5, rel=1e-5)}


@pytest.mark.parametrize("backend", BACKENDS)
def test_names_of_candidates(backend):
    for config in BACKENDS[backend].configs():
        choice = Candidate(backend, config)
        assert candidate_of(str(choice), {}) == candidate_of(solution_name(choice), {}) == choice
        assert solution_name(choice).replace("_", "").isalnum()


def test_other_names_need_to_be_said():
    assert solution_name(TRITON) == "hybrid_moe_triton_fused_gemm_triton"
    assert candidate_of("triton_fused", {}) == TRITON  # the default option is filled in
    for name in ("flashinfer_moe", "triton_fused[gemm=cublas]", "triton_fused[", "hybrid_moe_nvidia_b200", "a=b"):
        assert candidate_of(name, {}) == Candidate(f"peer:{name}")
    given = {"flashinfer_moe": "flashinfer_trtllm", "triton_fused": "triton_fused[gemm=deep_gemm]"}
    assert candidate_of("flashinfer_moe", given) == Candidate("flashinfer_trtllm")
    assert candidate_of("triton_fused", given) == DEEP
    with pytest.raises(ValueError, match=r"'x': expected one of .*triton_fused\[gemm=tri"):
        candidate_of("x", {"x": "fast"})


def test_solutions_are_named_learned_and_kept(tmp_path):
    path = written(tmp_path, [trace("mine", t, 0.1) for t in (1, 2)] + [trace("triton_fused", t, 0.2) for t in (1, 2)])
    with pytest.warns(UserWarning, match="no candidate is called so: the solution mine. .*--solution"):
        assert learn_from_files([path], LearnerOptions()).candidates == (TRITON,)
    options = LearnerOptions(solutions={"mine": "triton_fused[gemm=sgl_kernel]"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policy = learn_from_files([path], options)
    assert policy.default == SGL
    with pytest.raises(ValueError, match="no trace is of the solution theirs; found: mine, triton_fused"):
        learn_from_files([path], LearnerOptions(solutions={"theirs": "triton_fused"}))
    # The file says how it was learned, so that it can be learned again.
    save_policy(policy, tmp_path / "policy.json")
    again = load_policy(tmp_path / "policy.json")
    assert again == policy
    assert dumps_policy(learn_from_files([path], again.learner)) == dumps_policy(policy)


def test_nothing_but_solutions_of_others(tmp_path):
    path = written(tmp_path, [trace("mine")])
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="the records are about several problems or none"):
        learn_from_files([path], LearnerOptions())
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="--solution NAME=CANDIDATE"):
        learn_from_files([path], LearnerOptions(), MoEProblem())


def test_workloads_that_were_not_run_are_passed_over(tmp_path):
    only = Trace(definition=MoEProblem().definition, workload=trace("a").workload)
    path = written(tmp_path, [only, trace("triton_fused"), only])
    append_jsonl_file([trace("triton_fused", 32)], path)
    records, digest = read_with_digest(path)
    assert [r.num_tokens for r in records] == [16, 32]
    assert digest.records == 2


def test_records_and_traces_are_told_apart(tmp_path):
    line = trace("triton_fused").model_dump_json().encode()
    assert is_trace(line)
    assert not is_trace(RECORDS.read_bytes().split(b"\n", 1)[0])
    assert not is_trace(b"[]") and not is_trace(b'{"definition": ')
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_bytes(line + b"\n" + RECORDS.read_bytes().split(b"\n", 1)[0] + b"\n")
    with pytest.raises(ValueError, match=r"mixed\.jsonl, line 2 is no trace of flashinfer-bench: definition"):
        read_any([mixed])


def change(data, path, value):
    *folders, last = path
    for name in folders:
        data = data[name]
    if value is None:
        del data[last]
    else:
        data[last] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("definition",), "gemm_n128", "line 2: definition is 'gemm_n128'"),
        (("solution",), None, "line 2: the trace: expected both solution and evaluation or neither"),
        (("evaluation", "performance"), None, "expected a latency_ms above 0, got no performance"),
        (("evaluation", "performance", "latency_ms"), 0.0, r"expected a latency_ms above 0, got 0.0 ms"),
        (("evaluation", "environment", "hardware"), "", "line 2 is no trace of flashinfer-bench: evaluation.environ"),
        (("evaluation", "timestamp"), None, "evaluation.timestamp"),
        (("workload", "axes"), {"batch": 1}, "expected the axis seq_len, which is T, got batch"),
        (("workload", "axes", "seq_len"), 0, "line 2 is no trace of flashinfer-bench: num_tokens"),
        (
            ("workload", "inputs", "local_expert_offset"),
            {"type": "random"},
            'with a whole number, got {"type": "random"}',
        ),
        (("workload", "inputs", "local_expert_offset"), None, "with a whole number, got {}"),
        (("workload", "inputs", "local_expert_offset", "value"), 0.5, "with a whole number"),
    ],
)
def test_wrong_traces(tmp_path, path, value, message):
    good = trace("triton_fused").model_dump_json()
    data = json.loads(good)
    change(data, path, value)
    file = tmp_path / "traces.jsonl"
    file.write_text(f"{good}\n{json.dumps(data)}\n")
    with pytest.raises(ValueError, match=message) as caught:
        read_any([file])
    assert str(caught.value).startswith(str(file))


def test_a_line_that_was_cut_short(tmp_path):
    line = trace("triton_fused").model_dump_json()
    file = tmp_path / "traces.jsonl"
    file.write_text(f"{line}\n{line[:-20]}")
    with pytest.raises(ValueError, match="line 2 is no trace"):
        read_any([file])


# ---- Of how many experts a model is: the names of definitions leave it out ----

KIMI_E48 = "moe_fp8_block_scale_ds_routing_topk8_ng1_kg1_e48_h7168_i2048"
KIMI_E384 = KIMI_E48.replace("e48", "e384")
UNKNOWN = "moe_fp8_block_scale_ds_routing_topk6_ng1_kg1_e20_h2048_i1408"


def traces_of(definition, folder, offset=0, name="traces.jsonl"):
    inputs = {"local_expert_offset": ScalarInput(value=offset)}
    folder.mkdir(parents=True, exist_ok=True)
    return written(folder, [trace("triton_fused", t, definition=definition, inputs=inputs) for t in (1, 16)], name)


def definition_file(path, name, num_experts=384, **axes):
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {"seq_len": {"type": "var"}, "num_experts": {"type": "const", "value": num_experts}}
    found |= {axis: {"type": "const", "value": value} for axis, value in axes.items()}
    path.write_text(json.dumps({"name": name, "op_type": "moe", "axes": found}))
    return path


@pytest.mark.parametrize(
    ("definition", "offset", "num_experts"),
    [
        (MoEProblem().definition, 224, 256),
        (MoEProblem(num_local_experts=8).definition, 248, 256),  # on 32 ranks
        (KIMI_E48, 336, 384),
        (KIMI_E384, 0, 384),
        ("moe_fp8_block_scale_renormalize_naive_routing_topk8_e16_h4096_i1536", 112, 128),
    ],
)
def test_models_that_are_known(tmp_path, definition, offset, num_experts):
    policy = learn_from_files([traces_of(definition, tmp_path, offset)], LearnerOptions())
    assert (policy.definition, policy.problem.num_experts) == (definition, num_experts)


@pytest.mark.parametrize("definition", [UNKNOWN, KIMI_E48.replace("e48", "e50"), KIMI_E48.replace("e48", "e768")])
def test_models_that_are_not_known_are_asked_for(tmp_path, definition):
    path = traces_of(definition, tmp_path)
    with pytest.raises(ValueError, match=rf"{definition}.*--num-experts.*--definition"):
        learn_from_files([path], LearnerOptions())
    count = 1600  # of which 20, 50 and 768 may be local
    assert learn_from_files([path], LearnerOptions(), num_experts=count).problem.num_experts == count
    wanted = problem_of_definition(definition, num_experts=count)
    assert learn_from_files([path], LearnerOptions(), wanted).problem == wanted


def test_the_axes_of_a_definition_say_it(tmp_path):
    path = traces_of(UNKNOWN, tmp_path / "traces" / "someone" / "moe")
    given = definition_file(tmp_path / "elsewhere.json", UNKNOWN, 60, num_local_experts=20)
    assert learn_from_files([path], LearnerOptions(), definitions=[given]).problem.num_experts == 60
    with pytest.raises(ValueError, match="leave open"):
        learn_from_files([path], LearnerOptions())
    # As a data set has it.
    definition_file(tmp_path / "definitions" / "moe" / f"{UNKNOWN}.json", UNKNOWN, 80)
    assert learn_from_files([path], LearnerOptions()).problem.num_experts == 80
    with pytest.raises(ValueError, match=r"line 1: num_experts is 60; the Definition .*definitions/moe/.* has 80"):
        learn_from_files([path], LearnerOptions(), num_experts=60)


def test_a_definition_counts_more_than_a_model_that_is_known(tmp_path):
    path = traces_of(KIMI_E48, tmp_path, 432)
    given = definition_file(tmp_path / "d.json", KIMI_E48, 480)
    assert learn_from_files([path], LearnerOptions(), definitions=[given]).problem.num_experts == 480


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "no Definition of flashinfer-bench"),
        ("{", "isn't whole JSON"),
        ('{"name": "gemm", "axes": {}}', "definition is 'gemm'"),
        (json.dumps({"name": UNKNOWN, "axes": {"seq_len": {"type": "var"}}}), "no axis num_experts"),
        (
            json.dumps({"name": UNKNOWN, "axes": {"num_experts": {"type": "const", "value": True}}}),
            "no axis num_experts",
        ),
        (
            json.dumps({"name": UNKNOWN, "axes": {"num_experts": {"value": 60}, "hidden_size": {"value": 4096}}}),
            "hidden_size = 4096; its name says 2048",
        ),
    ],
)
def test_wrong_definitions(tmp_path, content, message):
    path = tmp_path / "d.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as refused:
        learn_from_files([traces_of(UNKNOWN, tmp_path)], LearnerOptions(), definitions=[path])
    assert str(path) in str(refused.value)


@pytest.mark.parametrize(("definition", "offset"), [(KIMI_E48, 337), (KIMI_E384, 1), (MoEProblem().definition, 225)])
def test_an_offset_that_the_problem_cannot_have_is_an_error(tmp_path, definition, offset):
    path = traces_of(definition, tmp_path, offset)
    with pytest.raises(ValueError, match=r"traces\.jsonl, line 1: local_expert_offset: expected 0 to"):
        learn_from_files([path], LearnerOptions())
    assert learn_from_files([path], LearnerOptions(), num_experts=1536).problem.num_experts == 1536


def test_what_is_given_must_be_what_the_records_say():
    with pytest.raises(ValueError, match="num_experts is 512; the records say 256"):
        learn_from_files([RECORDS], LearnerOptions(timing="cuda_graph"), num_experts=512)
    with pytest.raises(ValueError, match="gate_first is True; the records say False"):
        learn_from_files([RECORDS], LearnerOptions(timing="cuda_graph"), gate_first=True)


def test_workloads_alone_were_not_run(tmp_path):
    only = Trace(definition=MoEProblem().definition, workload=trace("a").workload)
    with pytest.raises(ValueError, match=r"nothing in .*traces\.jsonl was run: it has workloads .2. and no result"):
        read_any([written(tmp_path, [only, only])])


def test_traces_are_read_strictly(tmp_path):
    line = trace("triton_fused").model_dump_json()
    file = tmp_path / "traces.jsonl"
    for bad, message in (
        (line.replace('"status":"PASSED"', '"status":"FAILED","status":"PASSED"'), "'status' twice"),
        (line[:-1] + ',"x":' + "[" * 100_000 + "}", "deep"),
        (line[:-1] + ',"x":' + "1" * 5000 + "}", "5000 digits"),
        (line.replace("NVIDIA X", "\\ud800"), "line 2"),
    ):
        assert bad != line
        file.write_text(f"{line}\n{bad}\n")
        with pytest.raises(ValueError, match=message) as refused:
            read_any([file])
        assert str(refused.value).startswith(f"{file}, line 2")
