"""Shadow checks: while a layer serves, a few tokens of every so many calls are compared with the reference.

What is compared is copied on the call's stream; the reference runs behind it on a stream of its own, and its result is
looked at in a later call. A call never waits for a check.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import logging
import math
import os
import random
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from ..backends import BACKENDS
from ..candidate import Candidate
from ..device import DeviceKey
from ..files import write_whole
from ..inputs import FP8, Inputs, MoEInputs, RoutedInputs
from ..numerics import DEFAULT_TOLERANCE, Correctness, Tolerance, check
from ..problem import MoEProblem
from ..reference import chosen_experts, moe_reference, quantize_rows, route, weighted_input
from .metrics import ShadowCounters
from .quarantine import QUARANTINE

logger = logging.getLogger("hybrid_moe")

OnBreach = Literal["log", "quarantine"]
# Checks of a layer that may be in flight; a call that is due meanwhile is left out, and counted so.
_SLOTS = 2
# Kernels round scores in another order: where logits that differ by so little choose other experts, either choice is
# right. A score moves by a quarter of it at most, which is 40 times the rounding of one near 1.
_NOISE, _NOISE_DRAWS = 1e-5, 32


@dataclass(frozen=True, slots=True)
class ShadowCheck:
    """How a layer's calls are checked while it serves.

    Parameters
    ----------
    every
        Each so many eager calls of the layer one is checked. Layers begin at different calls.
    tokens
        How many of its tokens, drawn at random.
    on_breach
        ``"log"``: an ERROR record, `ShadowStatus` and the counters say so. ``"quarantine"``: the candidate is passed
        over from then on as well; an explicit backend is not.
    dump_dir
        Folder for what was compared, one file a breach (`torch.save`), without the weights.
    tolerance
        Of `hybrid_moe.numerics.check`. By default that of every backend, as few tokens scatter more than many.
    max_overhead
        Share of the host's time, since the layer's first call, that its checks may take. A call that is due while they
        have taken more is passed over: a check costs the host some milliseconds, a decode step of one token 60 us.

    Raises
    ------
    ValueError
        A number isn't an integer of at least 1, ``on_breach`` is neither, or ``max_overhead`` isn't positive.
    """

    every: int = 1000
    tokens: int = 4
    on_breach: OnBreach = "log"
    dump_dir: str | Path | None = None
    tolerance: Tolerance = DEFAULT_TOLERANCE
    max_overhead: float = 0.003

    def __post_init__(self) -> None:
        for name in ("every", "tokens"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}: expected an integer of at least 1, got {value!r}")
        if not self.max_overhead > 0:
            raise ValueError(f"max_overhead: expected a positive share, got {self.max_overhead!r}")
        if self.on_breach not in get_args(OnBreach):
            raise ValueError(f"on_breach: expected one of {', '.join(get_args(OnBreach))}, got {self.on_breach!r}")


@dataclass(frozen=True, slots=True)
class Breach:
    """A check that found a wrong result, with what is needed to repeat it.

    Attributes
    ----------
    choice
        What ran.
    num_tokens, tokens
        T, and the numbers of the tokens compared.
    local_expert_offset
        Of the call.
    correctness
        The figures, and the rules broken.
    time
        Seconds since the epoch, when it was found.
    dump
        The file with what was compared, if there is one.
    """

    choice: Candidate
    num_tokens: int
    tokens: tuple[int, ...]
    local_expert_offset: int
    correctness: Correctness
    time: float
    dump: Path | None

    def to_dict(self) -> dict[str, Any]:
        """The breach as a JSON object."""
        return {
            "backend": self.choice.backend,
            "config": dict(self.choice.config),
            "num_tokens": self.num_tokens,
            "tokens": list(self.tokens),
            "local_expert_offset": self.local_expert_offset,
            "correctness": self.correctness.to_dict(),
            "failures": list(self.correctness.failures),
            "time": self.time,
            "dump": None if self.dump is None else str(self.dump),
        }


@dataclass(frozen=True, slots=True)
class ShadowStatus:
    """What a layer's checks have found so far.

    Attributes
    ----------
    checks, breaches
        Calls compared, and those of them with a wrong result.
    skipped
        Calls that were due and not compared: others were in flight, checks had taken their share of the time, or the
        device had no memory for it.
    last_breach
        The latest; ``None`` if there was none.
    """

    checks: int
    breaches: int
    skipped: int
    last_breach: Breach | None

    @property
    def breached(self) -> bool:
        """Whether any result was wrong."""
        return self.breaches > 0


class _Slot:
    """Pinned memory of one check in flight: reserved once, as reserving it may wait for the device."""

    def __init__(self, tokens: int, problem: MoEProblem) -> None:
        def pinned(width: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty((tokens, width), dtype=dtype, pin_memory=torch.cuda.is_available())

        self.numbers = pinned(1, torch.int64)[:, 0]
        self.output = pinned(problem.hidden_size, torch.bfloat16)
        self.reference = pinned(problem.hidden_size, torch.float32)
        self.ids = pinned(problem.all_routed.top_k, torch.int32)


@dataclass(slots=True)
class Sample:
    """The tokens of a call that are compared: copies of their inputs and results, and where the comparison is."""

    choice: Candidate
    num_tokens: int
    tokens: tuple[int, ...]
    slot: _Slot | None
    at: torch.Tensor = field(init=False)  # their numbers on the device
    inputs: Inputs = field(init=False)
    output: torch.Tensor = field(init=False)
    compared: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None  # output, reference and ids on the host
    done: torch.cuda.Event | None = None


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all layers: torch has 32 in all, and gives them out again, to servers as well."""
    return torch.cuda.Stream(device)


_PHASES = itertools.count()


class Shadow:
    """The checks of one layer.

    Parameters
    ----------
    options
        As the layer was given them.
    problem, key, device
        The layer's.
    """

    def __init__(self, options: ShadowCheck, problem: MoEProblem, key: DeviceKey, device: torch.device) -> None:
        self.options = options
        self._problem, self._key, self._device = problem, key, device
        self._calls, self._replays = itertools.count(1), itertools.count(1)
        # By the golden ratio, so that a model's layers are spread over the cadence however many they are.
        self._phase = int(next(_PHASES) * 0.6180339887 * options.every) % options.every
        self._random = random.Random()  # of its own: a server's seeds stay what they are
        self._counters = ShadowCounters(key.name, problem)
        self._flying: deque[Sample] = deque()
        self._last: Breach | None = None
        # Seconds that checks took of the host's, and when the first call came. Of several threads some may be lost.
        self._spent, self._since = 0.0, math.inf
        self._stream: torch.cuda.Stream | None = None
        self._slots: deque[_Slot] = deque()
        if device.type == "cuda":
            self._stream = _side_stream(device)
            self._slots.extend(_Slot(options.tokens, problem) for _ in range(_SLOTS))

    def status(self) -> ShadowStatus:
        """What was found so far; what is in flight isn't counted, see `finish`."""
        return ShadowStatus(*self._counters.totals(), self._last)

    def begin(self, choice_of: Callable[[int], Candidate], num_tokens: int, inputs: Inputs) -> Sample | None:
        """Look at checks that are through; if the call that is about to be launched is due, copy its inputs.

        What isn't None goes to `watch`.
        """
        # All that is done here is added to every call.
        due = next(self._calls) % self.options.every == self._phase
        if not (due or self._flying):
            return None
        with self._timed():
            return self._begin(due, choice_of, num_tokens, inputs)

    def watch(self, sample: Sample, launch: Callable[[], None], output: torch.Tensor) -> None:
        """Launch the call, and behind it the comparison of its ``output``."""
        try:
            launch()
            with self._timed():
                self._compare(sample, output)
        except BaseException:
            self._release(sample)
            raise

    def after_replay(self, choice: Candidate, num_tokens: int, inputs: Inputs, output: torch.Tensor) -> None:
        """The same for the replay of a graph that was just launched; replays have a cadence of their own."""
        due = next(self._replays) % self.options.every == self._phase
        if not (due or self._flying):
            return
        with self._timed():
            sample = self._begin(due, lambda _: choice, num_tokens, inputs)
        if sample is not None:
            self.watch(sample, lambda: None, output)

    def finish(self) -> None:
        """Wait for the checks in flight and judge them, as before a weight is written in place."""
        while (sample := self._next()) is not None:
            if sample.done is not None:
                sample.done.synchronize()
            self._judge(sample)

    def warm_up(self, inputs: Inputs, output: torch.Tensor) -> None:
        """Compile and reserve what a check takes; counts as none."""
        if self._stream is None or (sample := self._begin(True, _nobody, inputs.num_tokens, inputs)) is None:
            return
        try:
            self._compare(sample, output, queued=False)
            self._stream.synchronize()
        finally:
            self._release(sample)

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        start = time.perf_counter()
        self._since = min(self._since, start)
        try:
            yield
        finally:
            self._spent += time.perf_counter() - start

    def _is_over_budget(self) -> bool:
        return self._spent > self.options.max_overhead * max(0.0, time.perf_counter() - self._since)

    def _begin(
        self, due: bool, choice_of: Callable[[int], Candidate], num_tokens: int, inputs: Inputs
    ) -> Sample | None:
        if self._stream is not None and torch.cuda.is_current_stream_capturing():
            return None  # even asking an event would end the capture
        while (sample := self._next()) is not None:
            if sample.done is not None and not sample.done.query():
                self._flying.appendleft(sample)
                break
            self._judge(sample)
        if not due:
            return None
        choice = choice_of(num_tokens)
        if self._is_over_budget():
            self._counters.skipped(choice)
            return None
        try:
            slot = None if self._stream is None else self._slots.popleft()
        except IndexError:
            self._counters.skipped(choice)
            return None
        numbers = sorted(self._random.sample(range(num_tokens), min(self.options.tokens, num_tokens)))
        sample = Sample(choice, num_tokens, tuple(numbers), slot)
        try:
            if slot is None:
                sample.at = torch.tensor(numbers, device=self._device)
            else:
                slot.numbers[: len(numbers)] = torch.tensor(numbers)
                sample.at = slot.numbers[: len(numbers)].to(self._device, non_blocking=True)
            with torch.no_grad():
                sample.inputs = _rows(inputs, sample.at)
        except BaseException as error:
            self._release(sample)
            if not isinstance(error, torch.OutOfMemoryError):
                raise
            self._counters.skipped(choice)  # a call goes on without its check
            return None
        return sample

    def _release(self, sample: Sample) -> None:
        slot, sample.slot = sample.slot, None
        if slot is not None:
            self._slots.append(slot)

    def _next(self) -> Sample | None:
        try:
            return self._flying.popleft()
        except IndexError:
            return None

    @torch.no_grad()
    def _compare(self, sample: Sample, output: torch.Tensor, queued: bool = True) -> None:
        """Copy the tokens' results on the current stream, and start the reference on the other one."""
        try:
            sample.output = output.index_select(0, sample.at)
            if sample.slot is None:
                quantized = self._as_rounded(sample.choice, _quantized(sample.inputs))
                reference = moe_reference(quantized, self._problem)
                sample.compared = sample.output, reference, chosen_experts(quantized, self._problem)[0]
                self._judge(sample)
                return
            self._start(sample, sample.slot)
        except torch.OutOfMemoryError:
            self._counters.skipped(sample.choice)
            if self._stream is not None:
                self._stream.synchronize()  # it may be reading what is freed now
            self._release(sample)
            return
        if queued:
            self._flying.append(sample)

    def _start(self, sample: Sample, slot: _Slot) -> None:
        # Loaded here: it loads Triton.
        from ..kernels.few_tokens import few_tokens

        stream, count = self._stream, len(sample.tokens)
        assert stream is not None
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            inputs = self._as_rounded(sample.choice, _quantized(sample.inputs))
            ids, weights = chosen_experts(inputs, self._problem)
            inputs, weights = weighted_input(inputs, weights, self._problem)
            ids, weights = ids.int().contiguous(), weights.contiguous()
            reference = few_tokens(inputs, ids, weights, self._problem)
            slot.output[:count].copy_(sample.output, non_blocking=True)
            slot.reference[:count].copy_(reference, non_blocking=True)
            slot.ids[:count].copy_(ids, non_blocking=True)
            sample.done = torch.cuda.Event()
            sample.done.record(stream)
        for tensor in (inputs[1], *inputs[4:8]):
            tensor.record_stream(stream)  # the layer may go meanwhile
        sample.compared = slot.output[:count], slot.reference[:count], slot.ids[:count]

    def _as_rounded(self, choice: Candidate, inputs: Inputs) -> Inputs:
        """With the bias in bfloat16 where the backend rounds it: other experts are no fault then."""
        backend = BACKENDS.get(choice.backend)
        if backend is None or not backend.rounds_bias or not isinstance(inputs, MoEInputs):
            return inputs
        return inputs._replace(routing_bias=inputs.routing_bias.bfloat16())

    def _judge(self, sample: Sample) -> None:
        """Compare, and say what is wrong."""
        assert sample.compared is not None
        output, reference, ids = sample.compared
        correctness = check(output, reference, self._has_local_work(sample.inputs, ids), self.options.tolerance)
        if not correctness.passed:
            correctness = self._by_the_specification(sample) or correctness
        self._release(sample)
        self._counters.checked(sample.choice, correctness.passed)
        if not correctness.passed:
            self._report(sample, correctness)

    def _has_local_work(self, inputs: Inputs, ids: torch.Tensor) -> torch.Tensor:
        local = ids - int(inputs.local_expert_offset)
        return ((local >= 0) & (local < self._problem.all_routed.num_local_experts)).any(dim=1)

    @torch.no_grad()
    def _by_the_specification(self, sample: Sample) -> Correctness | None:
        """The comparison with `moe_reference` itself, without tokens whose choice of experts rounding decides.

        It waits for the device, as nothing else here does: it comes after a comparison that failed. ``None`` if the
        device has no memory for it.
        """
        problem, stream = self._problem, self._stream
        try:
            with torch.cuda.stream(stream):  # of no effect without one
                inputs = self._as_rounded(sample.choice, _quantized(sample.inputs))
                clear = _chosen_clearly(inputs, problem)
                output, reference = sample.output.cpu(), moe_reference(inputs, problem).cpu()
                has_local_work = self._has_local_work(inputs, chosen_experts(inputs, problem)[0].cpu())
                return check(output[clear], reference[clear], has_local_work[clear], self.options.tolerance)
        except torch.OutOfMemoryError:
            return None

    def _report(self, sample: Sample, correctness: Correctness) -> None:
        found = time.time()
        breach = Breach(
            sample.choice,
            sample.num_tokens,
            sample.tokens,
            int(sample.inputs.local_expert_offset),
            correctness,
            found,
            self._dump(sample, correctness, found),
        )
        self._last = breach
        failures = "; ".join(correctness.failures)
        fields = {"device": self._key.name, "problem": self._problem.definition} | breach.to_dict()
        logger.error(
            "shadow check: %s on %s at T = %d is wrong for the tokens %s: %s",
            breach.choice,
            self._key.name,
            breach.num_tokens,
            ", ".join(map(str, breach.tokens)),
            failures,
            extra=fields,
        )
        if self.options.on_breach == "quarantine":
            reason = f"{failures} (T = {breach.num_tokens})"
            QUARANTINE.put(self._key, self._problem, breach.choice, "shadow_check", reason)

    def _dump(self, sample: Sample, correctness: Correctness, found: float) -> Path | None:
        if self.options.dump_dir is None:
            return None
        inputs = sample.inputs
        tensors = {n: t.cpu() for n, t in zip(inputs._fields[:4], inputs[:4], strict=True) if t is not None}
        content = io.BytesIO()
        torch.save(
            {
                "problem": asdict(self._problem),
                "device": self._key.name,
                "candidate": str(sample.choice),
                "num_tokens": sample.num_tokens,
                "tokens": list(sample.tokens),
                "local_expert_offset": int(inputs.local_expert_offset),
                "routed_scaling_factor": float(inputs.routed_scaling_factor),
                "inputs": tensors,
                "output": sample.output.cpu(),
                "correctness": correctness.to_dict(),
                "failures": list(correctness.failures),
            },
            content,
        )
        at = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(found))
        path = Path(self.options.dump_dir) / f"shadow_{at}_{os.getpid()}_{next(_DUMPS)}.pt"
        try:
            write_whole(path, content.getvalue())
        except (OSError, ValueError) as error:
            logger.error("shadow check: what was compared is lost: %s", error)
            return None
        return path


_DUMPS = itertools.count(1)


def _nobody(num_tokens: int) -> Candidate:
    return Candidate("")


def _rows(inputs: Inputs, at: torch.Tensor) -> Inputs:
    """Copies of some tokens' activations; bias and weights as they are."""
    first, second, hidden, scale, *held = inputs
    if isinstance(inputs, RoutedInputs):
        second = second.index_select(0, at)
    if hidden.dtype == FP8:
        hidden = hidden.view(torch.uint8).index_select(0, at).view(FP8)
    else:
        hidden = hidden.index_select(0, at)
    scale = None if scale is None else scale.index_select(1, at)
    return type(inputs)(first.index_select(0, at), second, hidden, scale, *held)  # type: ignore[arg-type]


def _chosen_clearly(inputs: Inputs, problem: MoEProblem) -> torch.Tensor:
    """``[T]`` bool: whether each token's experts are the same however scores are rounded."""
    if not isinstance(inputs, MoEInputs):
        return torch.ones(inputs.num_tokens, dtype=torch.bool)
    logits, bias = inputs.routing_logits.cpu(), inputs.routing_bias.cpu()
    generator = torch.Generator().manual_seed(0)
    chosen = route(logits, bias, 1.0, problem)[0].sort(dim=1).values
    clear = torch.ones(inputs.num_tokens, dtype=torch.bool)
    for _ in range(_NOISE_DRAWS):
        noise = _NOISE * (2 * torch.rand(logits.shape, generator=generator) - 1) * logits.abs().clamp_min(1.0)
        clear &= (route(logits + noise, bias, 1.0, problem)[0].sort(dim=1).values == chosen).all(dim=1)
    return clear


def _quantized(inputs: Inputs) -> Inputs:
    if inputs.hidden_states_scale is not None:
        return inputs
    hidden, scale = quantize_rows(inputs.hidden_states)
    return inputs._replace(hidden_states=hidden, hidden_states_scale=scale)
