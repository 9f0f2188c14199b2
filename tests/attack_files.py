"""Attacks what reads and writes files: python tests/attack_files.py [--tries 1.0] [--seed 0] [--only NAME].

Thousands of damaged inputs, strange files, full disks, kills and races, by a seed: the same seed, the same attacks. It
prints a table of what came of them, and isn't a part of `make test`. Exit code 1 if anything was wrong: another error
than the documented one, one that doesn't name the file, one that took longer than a second (of this process's own
time), or a file that was lost or changed.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from pathlib import Path

from typer.testing import CliRunner

from hybrid_moe import files
from hybrid_moe.cli import app
from hybrid_moe.flashinfer_bench.dataset import read_num_experts
from hybrid_moe.measure.readers import read_any, read_measurements, read_records
from hybrid_moe.measure.sweep import journal
from hybrid_moe.policy import store
from hybrid_moe.policy.schema import PolicyError
from hybrid_moe.policy.store import dumps_policy, find_policy, load_policy, policy_path, save_policy
from hybrid_moe.problem import MoEProblem

ROOT = Path(__file__).parents[1]
H200 = ROOT / "benchmarks" / "results" / "nvidia_h200" / "definition.jsonl"
TABLE = ROOT / "benchmarks" / "data" / "nvidia_b200_2026-02-02.md"
SHIPPED = policy_path(ROOT / "policies", "nvidia_h200", MoEProblem())
LIMIT_S = 1.0
# What no terminal may get from a file.
RAW = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class Results:
    """What came of each kind of attack."""

    def __init__(self) -> None:
        self.outcomes: dict[str, Counter[str]] = defaultdict(Counter)
        self.wrong: list[str] = []

    def note(self, kind, outcome, wrong=""):
        self.outcomes[kind][outcome] += 1
        if wrong:
            self.outcomes[kind]["WRONG"] += 1
            self.wrong.append(f"{kind}: {wrong}")

    def table(self):
        lines = ["| attack | tries | outcome | wrong |", "|---|---:|---|---:|"]
        for kind, outcomes in self.outcomes.items():
            wrong = outcomes["WRONG"]
            said = ", ".join(f"{name} {count}" for name, count in sorted(outcomes.items()) if name != "WRONG")
            tries = sum(count for name, count in outcomes.items() if name != "WRONG")
            lines.append(f"| {kind} | {tries} | {said} | {wrong} |")
        return "\n".join(lines)


RESULTS = Results()


def refused_or_read(kind, path, read, errors=(ValueError, OSError)):
    """Call a reader; it must give something or raise an error that names the file, in a second."""
    begun = time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read()
    except errors as error:
        outcome, text = "refused with the file's name", str(error) + str(getattr(error, "filename", ""))
        wrong = (
            "" if os.fsdecode(os.fsencode(str(path))) in text or ascii(str(path))[1:-1] in text else f"unnamed: {text}"
        )
    except BaseException as error:
        outcome, wrong = "another error", f"{type(error).__name__}: {error}"
    else:
        outcome, wrong = "read", ""
    spent = time.process_time() - begun
    RESULTS.note(kind, outcome, wrong or (f"took {spent:.1f} s: {path.name}" if spent > LIMIT_S else ""))
    return outcome


# ---- Damage ----


NO_NUMBERS = [b"1" * 5000, b"1e999", b"-1", b"NaN", b"Infinity", b"null", b"true", b'"7"', b"[]", b"1e300", b"9" * 30]
NO_STRINGS = [
    b"null",
    b"7",
    b"{}",
    b'"\\u001b[2J"',
    b'"\\ud800"',
    b'"\\u0000"',
    b'"\x1b]0;x\x07"',
    b'"%b"' % (b"x" * 100_000),
]


def damaged(rng, content):
    """The content with one kind of damage, at random."""
    at, other = rng.randrange(len(content) + 1), rng.randrange(len(content) + 1)
    low, high = min(at, other), max(at, other)
    piece = content[low : min(high, low + 400)]
    numbers = list(re.finditer(rb"-?\d+(\.\d+)?", content))
    strings = list(re.finditer(rb'"[^"\\]*"', content))

    def replaced(found, text):
        return content[: found.start()] + text + content[found.end() :]

    number = rng.choice(numbers) if numbers else None
    string = rng.choice(strings) if strings else None
    ways = [
        lambda: content[:at],
        lambda: content[:low] + content[high:],
        lambda: content[:low] + piece + content[low:],
        lambda: content[:at] + rng.randbytes(rng.randrange(1, 20)) + content[at:],
        lambda: content[:at] + bytes(rng.randrange(1, 5000)) + content[at:],
        lambda: b"\xef\xbb\xbf" + content,
        lambda: content.decode("utf-8").encode("utf-16"),
        lambda: content.replace(b"\n", b"\r\n"),
        lambda: content[:at] + b"\xff\xfe\x80" + content[at:],
        lambda: content[:at] + b"[" * rng.choice([10, 1000, 100_000]) + content[at:],
        lambda: content[:at] + b'{"a":' * rng.choice([10, 1000, 50_000]) + content[at:],
    ]
    if number:
        worse = [
            b"1" * 5000,
            b"1e999",
            b"-1",
            b"NaN",
            b"Infinity",
            b"null",
            b"true",
            b'"7"',
            b"[]",
            b"1e300",
            b"0",
            b"9" * 30,
        ]
        ways += [lambda: replaced(number, rng.choice(worse))] * 4
    if string:
        worse = [
            b"null",
            b"7",
            b'"\\u001b[2J"',
            b'"\\ud800"',
            b'"\\u0000"',
            b'"' + b"x" * 100_000 + b'"',
            b"{}",
            b'"\x1b]0;x\x07"',
        ]
        ways += [lambda: replaced(string, rng.choice(worse))] * 4
        ways += [lambda: replaced(string, string.group() + b":1," + string.group())]
    return rng.choice(ways)()


def traces(rng):
    lines = []
    for index in range(6):
        workload = {
            "uuid": f"u{index}",
            "axes": {"seq_len": 2**index},
            "inputs": {"local_expert_offset": {"type": "scalar", "value": 32}},
        }
        evaluation = {
            "status": rng.choice(["PASSED", "PASSED", "TIMEOUT", "RUNTIME_ERROR"]),
            "environment": {"hardware": "NVIDIA X", "libs": {"torch": "2.11.0"}},
            "timestamp": "2026-01-01T00:00:00",
            "log": "a\nb",
            "performance": {"latency_ms": 0.1 * (index + 1)},
        }
        trace = {"definition": MoEProblem().definition, "workload": workload, "solution": "triton_fused"}
        lines.append(json.dumps(trace | {"evaluation": evaluation}))
    return "\n".join(lines).encode() + b"\n"


def as_policy(path):
    return find_policy(MoEProblem(), "nvidia_h200", path)


def attack_contents(rng, folder, tries):
    records = b"\n".join(H200.read_bytes().split(b"\n")[:8]) + b"\n"
    kinds = {
        "damaged policy": (SHIPPED.read_bytes(), load_policy, PolicyError, 1500),
        "damaged policy, as --policy": (
            SHIPPED.read_bytes(),
            lambda p: find_policy(MoEProblem(), "nvidia_h200", p),
            PolicyError,
            500,
        ),
        "damaged records": (records, lambda p: (read_records(p), read_measurements(p)), (ValueError, OSError), 1500),
        "damaged traces": (traces(rng), lambda p: read_any([p]), (ValueError, OSError), 1000),
        "damaged table": (TABLE.read_bytes(), lambda p: read_any([p]), (ValueError, OSError), 600),
        "damaged journal": (records, lambda p: journal.check(p), (ValueError, OSError), 600),
    }
    for kind, (content, read, errors, count) in kinds.items():
        for number in range(round(count * tries)):
            path = folder / f"f{number}"
            path.write_bytes(damaged(rng, content))
            refused_or_read(kind, path, lambda path=path, read=read: read(path), errors)
            path.unlink()


# ---- Files that are none, or not what they seem ----


def strange_files(folder):
    """Name -> path of files that no reader should wait for, or take in."""
    folder.mkdir(exist_ok=True)
    os.mkfifo(folder / "fifo.json")
    (folder / "dangling.json").symlink_to("nowhere")
    (folder / "loop.json").symlink_to("loop.json")
    (folder / "zero.json").symlink_to("/dev/zero")
    (folder / "null.json").symlink_to("/dev/null")
    (folder / "tty.json").symlink_to("/dev/tty")
    (folder / "memory.json").symlink_to("/proc/self/mem")
    (folder / "folder.json").mkdir()
    (folder / "empty.json").write_bytes(b"")
    (folder / "200mb.json").write_bytes(b"")
    os.truncate(folder / "200mb.json", 200_000_000)
    (folder / "terabyte.json").write_bytes(b"")
    os.truncate(folder / "terabyte.json", 2**40)
    (folder / "one_line.json").write_bytes(b"{" + b" " * 20_000_000)
    (folder / "deep.json").write_bytes(b"[" * 1_000_000)
    (folder / "deep_objects.json").write_bytes(b'{"a":' * 500_000)
    (folder / "digits.json").write_bytes(b"1" * 1_000_000)
    (folder / "keys.json").write_bytes(b"{" + b",".join(b'"%d":0' % i for i in range(200_000)) + b',"7":0}')
    (folder / "picture.json").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)))
    return sorted(folder.iterdir())


def attack_strange_files(folder, tries):
    readers = {
        "load_policy": load_policy,
        "--policy": lambda p: find_policy(MoEProblem(), "nvidia_h200", p if not p.is_dir() else p / "missing"),
        "records": read_records,
        "measurements": lambda p: read_measurements(p),
        "journal": journal.check,
        "Definition": read_num_experts,
    }
    for path in strange_files(folder):
        for read in readers.values():
            for _ in range(max(1, round(3 * tries))):
                refused_or_read("no regular file, huge, deep or endless", path, lambda p=path, r=read: r(p))


def attack_policy_folder(rng, folder, tries):
    """Any mixture of strange files beside the policy that is asked for."""
    shipped = folder / "shipped"
    save_policy(load_policy(SHIPPED), policy_path(shipped, "nvidia_h200", MoEProblem()))
    user = folder / "user"
    strange_files(user)
    (user / "sub").mkdir()
    everything = [path for path in user.iterdir() if path.name != "sub"]
    wanted = load_policy(SHIPPED)
    store.user_policy_dir, old = (lambda: chosen), store.user_policy_dir
    kind = "stray files in the folder of policies"
    try:
        for number in range(round(100 * tries)):
            chosen = folder / f"chosen{number}"
            (chosen / "nvidia_h200").mkdir(parents=True)
            for path in rng.sample(everything, rng.randrange(1, 6)):
                name = rng.choice(["", "._", ".#"]) + path.name
                os.rename(path, (chosen if rng.random() < 0.5 else chosen / "nvidia_h200") / name)
            save_policy(wanted, chosen / "nvidia_h200" / "mine.json")
            begun = time.process_time()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found, _ = find_policy(MoEProblem(), "nvidia_h200")
            spent = time.process_time() - begun
            wrong = "another policy" if found != wanted else f"took {spent:.1f} s" if spent > 3 * LIMIT_S else ""
            RESULTS.note(kind, "the right policy found", wrong)
            for path in [*chosen.glob("*.json"), *chosen.glob("*/*.json")]:
                if path.name == "mine.json":
                    path.unlink()
                else:
                    os.rename(path, user / path.name.removeprefix("._").removeprefix(".#"))
    finally:
        store.user_policy_dir = old


# ---- Writing ----


def state(path):
    found = os.lstat(path)
    content = path.read_bytes() if path.is_file() else b""
    return found.st_mode, found.st_ino, found.st_mtime_ns, content


FOREIGN = [
    b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
    b'{"a": 1}',
    b'{"a": 1}\n',
    b"dear diary\n",
    b'{"schema_version": 1, "backend": "x"}\n',
    bytes(5000),
    b"#!/bin/sh\nrm -rf /\n",
    H200.read_bytes(),
]


def attack_targets(rng, folder, tries):
    kinds = [files.POLICY, files.SOLUTION, files.DEFINITION, files.PAGE]
    for number in range(round(600 * tries)):
        path = folder / f"precious{number}"
        path.write_bytes(rng.choice(FOREIGN) + rng.randbytes(rng.randrange(50)))
        path.chmod(rng.choice([0o600, 0o640, 0o644, 0o666, 0o444]))
        target = path
        if rng.random() < 0.3:
            target = folder / f"link{number}"
            target.symlink_to(path)
        before = state(path)
        with contextlib.suppress(ValueError, OSError):
            files.write_whole(target, b"{}", rng.choice(kinds))
        changed = state(path) != before or (target != path and not target.is_symlink())
        RESULTS.note("output onto a file that isn't ours", "left as it was", "changed" if changed else "")
    policy = dumps_policy(load_policy(SHIPPED)).encode()
    for number in range(round(400 * tries)):
        path = folder / f"policy{number}"
        path.write_bytes(policy)
        mode = rng.randrange(0o1000) | 0o200
        path.chmod(mode)
        target = path
        if rng.random() < 0.5:
            target = folder / f"policy-link{number}"
            target.symlink_to(path)
        files.write_whole(target, policy + b"\n", files.POLICY)
        kept = os.stat(path).st_mode & 0o7777 == mode and (target == path or target.is_symlink())
        right = kept and path.read_bytes() == policy + b"\n"
        RESULTS.note("output onto an older one: mode and link", "written, mode and link kept", "" if right else "lost")
    device = os.stat("/dev/null")
    for _ in range(round(50 * tries)):
        files.write_whole("/dev/null", policy, files.POLICY)
        RESULTS.note(
            "output to a device", "written into", "" if os.stat("/dev/null").st_rdev == device.st_rdev else "replaced"
        )


def attack_journals(rng, folder, tries):
    content = b"".join(H200.read_bytes().splitlines(keepends=True)[:12])
    ends = [i + 1 for i, byte in enumerate(content) if byte == 10]
    path = folder / "journal"
    for _ in range(round(1500 * tries)):
        cut = rng.randrange(1, len(content))
        path.write_bytes(content[:cut] + bytes(rng.choice([0, 0, 1, 512])))
        whole = max([end for end in ends if end <= cut], default=0)
        complete = cut + 1 in ends
        try:
            journal.mend(path)
            journal.mend(path)
        except ValueError:
            # A record that lacks its newline, followed by zeros: no sweep can have left that.
            outcome, wrong = "left as it was", "" if path.read_bytes().startswith(content[:cut]) else "changed"
        else:
            after = path.read_bytes()
            kept = [content[:whole]] + ([content[: cut + 1]] if complete else [])
            outcome, wrong = "whole lines kept", "" if after in kept else "lines lost"
        RESULTS.note("journal cut short by a crash", outcome, wrong)
    for number in range(round(600 * tries)):
        path = folder / f"foreign{number}"
        path.write_bytes(rng.choice(FOREIGN[:-1]) + (rng.randbytes(20) if rng.random() < 0.5 else b""))
        before = state(path)
        for act in (journal.check, journal.mend, journal.set_aside):
            try:
                act(path)
            except ValueError:
                outcome, wrong = "refused, untouched", ""
            else:
                outcome, wrong = "taken", f"{act.__name__} took {before[3][:40]!r}"
            if not path.exists() or state(path) != before:
                wrong = "changed"
            RESULTS.note("--records on a file that isn't ours", outcome, wrong)


def in_child(act):
    """Run in a forked process; its exit code."""
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            code = act()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def attack_full_disk(rng, folder, tries):
    """Every write ends at a limit on the size of files, which stands for a full disk."""
    policy = dumps_policy(load_policy(SHIPPED)).encode()
    line = H200.read_bytes().split(b"\n", 1)[0] + b"\n"

    def limited(size, path, act):
        def run():
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            try:
                act(path)
            except OSError as error:
                return 3 if str(path) in str(error) else 4
            return 0

        return run

    for number in range(round(200 * tries)):
        path, size = folder / f"old{number}", rng.randrange(len(policy) + 2000)
        path.write_bytes(policy)
        code = in_child(limited(size, path, lambda p: files.write_whole(p, policy + b"\n", files.POLICY)))
        right = code in (0, 3) and path.read_bytes() == (policy + b"\n" if code == 0 else policy)
        leftover = [name for name in os.listdir(folder) if name.endswith(".tmp")]
        outcome = "written" if code == 0 else "error with the name, old file whole"
        RESULTS.note("disk full while a file is replaced", outcome, "" if right and not leftover else f"code {code}")
    for number in range(round(200 * tries)):
        path = folder / f"lines{number}"
        before = line * rng.randrange(5)
        path.write_bytes(before)
        size = len(before) + rng.randrange(len(line) + 50)
        code = in_child(limited(size, path, lambda p: files.append_line(p, line)))
        right = code in (0, 3) and path.read_bytes() == (before + line if code == 0 else before)
        outcome = "written" if code == 0 else "error with the name, half line taken back"
        RESULTS.note("disk full while a record is added", outcome, "" if right else f"code {code}")


def attack_by_kills(rng, folder, tries):
    policy = load_policy(SHIPPED)
    versions = {dumps_policy(policy.model_copy(update={"default_reason": str(n)})).encode() for n in range(20)}
    path = folder / "killed.json"

    def write_for_ever():
        for content in versions:
            files.write_whole(path, content)
        while True:
            files.write_whole(path, rng.choice(tuple(versions)))

    files.write_whole(path, next(iter(versions)))
    for _ in range(round(200 * tries)):
        pid = os.fork()
        if pid == 0:
            try:
                write_for_ever()
            finally:
                os._exit(1)
        time.sleep(rng.uniform(0, 0.02))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        RESULTS.note("killed while a file is written", "whole file", "" if path.read_bytes() in versions else "torn")


def attack_sweeps(rng, folder, tries):
    """Sweeps that are killed and go on, by the driver of the tests; they measure what one sweep measures."""
    driver = Path(__file__).with_name("sweep_driver.py")
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{driver.parent}"}

    def run(path, *arguments):
        command = [sys.executable, str(driver), str(path), *map(str, arguments)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        return done.returncode, done.stderr

    whole = folder / "whole" / "records.jsonl"
    run(whole, 0, 0)
    wanted = [record.key for record in read_records(whole)]
    kills = 16
    for number in range(max(1, round(6 * tries))):
        path = folder / f"sweep{number}" / "records.jsonl"
        code, said = run(path, kills, rng.randrange(2**30), len(wanted))
        right = code == 0 and [record.key for record in read_records(path)] == wanted
        for _ in range(kills):
            RESULTS.note("sweep killed, and gone on with", "every record there, once", "" if right else said[-300:])


def attack_by_races(folder, tries):
    context = multiprocessing.get_context("fork")
    line = H200.read_bytes().split(b"\n", 1)[0]
    for number in range(max(1, round(10 * tries))):
        path = folder / f"race{number}"

        def add(who, path=path):
            for index in range(100):
                files.append_line(path, b"%d %d " % (who, index) + line + b"\n")

        workers = [context.Process(target=add, args=(who,)) for who in range(4)]
        [worker.start() for worker in workers]
        [worker.join() for worker in workers]
        found = sorted(path.read_bytes().splitlines())
        wanted = sorted(b"%d %d " % (who, index) + line for who in range(4) for index in range(100))
        for _ in range(400):
            RESULTS.note("4 processes add to one file", "every line there, whole", "" if found == wanted else "lost")
    lock = folder / "lock"
    inside = folder / "inside"

    def hold(who):
        for _ in range(200):
            with files.locked(lock) as had:
                if had:
                    try:
                        os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
                    except FileExistsError:
                        os._exit(1)
                    os.unlink(inside)

    workers = [context.Process(target=hold, args=(who,)) for who in range(4)]
    [worker.start() for worker in workers]
    [worker.join() for worker in workers]
    for worker in workers:
        for _ in range(200):
            RESULTS.note("4 processes want one lock", "held by one at most", "two had it" if worker.exitcode else "")


# ---- The command line ----


def attack_commands(rng, folder, tries):
    """Commands on files that try to speak to the terminal, and outputs that are inputs."""
    nasty = ["\x1b[2J\x1b]0;title\x07", "\r\x1b[1A", "\u202egpj.exe", "\x9b31m", "\udcff", "\x00", "[red]x[/]", "\\["]
    policy = json.loads(SHIPPED.read_text())
    lines = [json.loads(line) for line in H200.read_bytes().splitlines()[:60]]
    for number in range(round(60 * tries)):
        spoiled = json.loads(json.dumps(policy))
        text = "".join(rng.sample(nasty, 3))
        for regime in spoiled["regimes"]:
            regime["reason"] += text
        spoiled["default_reason"] += text
        spoiled["environment"]["torch"] = text
        spoiled["environment"][text] = "x"
        bad = folder / f"policy{number}.json"
        bad.write_bytes(
            json.dumps(spoiled).encode() if rng.random() < 0.7 else json.dumps({**spoiled, text: 1}).encode()
        )
        records = folder / f"records{number}.jsonl"
        with open(records, "w") as file:
            for line in lines:
                line = dict(line, environment=line["environment"] | {"gpu": text.replace("\udcff", "")})
                if rng.random() < 0.1:
                    line |= {"status": "failed", "reason": text.replace("\udcff", "") or "x"}
                    line.pop("latency_us", None)
                file.write(json.dumps(line) + "\n")
        odd = Path(os.fsdecode(os.fsencode(folder) + b"/\xff\x1b[2J%d.jsonl" % number))
        shutil.copy(records, odd)
        commands = [
            ["explain", "--policy", bad],
            ["explain", "--policy", bad, "--num-tokens", "7", *rng.choice([[], ["--json"]])],
            ["verify", bad],
            ["learn", records, "--timing", "cuda_graph", "-o", folder / f"out{number}.json"],
            ["learn", odd, "--timing", "eager", "-o", folder / f"odd{number}.json"],
            ["evaluate", SHIPPED, records, "--timing", "cuda_graph"],
            ["solution", "--policy", bad, "-o", folder / f"solution{number}.json"],
        ]
        for command in commands:
            result = CliRunner().invoke(app, [str(part) for part in command])
            shown = result.output
            wrong = ""
            if result.exit_code not in (0, 1, 2) or not isinstance(result.exception, SystemExit | None):
                wrong = f"{command[0]}: {result.exception!r}"
            elif found := RAW.search(shown):
                wrong = f"{command[0]} printed {found.group()!r}"
            RESULTS.note("escape sequences and odd names in files, by command", f"exit code {result.exit_code}", wrong)

    records, mine = folder / "r.jsonl", folder / "p.json"
    shutil.copy(H200, records)
    shutil.copy(SHIPPED, mine)
    for number in range(round(20 * tries)):
        for source, command in (
            (records, ["learn", records, "--timing", "cuda_graph", "-o"]),
            (records, ["report", records, "--policy", mine, "-o"]),
            (mine, ["report", records, "--policy", mine, "--png"]),
            (mine, ["solution", "--policy", mine, "-o"]),
            (mine, ["solution", "--policy", mine, "-o", folder / "x.json", "--definition"]),
        ):
            hard, soft = folder / f"hard{number}", folder / f"soft{number}"
            for link in (hard, soft):
                link.unlink(missing_ok=True)
            os.link(source, hard)
            soft.symlink_to(source)
            other = rng.choice(
                [source, hard, soft, folder / "." / source.name, folder / ".." / folder.name / source.name]
            )
            before = source.read_bytes()
            result = CliRunner().invoke(app, [str(part) for part in (*command, other)])
            wrong = "" if result.exit_code == 2 and source.read_bytes() == before else f"{command[0]} {other}"
            RESULTS.note("output that is an input, also by links", "refused, input whole", wrong)


# ---- Size ----


def attack_by_size(folder, tries):
    """Sizes that nobody needs; figures for the reader, no verdict but that it ends."""
    line = json.loads(H200.read_bytes().split(b"\n", 1)[0])
    count = round(1_000_000 * tries)
    path = folder / "million.jsonl"
    with open(path, "w") as file:
        for index in range(count):
            line |= {"num_tokens": 1 + index // 3 % 200, "seed": index // 600, "timing": "cuda_graph"}
            line["config"] = {"gemm": ("triton", "deep_gemm", "sgl_kernel")[index % 3]}
            line["latency_us"] = {"median": 10.0 + index % 97, "p10": 10.0, "p90": 110.0}
            file.write(json.dumps(line, separators=(",", ":")) + "\n")
    code = """if True:
        import sys
        from hybrid_moe.learn.learner import learn_from_files
        from hybrid_moe.policy.schema import LearnerOptions
        learn_from_files([sys.argv[1]], LearnerOptions())
    """
    timed(code, path, f"{count:,} records learned from")
    policy = json.loads(SHIPPED.read_text())
    regime = policy["regimes"][0]
    amount = round(100_000 * tries)
    evidence = regime["evidence"][:1]
    policy["regimes"] = [
        regime | {"min_tokens": t, "max_tokens": t, "evidence": [evidence[0] | {"num_tokens": t}]}
        for t in range(1, 2 * amount, 2)
    ]
    path = folder / "regimes.json"
    path.write_text(json.dumps(policy, indent=2))
    code = """if True:
        import sys
        from hybrid_moe.device import DeviceKey
        from hybrid_moe.policy.select import resolve
        from hybrid_moe.policy.store import load_policy
        policy = load_policy(sys.argv[1])
        resolve(policy, policy.problem, DeviceKey(policy.device))
    """
    timed(code, path, f"policy of {amount:,} regimes read and resolved")


def timed(code, path, kind):
    begun = resource.getrusage(resource.RUSAGE_CHILDREN)
    code += "\nprint(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    command = [sys.executable, "-c", code, str(path)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = ended.ru_utime + ended.ru_stime - begun.ru_utime - begun.ru_stime
    peak = int(done.stdout or 0) // 1024
    size = path.stat().st_size / 1e6
    wrong = "" if done.returncode == 0 else done.stderr[-300:]
    RESULTS.note(f"{kind} ({size:.0f} MB)", f"{spent:.0f} s of processor time, {peak} MB at most:", wrong)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tries", type=float, default=1.0, help="share of the usual number of tries")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="part of the names of the attacks to make")
    options = parser.parse_args()
    begun = time.monotonic()
    attacks = {
        "contents": lambda rng, folder: attack_contents(rng, folder, options.tries),
        "strange": lambda rng, folder: attack_strange_files(folder / "strange", options.tries),
        "stray": lambda rng, folder: attack_policy_folder(rng, folder, options.tries),
        "targets": lambda rng, folder: attack_targets(rng, folder, options.tries),
        "journals": lambda rng, folder: attack_journals(rng, folder, options.tries),
        "full": lambda rng, folder: attack_full_disk(rng, folder, options.tries),
        "kills": lambda rng, folder: attack_by_kills(rng, folder, options.tries),
        "sweeps": lambda rng, folder: attack_sweeps(rng, folder, options.tries),
        "races": lambda rng, folder: attack_by_races(folder, options.tries),
        "commands": lambda rng, folder: attack_commands(rng, folder, options.tries),
        "size": lambda rng, folder: attack_by_size(folder, options.tries),
    }
    for name, attack in attacks.items():
        if options.only and options.only not in name:
            continue
        with tempfile.TemporaryDirectory() as folder:
            os.environ["XDG_DATA_HOME"] = folder + "/user_data"
            attack(random.Random(f"{name} {options.seed}"), Path(folder))
        print(f"{name}: {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
    print(RESULTS.table())
    tries = sum(count for o in RESULTS.outcomes.values() for name, count in o.items() if name != "WRONG")
    print(f"\n{tries:,} tries, {len(RESULTS.wrong)} wrong; seed {options.seed}.")
    for wrong in RESULTS.wrong[:50]:
        print("WRONG", ascii(wrong)[:600], file=sys.stderr)
    sys.exit(bool(RESULTS.wrong))


if __name__ == "__main__":
    main()
