"""Records and their readers."""

import dataclasses
import hashlib
import json
import os
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from hybrid_moe.candidate import Candidate
from hybrid_moe.measure.readers import read_any, read_records, read_with_digest
from hybrid_moe.measure.records import BenchRecord, append_record, problem_of_definition, problem_of_record
from hybrid_moe.measure.workloads import QWEN3_235B
from hybrid_moe.problem import MoEProblem

TABLE = Path(__file__).parents[1] / "benchmarks" / "data" / "nvidia_b200_2026-02-02.md"
FIELDS = dict(
    device="gpu_x",
    problem=MoEProblem().definition,
    backend="triton_fused",
    config={"gemm": "triton", "stages": 3, "split": True},
    num_tokens=16,
    local_expert_offset=224,
    routing="uniform",
    seed=0,
    local_rows=12,
    active_experts=5,
    status="passed",
    timing="cuda_graph",
    latency_us={"median": 10.5, "p10": 10.0, "p90": 11.0, "runs": 20},
    correctness={"relative_l2": 0.02, "cosine": 0.999, "matched_ratio": 0.98, "rtol": 0.2, "atol": 0.1},
    environment={"torch": "2.13", "read_gb_s": 2900.5, "sms": 132, "mig": False, "note": None},
    timestamp="2026-02-02T00:00:00Z",
)


def make_record(**changes):
    return BenchRecord(**(FIELDS | changes))


@given(
    median=st.floats(1e-3, 1e7),
    config=st.dictionaries(st.text(min_size=1), st.one_of(st.text(), st.integers(-(10**9), 10**9), st.booleans())),
    routing=st.text(),
)
@settings(deadline=None)
def test_json_round_trip(median, config, routing):
    record = make_record(latency_us={"median": median}, config=config, routing=routing)
    line = record.model_dump_json(exclude_none=True)
    assert "\n" not in line
    again = BenchRecord.model_validate_json(line)
    assert again.model_dump(exclude_none=True) == record.model_dump(exclude_none=True)
    assert again.choice == record.choice == Candidate("triton_fused", config)
    assert hash(again.key) == hash(record.key) and again.key == record.key


def test_the_key_is_the_identity_of_a_measurement():
    record = make_record()
    same = make_record(latency_us={"median": 1.0}, timestamp="later", config=dict(reversed(FIELDS["config"].items())))
    assert record.key == same.key
    different = dict(
        device="gpu_y",
        problem="p",
        backend="b",
        config={},
        num_tokens=1,
        local_expert_offset=0,
        routing="zipf",
        seed=1,
        workload="another",
        num_experts=16,
        gate_first=True,
        timing="eager",
    )
    for name, value in different.items():
        assert make_record(**{name: value}).key != record.key


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(latency_us=None), "neither"),
        (dict(speedup_vs_reference=2.0), "latency_us and speedup_vs_reference"),
        (dict(status="failed", reason="wrong"), "no speed is kept"),
        (dict(status="failed", latency_us=None), "reason: expected one"),
        (dict(status="unsupported", latency_us=None, reason=""), "reason: expected one"),
        (dict(status="good"), "status"),
        (dict(latency_us={"median": 0.0}), "median"),
        (dict(latency_us={"median": float("inf")}), "median"),
        (dict(num_tokens="16"), "num_tokens"),
        (dict(device="NVIDIA H100"), "device"),
        (dict(schema_version=2), "schema_version"),
    ],
)
def test_wrong_records(changes, message):
    with pytest.raises(ValidationError, match=message):
        make_record(**changes)


def test_failed_records_may_have_figures_that_are_not_finite():
    record = make_record(
        status="failed",
        reason="not finite",
        latency_us=None,
        correctness={"relative_l2": float("nan"), "matched_ratio": 0.0, "max_abs_error": float("inf")},
    )
    assert record.correctness.relative_l2 is None
    assert BenchRecord.model_validate_json(record.model_dump_json(exclude_none=True)) is not None


@pytest.mark.parametrize("noted", [None, float("nan"), "7", -5, True, 1e12, []])
def test_what_is_no_duration_is_not_known(noted):
    assert make_record(seconds=noted).seconds is None and make_record(seconds=3).seconds == 3.0


def test_fields_of_others_are_kept(tmp_path):
    path = tmp_path / "r.jsonl"
    append_record(path, make_record(launches=5))
    assert read_records(path)[0].model_extra == {"launches": 5}


def test_append_and_read(tmp_path):
    path = tmp_path / "deep" / "r.jsonl"
    records = [make_record(num_tokens=t) for t in (1, 7, 14)]
    for record in records:
        append_record(path, record)
    assert read_records(path) == records
    assert [json.loads(line)["num_tokens"] for line in path.read_text().splitlines()] == [1, 7, 14]
    assert "speedup_vs_reference" not in path.read_text()


def test_append_is_one_write_and_waits_for_the_disk(tmp_path, monkeypatch):
    synced = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.fstat(fd).st_size), real(fd))[1])
    path = tmp_path / "r.jsonl"
    append_record(path, make_record())
    assert synced == [path.stat().st_size]


def test_a_line_cut_short(tmp_path):
    path = tmp_path / "r.jsonl"
    append_record(path, make_record())
    append_record(path, make_record())
    whole = path.read_bytes()
    for cut in (1, 20):  # only the newline, or half of the line
        path.write_bytes(whole[:-cut])
        with pytest.raises(ValueError, match=r"r\.jsonl, line 2 is cut short"):
            read_records(path)
        with pytest.raises(ValueError, match="ends in the middle of a line"):
            append_record(path, make_record())
        assert path.read_bytes() == whole[:-cut]


def test_errors_name_file_and_line(tmp_path):
    path = tmp_path / "r.jsonl"
    append_record(path, make_record())
    for line, message in (("{}", "device: Field required"), ("nonsense", "Invalid JSON")):
        path.write_text(path.read_text().splitlines()[0] + "\n\n" + line + "\n")
        with pytest.raises(ValueError, match=rf"r\.jsonl, line 3 is no benchmark record.*{message}"):
            read_records(path)


def test_the_published_table():
    records = read_any([TABLE])
    assert len(records) == 38
    assert {r.device for r in records} == {"nvidia_b200"}
    assert {r.problem for r in records} == {MoEProblem().definition}
    assert {str(r.choice) for r in records} == {"flashinfer_trtllm", "triton_fused[gemm=sgl_kernel]"}
    by = {(r.num_tokens, r.backend): r for r in records}
    assert by[15, "triton_fused"].speedup_vs_reference == 34.90
    assert by[15, "flashinfer_trtllm"].speedup_vs_reference == 32.25
    record = by[16, "triton_fused"]
    assert (record.local_expert_offset, record.workload, record.timing) == (224, "a7c2bcfd", "cupti")
    assert (record.routing, record.local_rows, record.latency_us) == ("flashinfer_bench", None, None)
    assert (record.correctness.rtol, record.correctness.required_matched_ratio) == (0.2, 0.85)
    assert record.timestamp == "2026-02-02"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("**GPU:**", "GPU", "holds neither"),
        ("**GPU:** NVIDIA B200", "**GPU:**\n", r"expected a line '\*\*GPU:\*\* ...'"),
        ("**GPU:** NVIDIA B200", "**GPU:** (", r"expected a GPU's name in the line '\*\*GPU:\*\*', got '\("),
        ("| b8f4f012 | 7 |", f"| b8f4f012 | {'7' * 5000} |", "line 17 is no row of results: T: Unable to parse"),
        ("| b8f4f012 | 7 |", "| b8f4f012 | 0 |", "line 17 is no row of results: num_tokens"),
        (
            "| b8f4f012 | 7 | 192 |",
            "| b8f4f012 | 7 | 225 |",
            "line 17: local_expert_offset: expected 0 to 224, got 225",
        ),
        ("| 30.15x |", f"| {'9' * 5000}x |", "line 17 is no row of results: triton_v2: String should match"),
        ("required-matched-ratio=0.85", "", "lacks required-matched-ratio"),
        ("All 19 workloads PASS", "All 18 workloads PASS", "got 'All 18 workloads PASS' and 19 rows"),
        ("All 19 workloads PASS", "Fine", "no such sentence"),
        ("triton_v2 |\n", "other |\n", "line 16 is no row of results: triton_v2: Field required; other: Extra"),
        ("| 30.15x |", "| FAIL |", "line 17 is no row of results: triton_v2: String should match"),
        ("| 30.15x |", "| 0.00x |", "line 17 is no row of results: speedup_vs_reference"),
        ("| 30.15x |", "|", "line 17: expected 5 cells, as in the head, got 4"),
        (
            "| b8f4f012 | 7 |",
            "| b8f4f012 | seven |",
            "line 17 is no row of results: T: Input should",
        ),
        ("| UUID", "| ID", "expected a table of results"),
        ("topk8_ng8", "what", "definition is"),
    ],
)
def test_wrong_published_tables(tmp_path, old, new, message):
    text = TABLE.read_text()
    assert old in text
    path = tmp_path / "seed.md"
    path.write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=message):
        read_any([path])


def test_a_table_with_derived_columns_reads_the_same(tmp_path):
    lines = TABLE.read_text().splitlines(keepends=True)
    wide = [line.rstrip("\n") + " 0.9 | **v2** |\n" if line.startswith("| ") else line for line in lines]
    text = "".join(wide).replace("| 0.9 | **v2** |\n|---", "| v2/fi | winner |\n|---")
    text = text.replace("-----------:|----------:|\n", "-----------:|----------:|------:|--------|\n")
    path = tmp_path / "wide.md"
    path.write_text(text.replace("| triton_v2 | 0.9 | **v2** |", "| triton_v2 | v2/fi | winner |"))
    assert read_any([path]) == read_any([TABLE])


def test_read_any_goes_by_content(tmp_path):
    lines = tmp_path / "records.txt"
    append_record(lines, make_record())
    table = tmp_path / "table.txt"
    table.write_bytes(TABLE.read_bytes())
    empty = tmp_path / "empty.jsonl"
    empty.write_bytes(b"")
    assert len(read_any([lines, str(table), empty])) == 39
    other = tmp_path / "other.md"
    other.write_text("# hello\n")
    with pytest.raises(ValueError, match=r"other\.md holds neither"):
        read_any([other])
    digest = read_with_digest(table)[1]
    assert (digest.name, digest.records, len(digest.sha256)) == ("table.txt", 38, 64)


@given(
    local=st.sampled_from([8, 32, 256]), hidden=st.integers(1, 64), inter=st.integers(1, 64), gate_first=st.booleans()
)
@settings(deadline=None)
def test_definition_names_round_trip(local, hidden, inter, gate_first):
    problem = MoEProblem(
        num_local_experts=local, hidden_size=128 * hidden, intermediate_size=128 * inter, gate_first=gate_first
    )
    assert problem_of_definition(problem.definition, gate_first=gate_first) == problem
    softmax = dataclasses.replace(problem, n_group=1, topk_group=1, routing_method="softmax")
    assert softmax.definition != problem.definition
    assert problem_of_definition(softmax.definition, gate_first=gate_first) == softmax


def test_problems_of_records():
    assert problem_of_record(make_record()) == MoEProblem()
    assert problem_of_record(make_record(num_experts=512, gate_first=True)) == MoEProblem(
        num_experts=512, gate_first=True
    )
    # The name of a definition says how it routes, as flashinfer's do.
    name = "moe_fp8_block_scale_renormalize_naive_routing_topk8_e16_h4096_i1536"
    assert problem_of_record(make_record(problem=name, num_experts=128)) == QWEN3_235B
    assert QWEN3_235B.definition == name
    with pytest.raises(ValueError, match="definition is 'gemm'"):
        problem_of_definition("gemm")


@pytest.mark.parametrize("content", [b"dear diary\n", b"\x89PNG\r\n\x1a\n", b"[1]\n", bytes(9) + b"\n"])
def test_nothing_is_added_to_a_file_that_holds_no_records(tmp_path, content):
    path = tmp_path / "notes"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="notes exists and isn't a file of records"):
        append_record(path, make_record())
    assert path.read_bytes() == content


# ---- What others put into a file ----

LINE = make_record().model_dump_json(exclude_none=True)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (LINE.replace('"seed":0', '"seed":0,"seed":1'), "has the key 'seed' twice"),
        (LINE.replace('"seed":0', '"seed" : 0, "seed"\t:1'), "has the key 'seed' twice"),
        (LINE.replace('"torch":"2.13"', '"torch":"2.13","torch":"2.14"'), "has the key 'torch' twice"),
        (LINE[:-1] + ',"extra":{"a":[{"b":1,"b":2}]}}', "has the key 'b' twice"),
        (LINE[:-1] + ',"note":"\\"seed\\":","seed":7}', "has the key 'seed' twice"),
        (LINE[:-1] + ',"extra":' + "[" * 10_000 + "]" * 10_000 + "}", "recursion"),
        (LINE.replace('"num_tokens":16', '"num_tokens":' + "1" * 5000), "num_tokens|number"),
        (LINE.replace('"num_tokens":16', '"num_tokens":' + "1" * 400), "num_tokens"),
        (LINE.replace('"median":10.5', '"median":1e999'), "median"),
        (LINE.replace('"median":10.5', '"median":1e300'), "median"),
        (LINE.replace('"median":10.5', '"median":NaN'), "median"),
        (LINE[:-1] + ',"num_experts":255}', "n_group: expected a divisor of num_experts=255"),
        (LINE[:-1] + ',"num_experts":128}', "local_expert_offset: expected 0 to 96, got 224"),
        (LINE.replace('"uniform"', '"\\ud800"'), "Invalid JSON"),
    ],
)
def test_lines_that_say_more_than_a_record_can(tmp_path, line, message):
    path = tmp_path / "r.jsonl"
    path.write_text(f"{LINE}\n\n{line}\n")
    begun = time.monotonic()
    for read in (read_records, read_with_digest, lambda p: read_any([p])):
        with pytest.raises(ValueError, match=rf"(?s)r\.jsonl, line 3 is no benchmark record.*({message})"):
            read(path)
    assert time.monotonic() - begun < 1


def test_keys_in_strings_are_no_keys(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text(LINE[:-1] + ',"note":"\\"seed\\":1, \\"seed\\": 2","nested":{"seed":1,"list":[{"seed":2}]}}\n')
    (record,) = read_records(path)
    assert record.model_extra["note"].startswith('"seed":')


def test_a_byte_order_mark_is_passed_over_and_is_in_the_digest(tmp_path):
    path = tmp_path / "r.jsonl"
    for content in (LINE.encode() + b"\n", TABLE.read_bytes()):
        path.write_bytes(content)
        plain = read_with_digest(path)
        path.write_bytes(b"\xef\xbb\xbf" + content)
        marked = read_with_digest(path)
        assert marked[0] == plain[0] and marked[1].sha256 != plain[1].sha256
        assert marked[1].sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_where_records_were_read(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text(f"\n{LINE}\n\n{LINE}\n")
    assert [r.place for r in read_records(path)] == [(str(path), 2), (str(path), 4)]
    assert make_record().place is None and read_records(path)[0] == make_record()


def test_what_records_have_in_common_is_kept_once_and_stays_what_it_is(tmp_path):
    path = tmp_path / "r.jsonl"
    lines = [LINE, LINE, LINE.replace('"mig":false', '"mig":0'), LINE.replace('"sms":132', '"sms":132.0')]
    path.write_text("\n".join(lines) + "\n")
    first, second, number, other = read_records(path)
    assert first.environment is second.environment and first.choice is second.choice
    assert (first.environment["mig"], number.environment["mig"]) == (False, 0)
    assert [type(r.environment["mig"]) for r in (first, number)] == [bool, int]
    assert [type(r.environment["sms"]) for r in (first, other)] == [int, float]
    assert [r.model_dump_json(exclude_none=True) for r in read_records(path)] == lines


def test_names_of_files_that_json_cannot_hold(tmp_path):
    folder = os.fsencode(tmp_path)
    for name in (b"\xff.jsonl", b"a\\b.jsonl", b"\x1b[2J.jsonl"):
        path = Path(os.fsdecode(folder + b"/" + name))
        path.write_text(LINE + "\n")
        digest = read_with_digest(path)[1]
        assert digest.model_dump_json().isascii() and "\\" not in digest.name
