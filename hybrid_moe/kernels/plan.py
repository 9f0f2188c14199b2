"""All that calls with one `LaunchKey` share: made at the first of them, so that another one only fills addresses in."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from triton.runtime import driver

from ..inputs import Inputs, MoEInputs, RoutedInputs
from . import direct
from .arena import Arena
from .steps import AnyStep, LibraryStep, Step, Tiles


def addresses_of(inputs: Inputs) -> list[int]:
    """Where the tensors start: all of the inputs' fields but the two numbers at the end."""
    return [tensor.data_ptr() for tensor in inputs[:-2]]


class LaunchKey(NamedTuple):
    """What the launches of a call depend on, besides its problem and its device.

    Attributes
    ----------
    kind
        Type of the inputs: the names of the tensors, and whether the experts are chosen already.
    num_tokens
        T.
    stride_routing, stride_weights, stride_hidden
        Between the rows of the routing's first input, of ``topk_weights`` (of a bias, between its elements), and of the
        hidden states.
    dtype_routing
        Of the routing's second input: a bias is bfloat16 or float32, and a compiled kernel reads one of them.
    stride_scale_k, stride_scale_t
        Of the hidden states' scales.
    row_alignment
        Of the grouped GEMM: each expert's rows start at a multiple of it.
    aligned, output_aligned
        Whether all tensors of the inputs, and the output, start at multiples of 16 bytes. Decided here alone: the first
        decides which kernels are launched, both together how.
    """

    kind: type[MoEInputs] | type[RoutedInputs]
    num_tokens: int
    stride_routing: int
    stride_weights: int
    dtype_routing: torch.dtype
    stride_hidden: int
    stride_scale_k: int
    stride_scale_t: int
    row_alignment: int
    aligned: bool
    output_aligned: bool

    @classmethod
    def of(cls, inputs: Inputs, addresses: Sequence[int], output: torch.Tensor, row_alignment: int) -> LaunchKey:
        """Of a call; ``addresses`` are those of the inputs' tensors."""
        # On the path of every call: half the time of the constructor.
        first, second, hidden = inputs[:3]
        stride_scale_k, stride_scale_t = inputs[3].stride()
        return tuple.__new__(
            cls,
            (
                type(inputs),
                hidden.shape[0],
                first.stride()[0],
                second.stride()[0],
                second.dtype,
                hidden.stride()[0],
                stride_scale_k,
                stride_scale_t,
                row_alignment,
                all_aligned(addresses),
                output.data_ptr() % 16 == 0,
            ),
        )


def all_aligned(addresses: Sequence[int]) -> bool:
    """Whether all are multiples of 16, as fresh tensors' are and slices' may not be."""
    return functools.reduce(operator.or_, addresses) % 16 == 0


def by_name(inputs: Inputs, output: torch.Tensor, arena: Arena, memory: torch.Tensor) -> dict[str, Any]:
    """What the names in a call's steps stand for."""
    return {
        **inputs._asdict(),
        "local_expert_offset": int(inputs.local_expert_offset),
        "routed_scaling_factor": float(inputs.routed_scaling_factor),
        "output": output,
        **arena.tensors(memory),
    }


class Plan:
    """The steps of a call and the arena of its intermediate tensors, for one key and one device.

    Parameters
    ----------
    key, arena, steps, device
        ``device`` with its index.
    """

    __slots__ = ("arena", "steps", "device", "_names", "_aligned", "addressed")

    def __init__(self, key: LaunchKey, arena: Arena, steps: Sequence[AnyStep], device: torch.device) -> None:
        self.arena = arena
        self.steps = tuple(steps)
        self.device = device
        self._names = (*key.kind._fields, "output", *arena.places)
        self._aligned = key.aligned and key.output_aligned
        self.addressed = self._find_addressed()

    def run(self, inputs: Inputs, addresses: Sequence[int], output: torch.Tensor, memory: torch.Tensor) -> None:
        """Launch on the current stream of the device, which must be the current one.

        Parameters
        ----------
        inputs, output
            Of the key.
        addresses
            Of the inputs' tensors.
        memory
            `Arena.bytes` bytes and more, for the intermediate tensors.
        """
        addressed = self.addressed
        if addressed is not None and not direct.is_hooked():
            call = by_name(inputs, output, self.arena, memory) if addressed.libraries else None
            addressed.run(inputs, addresses, output.data_ptr(), memory.data_ptr(), call)
            return
        call = by_name(inputs, output, self.arena, memory)
        for step in self.steps:
            step.run(call, self.device, self._aligned)
        if addressed is None:
            self.addressed = self._find_addressed()  # now that all kernels are compiled

    def compile(self, inputs: Inputs) -> None:
        """Compile this package's kernels of such a call, without a launch; reserves no memory."""
        memory = torch.empty(self.arena.bytes, dtype=torch.uint8, device="meta")  # aligned, as what a call gets is
        output = torch.empty_like(inputs.hidden_states, dtype=torch.bfloat16, device="meta")
        call = by_name(inputs, output, self.arena, memory)
        for step in self.steps:
            if isinstance(step, Step):
                step.compile(call)

    def _find_addressed(self) -> Addressed | None:
        """The same launches by addresses; None where a kernel isn't compiled yet or can't be launched so."""
        if self.device.type != "cuda" or not self._aligned:
            return None
        addressed = Addressed(self._names, [place.offset for place in self.arena.places.values()], self.device)
        return addressed if all(map(addressed.add, self.steps)) else None


class Addressed:
    """The launches of a plan by addresses, which come from a list of values: what the call's names stand for first.

    Attributes
    ----------
    launchers : list
        Of this package's kernels.
    libraries : list
        Libraries' steps, each with the number of launchers before it.
    """

    def __init__(self, names: Sequence[str], offsets: Sequence[int], device: torch.device) -> None:
        self._device = device
        self._at = {name: at for at, name in enumerate(names)}
        self._offsets = list(offsets)
        self._numbers: list[Any] = []  # after what is named; None where an encoded descriptor will be
        self._encoded: list[tuple[int, Callable[[int], Any], int]] = []  # its place, the function, the address's place
        self.launchers: list[direct.Launcher] = []
        self.libraries: list[tuple[int, LibraryStep]] = []

    def add(self, step: AnyStep) -> bool:
        """Add a step, in their order; whether it can be made so."""
        if isinstance(step, LibraryStep):
            self.libraries.append((len(self.launchers), step))
            return True
        compiled = step.kernel.compiled(step.constants, self._device)
        if compiled is None:
            return False
        arguments: list[int] = []
        descriptors = 0
        for operand in step.operands:
            if isinstance(operand, str):
                arguments.append(self._at[operand])
            elif isinstance(operand, Tiles):
                expansion = direct.expanded(compiled, operand, descriptors)
                descriptors += 1
                if expansion is None:
                    return False
                encode, numbers = expansion
                arguments.append(self._number(None))
                self._encoded.append((arguments[-1], encode, self._at[operand.name]))
                arguments += map(self._number, numbers)
            else:
                arguments.append(self._number(operand))
        launcher = direct.launcher(compiled, step.grid, arguments, step.constants)
        if launcher is None:
            return False
        self.launchers.append(launcher)
        return True

    def _number(self, value: int | float | None) -> int:
        self._numbers.append(value)
        return len(self._at) + len(self._numbers) - 1

    def values(self, inputs: Inputs, addresses: Sequence[int], output: int, memory: int) -> list[Any]:
        """What the launchers of a call take their arguments from."""
        values = [
            *addresses,
            int(inputs.local_expert_offset),
            float(inputs.routed_scaling_factor),
            output,
            *[memory + offset for offset in self._offsets],
            *self._numbers,
        ]
        for at, encode, of in self._encoded:
            values[at] = encode(values[of])
        return values

    def run(
        self, inputs: Inputs, addresses: Sequence[int], output: int, memory: int, call: Mapping[str, Any] | None = None
    ) -> None:
        """Launch all; every line of this is added to every call. ``call``: the tensors by name, for libraries."""
        values = self.values(inputs, addresses, output, memory)
        stream = driver.active.get_current_stream(self._device.index)
        first = 0
        if call is not None:
            for end, step in self.libraries:
                for launch in self.launchers[first:end]:
                    launch(stream, values)
                step.function(call)
                first = end
        for launch in self.launchers[first:] if first else self.launchers:
            launch(stream, values)
