"""Files: written whole, over nothing that isn't ours; read within bounds; what is in them isn't printed raw."""

import errno
import fcntl
import hashlib
import io
import json
import os
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table
from rich.text import Text

from hybrid_moe import files
from hybrid_moe.cli.common import PrintableConsole, print_json
from hybrid_moe.text import describe_exception, printable, printable_json

OLD, NEW = (b'{"schema_version": 1, "device": "%b", "problem": {}}\n' % device for device in (b"x", b"y"))


RECORDS = Path(__file__).parents[1] / "benchmarks" / "results" / "nvidia_h200" / "definition.jsonl"


def names(folder):
    return sorted(os.listdir(folder))


def mode(path):
    return stat.S_IMODE(os.stat(path).st_mode)


# ---- Writing ----


def test_new_files_have_the_mode_of_the_umask_and_folders_are_made(tmp_path):
    path = tmp_path / "a" / "b" / "new"
    before = os.umask(0o027)
    try:
        files.write_whole(path, NEW)
    finally:
        os.umask(before)
    assert path.read_bytes() == NEW and mode(path) == 0o640
    assert names(path.parent) == ["new"]


@pytest.mark.parametrize("old_mode", [0o600, 0o640, 0o644, 0o660, 0o755])
def test_the_mode_stays(tmp_path, old_mode):
    path = tmp_path / "f"
    path.write_bytes(OLD)
    path.chmod(old_mode)
    files.write_whole(path, NEW, files.POLICY)
    assert path.read_bytes() == NEW and mode(path) == old_mode


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_the_owner_stays(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(OLD)
    os.chown(path, 1234, 2345)
    path.chmod(0o640)
    files.write_whole(path, NEW)
    found = os.stat(path)
    assert (found.st_uid, found.st_gid, mode(path)) == (1234, 2345, 0o640)


def test_a_link_stays_and_its_target_is_written(tmp_path):
    (tmp_path / "real").mkdir()
    target, link = tmp_path / "real" / "f", tmp_path / "link"
    target.write_bytes(OLD)
    target.chmod(0o600)
    link.symlink_to(target)
    files.write_whole(link, NEW)
    assert link.is_symlink() and target.read_bytes() == NEW and mode(target) == 0o600
    target.unlink()
    files.write_whole(link, OLD)  # dangling
    assert link.is_symlink() and target.read_bytes() == OLD
    assert names(tmp_path / "real") == ["f"]


def test_a_loop_of_links_is_an_error_with_the_name(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError) as refused:
        files.write_whole(tmp_path / "a", NEW)
    assert refused.value.filename == str(tmp_path / "a") and names(tmp_path) == ["a", "b"]


def test_devices_are_written_into():
    before = os.stat("/dev/null")
    files.write_whole("/dev/null", NEW, files.POLICY)
    after = os.stat("/dev/null")
    assert stat.S_ISCHR(after.st_mode) and before.st_ino == after.st_ino


def test_a_full_device_is_an_error_with_its_name():
    with pytest.raises(OSError) as refused:
        files.write_whole("/dev/full", NEW)
    assert (refused.value.errno, refused.value.filename) == (errno.ENOSPC, "/dev/full")


def test_fifos_are_written_into_and_nobody_waits_for_a_reader(tmp_path):
    path = tmp_path / "fifo"
    os.mkfifo(path)
    with pytest.raises(OSError, match="nothing reads from"):
        files.write_whole(path, NEW)
    got = []
    reader = threading.Thread(target=lambda: got.append(path.read_bytes()))
    reader.start()
    content = NEW * 10_000  # more than a pipe holds
    end = time.monotonic() + 10
    while time.monotonic() < end:
        try:
            files.write_whole(path, content)
            break
        except OSError:  # the reader isn't there yet
            time.sleep(0.01)
    reader.join(10)
    assert got == [content] and stat.S_ISFIFO(os.stat(path).st_mode)


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        (files.POLICY, b"\x89PNG\r\n\x1a\n..."),
        (files.POLICY, b'{"a": 1}'),
        (files.POLICY, b'{"schema_version":1,"backend":"x"}\n'),
        (files.POLICY, RECORDS.read_bytes()),
        (files.POLICY, b"\0" * 10_000),
        (files.SOLUTION, OLD),
        (files.DEFINITION, b'{"name": "x", "version": "1.0"}'),
        (files.PAGE, b"<!DOCTYPE html>\n<title>my page</title> about hybrid_moe"),
        (files.PICTURE, b"GIF89a"),
    ],
)
def test_what_is_not_ours_is_not_replaced(tmp_path, kind, content):
    path = tmp_path / "f"
    path.write_bytes(content)
    before = os.stat(path)
    for check in (lambda: files.check_target(path, kind), lambda: files.write_whole(path, NEW, kind)):
        with pytest.raises(ValueError, match=f"f exists and isn't {kind.name}"):
            check()
    assert path.read_bytes() == content and os.stat(path).st_mtime_ns == before.st_mtime_ns
    assert names(tmp_path) == ["f"]


@pytest.mark.parametrize(
    "content", [b"", OLD, b"\xef\xbb\xbf" + OLD, b' {\n\n "schema_version" : 2, "device": "d",\n"problem":{']
)
def test_empty_files_and_policies_are_replaced(tmp_path, content):
    path = tmp_path / "f"
    path.write_bytes(content)
    files.write_whole(path, NEW, files.POLICY)
    assert path.read_bytes() == NEW


def test_write_protected_files_and_folders_are_refused(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(OLD)
    path.chmod(0o444)
    with pytest.raises(PermissionError, match="write-protected"):
        files.write_whole(path, NEW)
    with pytest.raises(ValueError, match="got a folder"):
        files.write_whole(tmp_path, NEW)
    with pytest.raises(OSError) as refused:
        files.write_whole(path / "below", NEW)
    assert refused.value.filename == str(path / "below")
    assert path.read_bytes() == OLD and names(tmp_path) == ["f"]


def test_names_as_long_as_names_can_be(tmp_path):
    path = tmp_path / ("n" * 255)
    files.write_whole(path, OLD)
    files.write_whole(path, NEW)
    assert path.read_bytes() == NEW
    with pytest.raises(OSError) as refused:
        files.write_whole(tmp_path / ("n" * 256), NEW)
    assert refused.value.errno == errno.ENAMETOOLONG and "nnnn" in str(refused.value)


def test_names_that_are_not_utf_8(tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe"))
    files.write_whole(path, NEW)
    assert files.read_whole(path) == NEW
    with pytest.raises(ValueError) as refused:
        files.write_whole(path, NEW, files.PICTURE)
    printable(str(refused.value)).encode()


@pytest.mark.parametrize("failing", ["fsync", "replace", "fchmod"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, failing):
    path = tmp_path / "f"
    path.write_bytes(OLD)

    def fail(*_arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError) as refused:
        files.write_whole(path, NEW)
    assert refused.value.filename == str(path)
    assert path.read_bytes() == OLD and names(tmp_path) == ["f"]


def test_the_own_output_is_not_replaced(tmp_path):
    code = "from hybrid_moe import files; files.write_whole('out', b'x')"
    with open(tmp_path / "out", "wb") as out:
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            stdout=out,
            stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        )
    assert done.returncode == 1 and b"own output" in done.stderr
    assert (tmp_path / "out").read_bytes() == b""


def test_outputs_that_are_inputs_are_refused_by_any_name(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_bytes(OLD)
    (tmp_path / "soft").symlink_to(path)
    os.link(path, tmp_path / "hard")
    for name in ("r.jsonl", "soft", "hard", "../" + tmp_path.name + "/r.jsonl"):
        with pytest.raises(ValueError, match=r"--output is .*which is read as well"):
            files.check_outputs({"--output": tmp_path / name}, [path])
    with pytest.raises(ValueError, match=r"--png is .*which is --output as well"):
        files.check_outputs({"--output": tmp_path / "new", "--png": tmp_path / "." / "new"})
    files.check_outputs({"--output": tmp_path / "new", "--png": None}, [path, None])
    files.check_outputs({"--output": "/dev/null", "--png": "/dev/null"}, ["/dev/null"])


# ---- Adding, and locking ----


def test_half_a_line_is_taken_back(tmp_path, monkeypatch):
    path = tmp_path / "lines"
    files.append_line(path, b"first\n")

    class Short(io.FileIO):
        def write(self, line):
            return super().write(line[:3])

    monkeypatch.setattr(files, "open", lambda fd, *_args, **_kw: Short(fd, "r+"), raising=False)
    with pytest.raises(OSError, match="took 3 of 7 bytes") as refused:
        files.append_line(path, b"second\n")
    assert refused.value.filename == str(path) and path.read_bytes() == b"first\n"
    monkeypatch.undo()
    files.append_line(path, b"second\n")
    assert path.read_bytes() == b"first\nsecond\n"


def test_a_process_that_holds_the_file_is_waited_for_and_not_for_ever(tmp_path, monkeypatch):
    path = tmp_path / "lines"
    path.write_bytes(b"first\n")
    monkeypatch.setattr(files, "_LOCK_LIMIT_S", 0.2)
    with open(path, "rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(OSError, match="another process has held it") as refused:
            files.append_line(path, b"second\n")
        assert refused.value.filename == str(path)
    files.append_line(path, b"second\n")
    assert path.read_bytes() == b"first\nsecond\n"


def test_lines_are_added_to_regular_files_alone(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", Path("/dev/null"), tmp_path):
        with pytest.raises(ValueError, match="expected a"):
            files.append_line(path, b"x\n")
    (tmp_path / "torn").write_bytes(b"half")
    with pytest.raises(ValueError, match="middle of a line"):
        files.append_line(tmp_path / "torn", b"x\n")
    assert (tmp_path / "torn").read_bytes() == b"half"


def test_a_lock_does_not_follow_links_and_writes_nothing(tmp_path):
    precious = tmp_path / "precious"
    precious.write_bytes(b"data")
    lock = tmp_path / ".lock"
    lock.symlink_to(precious)
    with pytest.raises(ValueError, match="symbolic link"), files.locked(lock):
        pass
    assert precious.read_bytes() == b"data"
    lock.unlink()
    lock.write_bytes(b"not empty")
    with files.locked(lock) as had, files.locked(lock) as again:
        assert had and not again
    with files.locked(lock) as had:
        assert had
    assert lock.read_bytes() == b"not empty"
    lock.unlink()
    os.mkfifo(lock)
    with pytest.raises(ValueError, match="FIFO"), files.locked(lock):
        pass


def test_a_log_is_added_to(tmp_path):
    log = tmp_path / "log"
    for line in (b"a\n", b"b\n"):
        descriptor = files.open_log(log)
        os.write(descriptor, line)
        os.close(descriptor)
    assert log.read_bytes() == b"a\nb\n" == files.read_tail(log)
    assert files.read_tail(log, 2) == b"b\n"
    (tmp_path / "link").symlink_to(log)
    with pytest.raises(ValueError, match="symbolic link"):
        files.open_log(tmp_path / "link")


# ---- Reading ----


@pytest.mark.parametrize("read", [files.read_whole, lambda path: list(files.Lines(path))])
def test_only_regular_files_within_bounds_are_read_and_at_once(tmp_path, read):
    os.mkfifo(tmp_path / "fifo")
    with open(tmp_path / "sparse", "wb") as sparse:
        sparse.truncate(2**40)
    for path in ("/dev/zero", "/dev/null", tmp_path / "fifo", tmp_path, tmp_path / "sparse"):
        begun = time.monotonic()
        with pytest.raises(ValueError) as refused:
            read(path)
        assert str(path) in str(refused.value) and time.monotonic() - begun < 1
    for path in (tmp_path / "missing", tmp_path / "fifo" / "below"):
        with pytest.raises(OSError) as missing:
            read(path)
        assert missing.value.filename == str(path)
    with pytest.raises(ValueError, match="no file name"):
        read("a\0b")


def test_a_file_that_is_longer_than_it_says():
    # Files of /proc say that they are empty.
    assert files.read_whole("/proc/self/status").startswith(b"Name:")
    with pytest.raises(ValueError, match=r"/proc/self/status: expected at most 10 bytes, got 11 or more"):
        files.read_whole("/proc/self/status", 10)


@given(st.lists(st.binary(max_size=20).map(lambda line: line.replace(b"\n", b"")), max_size=5), st.booleans())
def test_lines(tmp_path_factory, lines, newline):
    content = b"\n".join(lines) + (b"\n" if newline else b"")
    path = tmp_path_factory.mktemp("lines") / "f"
    path.write_bytes(content)
    read = files.Lines(path)
    found = list(read)
    parts = content.split(b"\n")
    if parts[-1] == b"":
        parts.pop()
    assert [line for _, line in found] == [p.removeprefix(b"\xef\xbb\xbf") if not i else p for i, p in enumerate(parts)]
    assert [number for number, _ in found] == list(range(1, len(parts) + 1))
    assert read.complete == (not content or content.endswith(b"\n"))
    assert read.sha256 == hashlib.sha256(content).hexdigest()


def test_a_line_without_end_is_refused_by_its_number(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(b"short\n" + b"x" * 101)
    with pytest.raises(ValueError, match="f, line 2 has more than 100 bytes"):
        list(files.Lines(path, longest=100))
    with pytest.raises(ValueError, match="expected at most 50"):
        list(files.Lines(path, largest=50))


# ---- JSON ----


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "'c' twice"),
        ("{" + ", ".join(f'"{i}": 0' for i in range(100_000)) + ', "99999": 1}', "'99999' twice"),
        ("[" * 100_000, "deep"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "deep"),
        ("1" * 5000, "a number of 5000 digits"),
        ('{"a": }', "line 1 column 7"),
        ("", "whole JSON"),
    ],
)
def test_json_is_read_strictly_and_fast(text, message):
    begun = time.monotonic()
    with pytest.raises(ValueError, match=message):
        files.parse_json(text)
    assert time.monotonic() - begun < 1


def test_bytes_that_are_no_text():
    assert files.decode(b"\xef\xbb\xbf{}") == "{}"
    with pytest.raises(ValueError, match="byte 0xff in line 3"):
        files.decode(b"a\nb\n\xff")


# ---- What is shown ----

NASTY = "a\x1b[2Jb\rc\x07d\x9be\u202ef\udcffg\x00h\u2028i"


def test_printable():
    assert printable(NASTY) == r"a\x1b[2Jb\rc\x07d\x9be\u202ef\udcffg\x00h\u2028i"
    assert printable("plain\ttext\nµ≤é漢字") == "plain\ttext\nµ≤é漢字"


@given(st.text(st.characters(categories=None)))
def test_printable_can_be_encoded_and_says_the_same_again(text):
    shown = printable(text)
    shown.encode()
    assert "\x1b" not in shown and printable(shown) == shown
    assert json.loads(printable_json(json.dumps([text], ensure_ascii=False))) == [text]


def test_a_console_prints_no_escapes_of_others():
    stream = io.StringIO()
    console = PrintableConsole(file=stream, width=200, color_system=None)
    table = Table("head " + NASTY)
    table.add_row(NASTY)
    for thing in (NASTY, Text(NASTY), table):
        console.print(thing)
    shown = stream.getvalue()
    assert "\\x1b[2J" in shown and not set(shown) & {"\x1b", "\r", "\x9b", "\u202e", "\udcff", "\x00"}
    styled = io.StringIO()
    PrintableConsole(file=styled, force_terminal=True, color_system="standard").print(Text("red", style="red"))
    assert "\x1b[31m" in styled.getvalue()


def test_json_output_has_no_escapes_of_others(capsys):
    print_json({"reason": NASTY})
    shown = capsys.readouterr().out
    assert json.loads(shown) == {"reason": NASTY}
    assert not set(shown) & {"\x1b", "\r", "\x9b", "\u202e", "\udcff"}


def test_exceptions_are_described_whatever_they_are():
    class Broken(Exception):
        def __str__(self):
            raise RuntimeError("no")

    assert describe_exception(ValueError("x\udcff")) == r"ValueError: x\udcff"
    assert describe_exception(Broken()) == "Broken: (its message can't be made: RuntimeError)"
    assert len(describe_exception(ValueError("x" * 10**6))) < 2100
