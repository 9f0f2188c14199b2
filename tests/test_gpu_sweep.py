"""`hybrid-moe regenerate` on a GPU: killed twice, it measures what it would have measured, and its policy holds."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from hybrid_moe.measure.readers import read_records
from hybrid_moe.policy.store import load_policy

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]

# T = 1 and 2, one load, one candidate: four records.
ARGUMENTS = ("--quick", "--max-tokens", "2", "--routing", "uniform", "--candidate", "triton_fused[gemm=triton]")


def started(folder, *arguments):
    command = [sys.executable, "-c", "from hybrid_moe.cli import main; main()", "regenerate", *ARGUMENTS, *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with open(folder / "out", "wb") as out, open(folder / "err", "wb") as err:
        return subprocess.Popen(command, env=environment, stdout=out, stderr=err)


def finished(folder, *arguments):
    process = started(folder, *arguments, "--json")
    assert process.wait(400) == 0, (folder / "err").read_text()
    return json.loads((folder / "out").read_text())


def test_killed_and_resumed(tmp_path):
    through, killed = tmp_path / "through.jsonl", tmp_path / "killed.jsonl"
    found = finished(tmp_path, "--records", str(through), "--no-install")
    wanted = [record.key for record in read_records(through)]
    assert len(wanted) == 4 and found["verified"] and not found["installed"]
    for lines in (1, 3):
        process = started(tmp_path, "--records", str(killed), "--no-install")
        end = time.monotonic() + 300
        while not killed.exists() or killed.read_bytes().count(b"\n") < lines:
            assert process.poll() is None and time.monotonic() < end, (tmp_path / "err").read_text()
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert killed.read_bytes().endswith(b"\n")
    policy = tmp_path / "policy.json"
    found = finished(tmp_path, "--records", str(killed), "--output", str(policy))
    assert found["verified"] and found["installed"] and found["path"] == str(policy)
    records = read_records(killed)
    assert [record.key for record in records] == wanted
    for record in records:
        assert record.status == "passed", record.reason
        before, after = record.gpu_before, record.gpu_after
        assert before.model_fields_set == after.model_fields_set != set() and record.seconds > 0
    assert load_policy(policy).device == records[0].device
    # The same again measures nothing.
    assert finished(tmp_path, "--records", str(killed), "--output", str(policy))["measured_now"] == 0
