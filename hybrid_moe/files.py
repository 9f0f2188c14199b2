"""Files: written whole or not at all and never over what isn't ours, read within bounds.

Every file that the package writes or takes from a user goes through here. What is refused is a ValueError, what the
system refuses an OSError; both name the file.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

# Largest JSON document that is read at once, in bytes: 100,000 regimes are a quarter of it.
LARGEST_DOCUMENT = 128 * 2**20
# Largest file of lines and longest line of it: a million records are 1 GB, the log in a trace may be long.
LARGEST_LINES, LONGEST_LINE = 8 * 2**30, 16 * 2**20

# Of a whole number: no count, size or seed has more.
_MOST_DIGITS = 300
# As long as another process may take to add a line.
_LOCK_LIMIT_S = 30.0
# How much of a file says whose it is.
_HEAD = 4096


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of file that this package writes, known by its beginning.

    Parameters
    ----------
    name
        For people, as ``a policy``.
    beginning
        Pattern that the first bytes of such a file match.
    """

    name: str
    beginning: re.Pattern[bytes]


# A record has its problem's name where a policy has an object.
_POLICY = rb'(\xef\xbb\xbf)?\s*\{\s*"schema_version"\s*:\s*\d+\s*,\s*"device"\s*:\s*"\w*"\s*,\s*"problem"\s*:\s*\{'
POLICY = Kind("a policy", re.compile(_POLICY))
SOLUTION = Kind("a Solution", re.compile(rb'\s*\{\s*"name"\s*:\s*"[^"]*"\s*,\s*"definition"\s*:'))
DEFINITION = Kind("a Definition", re.compile(rb'\s*\{\s*"name"\s*:\s*"[^"]*"\s*,\s*"op_type"\s*:'))
PAGE = Kind("a report of hybrid_moe", re.compile(rb"<!DOCTYPE html>\s(?s:.*?)<title>hybrid_moe on "))
RECORDS = Kind("a file of records", re.compile(rb'(\xef\xbb\xbf)?\s*(\{\s*"|$)'))
PICTURE = Kind("a PNG picture", re.compile(rb"\x89PNG\r\n\x1a\n"))


# ---- Writing ----


def write_whole(path: str | Path, content: bytes, kind: Kind | None = None) -> None:
    """Write a file so that nobody ever sees a part of it; makes the folders that are missing.

    A symbolic link stays, and what it points to is written; so do mode and owner of a file that is replaced. Terminals,
    pipes and ``/dev/null`` are written into.

    Parameters
    ----------
    path, content
        What is written, and where.
    kind
        What may be there already and be replaced; `None`: any file.

    Raises
    ------
    ValueError
        Something else is there, see `check_target`.
    OSError
        It can't be written; what was there before is left as it was.
    """
    path = Path(path)
    there = check_target(path, kind)
    if there is not None and not stat.S_ISREG(there.st_mode):
        _write_into(path, content)
        return
    target = Path(os.path.realpath(path))
    # In the same folder, as a rename is atomic only within one file system. The suffix keeps it from scans for *.json;
    # the name is short, as the target's may be as long as names can be.
    temporary = target.with_name(f".hybrid_moe-{secrets.token_hex(6)}.tmp")
    with _named(path):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            # Nobody else may read it before it has the mode of what it replaces.
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666 if there is None else 0o600)
            with open(descriptor, "wb") as file:
                if there is not None:
                    _keep_owner_and_mode(descriptor, there)
                file.write(content)
                file.flush()
                os.fsync(descriptor)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(target.parent)


def check_target(path: str | Path, kind: Kind | None = None) -> os.stat_result | None:
    """Look at what is where a file is to be written; before long work, so that it isn't done in vain.

    Returns
    -------
    os.stat_result
        Of what is there; `None` if there is nothing yet.

    Raises
    ------
    ValueError
        There is a folder, a socket or a disk; or a file that isn't of ``kind``, or that is one of the process's own
        output streams.
    OSError
        It is write-protected, or can't be looked at.
    """
    path = Path(path)
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return None
    mode = there.st_mode
    if stat.S_ISDIR(mode):
        raise ValueError(f"{path}: expected a file name, got a folder")
    if stat.S_ISCHR(mode) or stat.S_ISFIFO(mode):
        return there
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path}: expected a file, got {kind_of(mode)}")
    if not mode & 0o222:
        raise PermissionError(errno.EACCES, "write-protected (its mode has no write bit)", str(path))
    if any(_is_stream(descriptor, there) for descriptor in (1, 2)):
        raise ValueError(f"{path}: expected another file than this command's own output")
    if kind is not None and there.st_size:
        with open_regular(path) as file:
            head = file.read(_HEAD)
        if kind.beginning.match(head) is None:
            raise ValueError(
                f"{path} exists and isn't {kind.name}, so it isn't replaced: name another file, or remove it"
            )
    return there


def check_outputs(outputs: Mapping[str, str | Path | None], inputs: Iterable[str | Path | None] = ()) -> None:
    """Refuse outputs that are inputs or one another, also by way of links; those that are `None` are passed over.

    Parameters
    ----------
    outputs
        Path by the option that names it, for messages.
    inputs
        Files that are read.

    Raises
    ------
    ValueError
        Two are the same; the message names the option and the file.
    """
    seen: dict[object, str] = {}
    for path in inputs:
        if path is not None:
            seen.update(dict.fromkeys(_identities(path), "read as well"))
    for option, path in outputs.items():
        if path is None:
            continue
        identities = _identities(path)
        for identity in identities:
            if identity in seen:
                raise ValueError(f"{option} is {path}, which is {seen[identity]}: name another file")
        seen.update(dict.fromkeys(identities, f"{option} as well"))


def _identities(path: str | Path) -> list[object]:
    found: list[object] = [os.path.realpath(path)]
    with contextlib.suppress(OSError):
        there = os.stat(path)
        if stat.S_ISREG(there.st_mode):  # /dev/null may be both
            return [*found, (there.st_dev, there.st_ino)]
        return []
    return found


def _is_stream(descriptor: int, there: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), there)
    except OSError:  # closed
        return False


def _keep_owner_and_mode(descriptor: int, there: os.stat_result) -> None:
    if (there.st_uid, there.st_gid) != (os.geteuid(), os.getegid()):
        with contextlib.suppress(PermissionError):  # only root may give files away
            os.fchown(descriptor, there.st_uid, there.st_gid)
    os.fchmod(descriptor, stat.S_IMODE(there.st_mode))


def _write_into(path: Path, content: bytes) -> None:
    with _named(path):
        try:
            # Without waiting for a reader of a FIFO that nobody reads.
            descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
        except OSError as error:
            if error.errno == errno.ENXIO:
                raise OSError(errno.ENXIO, "a FIFO or device that nothing reads from", str(path)) from None
            raise
        os.set_blocking(descriptor, True)
        with open(descriptor, "wb") as file:
            file.write(content)


def _sync_folder(folder: Path) -> None:
    # The new name is on the disk only with its folder; some file systems can't sync one.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Put the file's name into errors that lack it (a full disk), or have that of a temporary file."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise type(error)(error.errno, error.strerror, str(path)) from error


# ---- Adding to a file, and locking it ----


def append_line(path: str | Path, line: bytes, kind: Kind | None = None) -> None:
    """Add one whole line to a file of lines in one write, and wait until it is on the disk; makes missing folders.

    Several processes may add to one file: each holds a lock on it meanwhile.

    Parameters
    ----------
    path, line
        What is added, with its newline, and where.
    kind
        What may be there already; `None`: any file.

    Raises
    ------
    ValueError
        The file isn't of ``kind``, ends in the middle of a line, or is no regular file.
    OSError
        It can't be written, and what was written of the line is taken back; or another process has held it for long.
    """
    path = Path(path)
    with _named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Unbuffered: one write is one line, so that others who read the file see few half ones.
        with open(_open_regular(path, os.O_RDWR | os.O_APPEND | os.O_CREAT), "r+b", buffering=0) as file:
            _wait_for_lock(file.fileno(), path)
            end = file.seek(0, os.SEEK_END)
            if end:
                file.seek(0)
                if kind is not None and kind.beginning.match(file.read(_HEAD)) is None:
                    raise ValueError(f"{path} exists and isn't {kind.name}: name another file")
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    raise ValueError(f"{path} ends in the middle of a line: delete its last line first")
            written = file.write(line)
            if written != len(line):
                file.truncate(end)  # half a line would stop whoever reads the file
                raise OSError(errno.ENOSPC, f"took {written} of {len(line)} bytes; is the disk full?", str(path))
            os.fsync(file.fileno())


def _wait_for_lock(descriptor: int, path: Path) -> None:
    end = time.monotonic() + _LOCK_LIMIT_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                raise OSError(errno.EAGAIN, f"another process has held it for {_LOCK_LIMIT_S:g} s", str(path)) from None
            time.sleep(0.001)
        except OSError:  # a file system without locks
            return
        else:
            return


@contextlib.contextmanager
def locked(path: str | Path) -> Iterator[bool]:
    """Hold a lock file; gives whether it could be had. The system gives it back however the process ends.

    The file stays, as to remove it would be a race; nothing is written into it.

    Raises
    ------
    ValueError, OSError
        Something else than a file of one's own is there, as a symbolic link.
    """
    path = Path(path)
    with _named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _open_regular(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def open_log(path: str | Path) -> int:
    """A descriptor that adds to a log file, made if there is none; links are not followed.

    Raises
    ------
    ValueError, OSError
        Something else is there, as a symbolic link or a FIFO.
    """
    path = Path(path)
    with _named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        return _open_regular(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW)


# ---- Reading ----


def kind_of(mode: int) -> str:
    """What a file of this ``st_mode`` is, for people."""
    kinds = {
        stat.S_IFREG: "a regular file",
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a FIFO or pipe",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a disk",
        stat.S_IFSOCK: "a socket",
    }
    return kinds.get(stat.S_IFMT(mode), "no regular file")


def _open_regular(path: Path, flags: int) -> int:
    # Non-blocking: the open itself of a FIFO would wait for its other end.
    try:
        descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP and flags & os.O_NOFOLLOW:
            raise ValueError(f"{path}: expected a file of its own, got a symbolic link") from None
        if error.errno == errno.ENXIO:  # a FIFO to write to, or a socket
            raise ValueError(f"{path}: expected a regular file, got a FIFO, pipe or socket") from None
        if error.errno == errno.EISDIR:
            raise ValueError(f"{path}: expected a file, got a folder") from None
        raise
    except ValueError as error:  # a NUL in the name
        raise ValueError(f"{str(path)!r} is no file name: {error}") from None
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            raise ValueError(f"{path}: expected a regular file, got {kind_of(mode)}")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def open_regular(path: str | Path) -> BinaryIO:
    """A regular file to read; folders, pipes and devices are refused at once.

    Raises
    ------
    ValueError
        It is no regular file.
    OSError
        It can't be opened.
    """
    path = Path(path)
    with _named(path):
        return open(_open_regular(path, os.O_RDONLY), "rb")


def read_whole(path: str | Path, largest: int = LARGEST_DOCUMENT) -> bytes:
    """All bytes of a regular file that has at most ``largest``.

    Raises
    ------
    ValueError
        It is no regular file, or larger.
    OSError
        It can't be read.
    """
    with _named(Path(path)), open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size <= largest:
            content = file.read(largest + 1)  # files of /proc say that they are empty, others may grow
            if len(content) <= largest:
                return content
        _too_large(path, max(size, largest + 1), largest)


def sha256_of(path: str | Path) -> str:
    """Digest of a regular file of any size; raises as `open_regular`."""
    with _named(Path(path)), open_regular(path) as file:
        digest = hashlib.sha256()
        while piece := file.read(2**20):
            digest.update(piece)
        return digest.hexdigest()


def read_tail(path: str | Path, most: int = 2**14) -> bytes:
    """The last ``most`` bytes of a regular file; raises as `read_whole`."""
    with _named(Path(path)), open_regular(path) as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - most))
        return file.read(most)


def _too_large(path: str | Path, size: int, largest: int) -> NoReturn:
    raise ValueError(f"{path}: expected at most {largest:,} bytes, got {size:,} or more")


class Lines:
    """The lines of a file with their numbers from 1, without their newlines, and a digest of all bytes read.

    Attributes
    ----------
    complete
        Whether the last line so far had its newline.
    """

    def __init__(self, path: str | Path, largest: int = LARGEST_LINES, longest: int = LONGEST_LINE) -> None:
        self._path, self._largest, self._longest = Path(path), largest, longest
        self._digest = hashlib.sha256()
        self.complete = True

    @property
    def sha256(self) -> str:
        """Of the file, when it has been read to its end."""
        return self._digest.hexdigest()

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        with _named(self._path), open_regular(self._path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > self._largest:
                _too_large(self._path, size, self._largest)
            number = read = 0
            while line := file.readline(self._longest + 1):
                number, read = number + 1, read + len(line)
                if len(line) > self._longest:
                    raise ValueError(f"{self._path}, line {number} has more than {self._longest:,} bytes")
                if read > self._largest:
                    _too_large(self._path, read, self._largest)
                self._digest.update(line)
                self.complete = line.endswith(b"\n")
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")  # a byte order mark
                yield number, line[:-1] if self.complete else line


# ---- JSON ----


def decode(content: bytes) -> str:
    """UTF-8 with or without a byte order mark; ValueError that names the line of what isn't."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"isn't UTF-8 (byte 0x{content[error.start]:02x} in line {line})") from None


def parse_json(text: str) -> Any:
    """The value of a JSON document, read strictly.

    Raises
    ------
    ValueError
        It is no JSON, has a key twice in one object, a number with thousands of digits, or is nested too deeply.
    """
    try:
        return json.loads(text, object_pairs_hook=_object, parse_int=_whole_number)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"isn't whole JSON ({error.msg}, line {error.lineno} column {error.colno} of {len(text)} characters)"
        ) from error
    except RecursionError:
        raise ValueError("is nested too deeply") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"has the key {twice!r} twice in one object")
    return found


def _whole_number(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise ValueError(f"has a number of {len(text)} digits; expected at most {_MOST_DIGITS}")
    return int(text)
