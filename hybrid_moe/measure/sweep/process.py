"""The process that measures: what a backend breaks there, it doesn't break here.

A backend may hang, crash its process, or leave the CUDA context unusable. So everything that touches the GPU happens in
a process of its own, which sends each finished record over a pipe (its output goes to a log file, as libraries print
what they like). The sweep ends it where it takes too long, and starts another.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkContext, SpawnContext
from pathlib import Path
from types import TracebackType
from typing import Protocol

from ...candidate import Candidate
from ...files import open_log, read_tail
from ...policy.schema import GraphOrEager
from ...text import describe_exception, printable
from ..records import BenchRecord, EnvironmentValue
from ..workloads import Workload
from .plan import Job

# Imports of torch and of a library from a slow disk; weights, inputs and reference of the largest workload.
START_LIMIT_S, LOAD_LIMIT_S = 300.0, 600.0
_CLOSE_LIMIT_S = 10.0
_LOOK_S = 0.1  # how often it is looked whether the process still lives
_PR_SET_PDEATHSIG = 1


class SweepError(RuntimeError):
    """Nothing can be measured, whatever the candidate; the message says what happened and where the log is."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Where it is measured.

    Attributes
    ----------
    device
        Slug of the device's product name.
    environment
        What has to be the same for all records of a sweep, as versions.
    """

    device: str
    environment: Mapping[str, EnvironmentValue]


class Bench(Protocol):
    """What measures, inside the process. Pickled to get there, so it makes its tensors when first asked."""

    def identify(self) -> Identity:
        """Say where it runs; takes little time and memory."""

    def load(self, workload: Workload) -> None:
        """Make a workload ready for `measure`; the one before isn't needed any more."""

    def measure(self, choice: Candidate, timings: Sequence[GraphOrEager]) -> Iterator[BenchRecord]:
        """Check one candidate on the loaded workload and time it: one record for each of ``timings``, in order."""

    def usable(self) -> bool:
        """Whether it can still measure after `measure` raised."""


class CandidateLost(Exception):
    """A candidate gave no more records: it raised, crashed or hung.

    Attributes
    ----------
    reason
        What happened.
    timeout, crashed
        Whether it hung, or took its process along; neither if it only raised.
    """

    def __init__(self, reason: str, *, timeout: bool = False, crashed: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.timeout, self.crashed = reason, timeout, crashed


@dataclass(frozen=True, slots=True)
class _Loaded:
    pass


@dataclass(frozen=True, slots=True)
class _Done:
    pass


@dataclass(frozen=True, slots=True)
class _Raised:
    reason: str
    usable: bool


def _serve(bench: Bench, connection: Connection, log: Path) -> None:
    """The process itself: jobs come in, records go out, until ``None`` comes or the other end is closed."""
    os.setpgid(0, 0)  # so that what it starts can be ended with it
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of the terminal; the parent decides
    _output_to(log)
    connection.send(bench.identify())
    loaded: Workload | None = None
    while (job := connection.recv()) is not None:
        if job.workload != loaded:
            bench.load(job.workload)
            loaded = job.workload
        connection.send(_Loaded())
        try:
            for record in bench.measure(job.choice, job.timings):
                connection.send(record)
        # Whatever a backend raises costs that backend its record and no more; the log has where it came from.
        except Exception as error:
            traceback.print_exc()
            raised = _Raised(describe_exception(error), bench.usable())
            connection.send(raised)
            if not raised.usable:
                return
        else:
            connection.send(_Done())


def _die_with_parent() -> None:
    # A process that outlived a killed sweep would disturb the timing of the next one. By the kernel (Linux), as a hung
    # backend runs no Python. What counts is the thread that started this process: the parent's main thread.
    parent = multiprocessing.parent_process()
    if sys.platform == "linux" and parent is not None:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent.pid:
            os._exit(1)


def _output_to(log: Path) -> None:
    # The descriptors themselves: libraries and compilers don't print through Python.
    descriptor = open_log(log)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = sys.stderr = open(descriptor, "w", buffering=1, encoding="utf-8", errors="replace")
    faulthandler.enable()  # where a crash in C code came from


class Worker(AbstractContextManager["Worker"]):
    """The measuring process as the sweep sees it; started when it is needed, and again after it was lost.

    Parameters
    ----------
    bench
        What measures.
    log
        File that its output is added to.
    context
        How the process is started; ``spawn`` by default, as CUDA doesn't survive a fork.
    """

    def __init__(self, bench: Bench, log: Path, context: SpawnContext | ForkContext | None = None) -> None:
        self._bench, self._log = bench, log
        self._context = context or multiprocessing.get_context("spawn")
        self._process: multiprocessing.process.BaseProcess | None = None
        self._connection: Connection | None = None
        self._measured = 0  # jobs of this process

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def identify(self) -> Identity:
        """Start the process again and ask it where it runs.

        Raises
        ------
        SweepError
            It ended, or said nothing in time.
        """
        self.close()
        self._log.parent.mkdir(parents=True, exist_ok=True)
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(self._bench, theirs, self._log), daemon=True)
        process.start()
        theirs.close()
        self._process, self._connection, self._measured = process, ours, 0
        try:
            identity = self._receive(START_LIMIT_S)
        except CandidateLost as lost:
            raise SweepError(self._explain("the measuring process didn't start", lost)) from lost
        assert isinstance(identity, Identity)
        return identity

    def measure(self, job: Job, limit_s: float) -> Iterator[BenchRecord]:
        """Yield the records of a job as they come.

        Parameters
        ----------
        job
            What to measure.
        limit_s
            Seconds that may pass before each record. Making the workload ready has a limit of its own.

        Raises
        ------
        CandidateLost
            The candidate gives no more records; what it gave before stands.
        SweepError
            The workload can't be made ready, in a fresh process either.
        """
        self._load(job)
        self._measured += 1
        while True:
            message = self._receive(limit_s)
            if isinstance(message, BenchRecord):
                yield message
            elif isinstance(message, _Raised):
                if not message.usable:
                    self.close()
                raise CandidateLost(message.reason, crashed=not message.usable)
            else:
                assert isinstance(message, _Done)
                return

    def _load(self, job: Job) -> None:
        while True:
            if self._process is None:
                self.identify()
            try:
                self._send(job)
                message = self._receive(LOAD_LIMIT_S)
            except CandidateLost as lost:
                # It may be what an earlier candidate left behind; a fresh process has no such excuse.
                if self._measured:
                    continue
                what = f"the workload {job.workload.routing} with T = {job.workload.num_tokens} can't be made ready"
                raise SweepError(self._explain(what, lost)) from lost
            assert isinstance(message, _Loaded)
            return

    def _send(self, job: Job) -> None:
        assert self._connection is not None
        try:
            self._connection.send(job)
        except OSError as error:
            raise self._crash() from error

    def _receive(self, limit_s: float) -> object:
        """The next message; after `CandidateLost` the process is gone."""
        assert self._connection is not None and self._process is not None
        end = time.monotonic() + limit_s
        while not self._connection.poll(max(0.0, min(_LOOK_S, end - time.monotonic()))):
            # Asked of the system: processes that it started may keep its pipes open after its own end.
            if self._has_ended():
                break
            if time.monotonic() >= end:
                self.close()
                raise CandidateLost(f"no result in {limit_s:g} s: its process was ended", timeout=True)
        try:
            # What was sent before the end is still to be had; after that comes the end of file.
            if self._connection.poll():
                return self._connection.recv()
        except (EOFError, OSError) as error:
            raise self._crash() from error
        raise self._crash()

    def _has_ended(self) -> bool:
        """Whether the process has; it stays a zombie, so that its group's number isn't given to others yet."""
        assert self._process is not None and self._process.pid is not None
        try:
            return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:  # somebody else has taken its exit code
            return True

    def _end_group(self) -> None:
        """End the process and what it started, but for what made itself a group of its own."""
        assert self._process is not None and self._process.pid is not None
        with contextlib.suppress(ChildProcessError, ProcessLookupError, PermissionError):
            # Only as long as its number is its own: after its exit code was taken, the group may be anybody's.
            os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            os.kill(self._process.pid, signal.SIGKILL)  # it may not have got to make the group yet
            os.killpg(self._process.pid, signal.SIGKILL)

    def _crash(self) -> CandidateLost:
        assert self._process is not None
        # The end of the pipe comes a moment before that of the process, whose own code is wanted.
        end = time.monotonic() + _CLOSE_LIMIT_S
        while not self._has_ended() and time.monotonic() < end:
            time.sleep(0.001)
        self._end_group()
        self._process.join(_CLOSE_LIMIT_S)
        code = self._process.exitcode
        self.close()
        if code is not None and code < 0:
            return CandidateLost(f"its process was ended by {_signal_name(-code)}", crashed=True)
        return CandidateLost(f"its process ended with exit code {code}", crashed=True)

    def _explain(self, what: str, lost: CandidateLost) -> str:
        try:
            lines = read_tail(self._log).decode(errors="replace").split("\n")
        except FileNotFoundError:
            lines = []
        last = printable(next((line.strip() for line in reversed(lines) if line.strip()), ""))
        return f"{what}: {lost.reason}{f' ({last})' if last else ''}; its output is in {self._log}"

    def close(self) -> None:
        """End the process and what it started, whatever they do."""
        if self._process is None or self._connection is None:
            return
        self._connection.close()
        self._end_group()
        self._process.join(_CLOSE_LIMIT_S)
        self._process = self._connection = None


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"
