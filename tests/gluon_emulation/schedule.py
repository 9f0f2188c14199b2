"""Who runs next: programs, warp groups and async copies take turns, by a seed, one at a time.

A thread of Python runs until it has to wait, or until the seed has another take over at a barrier, an atomic operation
or a copy. Kernels follow one another as on a stream with programmatic dependent launch.
"""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable, Sequence
from typing import Any

from .memory import Barrier, Descriptor, GlobalMemory, Pointer, Shared, Store, gather, poison
from .values import EmulationError

STAY = 0.6  # how often a warp group goes on where another might
FLUSH = 0.02  # how often a store is visible before it has to be
RESIDENT = 16  # programs of a kernel that run at once
MOST_OPERATIONS = 3_000_000
# (what, task) -> whether it is to happen as late as possible. What: "atomic x_ptr[3]", or "arrive", "copy", "load",
# "store", "product", "start" or "end".
Delay = Callable[[str, "Task"], bool]
_thread = threading.local()


class Hang(EmulationError):
    """Nothing can run any more."""


class _Abandoned(BaseException):
    """Ends a thread after another one has failed."""


def current_task() -> Task:
    """Which runs."""
    return _thread.task


class KernelRun:
    """A launched kernel; ``body`` runs one program."""

    def __init__(
        self,
        number: int,
        name: str,
        grid: tuple[int, ...],
        body: Callable[[], None],
        threads: int,
        only: Sequence[tuple[int, ...]] = (),
    ) -> None:
        self.number, self.name, self.body, self.threads = number, name, body, threads
        self.grid = (*grid, 1, 1)[:3]
        indices = only or list(itertools.product(*map(range, grid[::-1])))
        self.programs = len(indices)
        self.released = self.ended = 0
        self.to_come = iter(only or [index[::-1] for index in indices])

    @property
    def complete(self) -> bool:
        """Whether all programs have ended."""
        return self.ended == self.programs


class Program:
    """One of a kernel's."""

    def __init__(self, number: int, kernel: KernelRun, index: tuple[int, ...]) -> None:
        self.number, self.kernel, self.index = number, kernel, index
        self.released = False
        self.copies = 0

    def __str__(self) -> str:
        return f"{self.kernel.name}{list(self.index)}"

    def release(self) -> bool:
        """Let the next kernel start; whether this was the last program that had to."""
        first, self.released = not self.released, True
        self.kernel.released += first
        return first and self.kernel.released == self.kernel.programs


class Task:
    """A warp group of a program; what it has stored, multiplied and seen."""

    def __init__(self, program: Program, part: str, body: Callable[[], None], threads: int, machine: Machine) -> None:
        self.program, self.part, self.body, self.threads, self.machine = program, part, body, threads, machine
        self.weight = 10.0 ** machine.random.uniform(-2, 0)
        self.lock = threading.Lock()
        self.lock.acquire()
        self.thread: threading.Thread | None = None
        self.ready: Callable[[], bool] | None = None
        self.reason = ""
        self.held = self.done = False
        self.stores: list[Store] = []
        self.products: list[Any] = []
        self.rows: list[Copy] = []  # copies by threads that no barrier waits for yet
        self.seen = self.seen_by_tma = self.fenced = 0
        self.polled: Any = None

    def __str__(self) -> str:
        return f"{self.program} {self.part}".rstrip()

    def wait(self, ready: Callable[[], bool], reason: str) -> None:
        """Until it is ready."""
        self.machine.wait(self, ready, reason)

    def pause(self, what: str) -> None:
        """Others may run before what comes now."""
        self.machine.pause(self, what)

    def see_everything(self) -> None:
        """All that is visible by now, TMA too."""
        self.seen = self.seen_by_tma = self.machine.memory.now

    def publish(self) -> None:
        """A release: what a barrier has joined is visible from now on."""
        for store in [store for store in self.stores if store.joined]:
            self.stores.remove(store)
            self.machine.memory.flush(store)


class Copy:
    """An async copy into shared memory, under way."""

    def __init__(self, task: Task, target: Shared, source: Callable[[], Any], barrier: Barrier | None) -> None:
        target.check_writable(task)
        poison(target.data)
        target.writing += 1
        self.task, self.target, self.source, self.barrier = task, target, source, barrier
        self.weight = 10.0 ** task.machine.random.uniform(-2, 0)
        self.then: list[Callable[[], None]] = []
        self.held = task.machine.delays("copy", task)
        self.done = False
        task.program.copies += 1
        task.machine.copies.append(self)

    def complete(self) -> None:
        """Its bytes are there."""
        self.done = True
        self.task.machine.copies.remove(self)
        self.task.program.copies -= 1
        self.target.writing -= 1
        self.target.data.copy_(self.source())
        if self.barrier is not None:
            self.target.stored_at.zero_()
            self.barrier.receive(self.target.data.numel() * self.target.dtype.itemsize)
        else:  # by the threads' own stores
            self.task.machine.memory.now += 1
            self.target.stored_at.fill_(self.task.machine.memory.now)
        for function in self.then:
            function()


def copy_tile(task: Task, descriptor: Descriptor, start: Sequence[int], barrier: Barrier, target: Shared) -> None:
    """By TMA."""
    if target.shape != descriptor.block_shape or target.dtype != descriptor.region.dtype:
        raise EmulationError(f"{target} is {target.shape}, a block of the descriptor {descriptor.block_shape}")
    seen = task.seen_by_tma
    Copy(task, target, lambda: descriptor.read(start, seen), barrier)


def copy_rows(task: Task, target: Shared, pointer: Pointer, mask: Any) -> None:
    """By cp.async: zeros where masked off."""
    if pointer.shape != target.shape or pointer.region.dtype != target.dtype:
        raise EmulationError(f"{target} is {target.shape}, the pointers to be copied {pointer.shape}")
    seen = task.seen
    copy = Copy(task, target, lambda: gather(pointer, mask, 0.0, seen, task.program.number), None)
    task.rows.append(copy)


def arrive_after_rows(task: Task, barrier: Barrier, increment: bool) -> None:
    """All threads arrive once their copies so far are complete."""
    copies, task.rows = [copy for copy in task.rows if not copy.done], []
    left = len(copies)
    if increment:
        barrier.pending += task.threads

    def one_less() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            barrier.arrive(task.threads)

    for copy in copies:
        copy.then.append(one_less)
    if not copies:
        barrier.arrive(task.threads)


class Machine:
    """Runs kernels to their end."""

    def __init__(self, memory: GlobalMemory, seed: int, delay: Delay | None) -> None:
        self.memory, self.random, self.delay = memory, random.Random(seed), delay
        self.kernels: list[KernelRun] = []
        self.tasks: list[Task] = []
        self.copies: list[Copy] = []
        self._programs = self._operations = 0
        self._failure: BaseException | None = None
        self._over = threading.Event()

    def launch(
        self, name: str, grid: tuple[int, ...], body: Callable[[], None], threads: int, only: Sequence[tuple[int, ...]]
    ) -> None:
        """Behind those before; of the grid ``only`` these programs run, if any are named."""
        self.kernels.append(KernelRun(len(self.kernels), name, grid, body, threads, only))

    def _start_kernel(self, number: int) -> None:
        for kernel in self.kernels[number : number + 1]:
            for _ in range(RESIDENT):
                self._start_program(kernel)

    def _start_program(self, kernel: KernelRun) -> None:
        index = next(kernel.to_come, None)
        if index is not None:
            program = Program(self._programs, kernel, index)
            self._programs += 1
            self.spawn(program, "", lambda: self._run(program), kernel.threads)

    def let_next_start(self, program: Program) -> None:
        """griddepcontrol.launch_dependents: the next kernel starts when all programs have said so, or ended."""
        if program.release():
            self._start_kernel(program.kernel.number + 1)

    def _before(self, kernel: KernelRun) -> KernelRun | None:
        return self.kernels[kernel.number - 1] if kernel.number else None

    def _run(self, program: Program) -> None:
        task, before = current_task(), self._before(program.kernel)
        if before is None or before.complete:
            task.see_everything()
        self.pause(task, "start")
        program.kernel.body()
        self.pause(task, "end")
        if program.copies:
            raise EmulationError(f"{program} ends with {program.copies} async copies under way")
        self.let_next_start(program)
        program.kernel.ended += 1
        if program.kernel.complete:
            for other in [other for other in self.tasks if other.program.kernel is program.kernel]:
                for store in other.stores:
                    self.memory.flush(store)
                other.stores = []
                if other is not task:
                    self.tasks.remove(other)
        self._start_program(program.kernel)

    def wait_for_previous_kernel(self, task: Task) -> None:
        """griddepcontrol.wait."""
        before = self._before(task.program.kernel)
        if before is not None:
            task.wait(lambda: before.complete, f"the end of {before.name}")
        task.see_everything()

    def spawn(self, program: Program, part: str, body: Callable[[], None], threads: int) -> Task:
        """Another warp group."""
        task = Task(program, part, body, threads, self)
        self.tasks.append(task)
        return task

    def delays(self, what: str, task: Task) -> bool:
        """Whether the test wants it late."""
        return self.delay is not None and self.delay(what, task)

    def run(self) -> None:
        """All of them; raises what a kernel raised."""
        self._start_kernel(0)
        self._hand_to(self._next())
        self._over.wait()
        if self._failure is not None:
            for task in self.tasks:
                if task.thread is not None and not task.done:
                    task.lock.release()
                    task.thread.join()
            raise self._failure

    def pause(self, task: Task, what: str) -> None:
        """A point at which others may run first."""
        self._operations += 1
        if self._operations > MOST_OPERATIONS:
            raise Hang(f"{MOST_OPERATIONS} operations and no end; {task} runs")
        task.polled = None
        if task.stores and self.random.random() < FLUSH:
            self.memory.flush(task.stores.pop(self.random.randrange(len(task.stores))))
        task.held = self.delays(what, task)
        if task.held or self.random.random() > STAY:
            self._switch(task)
        task.held = False

    def wait(self, task: Task, ready: Callable[[], bool], reason: str) -> None:
        """Others run until it is ready."""
        task.ready, task.reason = ready, reason
        if not ready() or self.random.random() > STAY:
            self._switch(task)
        task.ready = None

    def _switch(self, task: Task) -> None:
        chosen = self._next()
        if chosen is not task:
            self._hand_to(chosen)
            task.lock.acquire()
            if self._failure is not None:
                raise _Abandoned

    def _next(self) -> Task:
        """The next warp group; async copies whose turn it is are completed meanwhile."""
        while True:
            candidates: list[Any] = [t for t in self.tasks if not t.done and (t.ready is None or t.ready())]
            candidates += self.copies
            candidates = [c for c in candidates if not c.held] or candidates
            if not candidates:
                waiting = [f"{task} waits for {task.reason}" for task in self.tasks if not task.done]
                raise Hang("nothing can run:\n" + "\n".join(waiting))
            chosen = self.random.choices(candidates, [c.weight for c in candidates])[0]
            if isinstance(chosen, Task):
                return chosen
            chosen.complete()

    def _hand_to(self, task: Task) -> None:
        if task.thread is None:
            task.thread = threading.Thread(target=self._live, args=(task,), daemon=True)
            task.thread.start()
        else:
            task.lock.release()

    def _live(self, task: Task) -> None:
        _thread.task = task
        task.ready = None
        try:
            task.body()
            if task.products:
                raise EmulationError(f"{task} ends with {len(task.products)} products that it hasn't waited for")
            task.done = True
            following = self._next() if any(not other.done for other in self.tasks) else None
        except _Abandoned:
            task.done = True
        except BaseException as error:  # the test's thread raises it
            task.done = True
            error.add_note(f"in {task}")
            self._failure = error
            self._over.set()
        else:
            if following is None:
                self._over.set()
            else:
                self._hand_to(following)
