"""What a backend is: a name, its reasons to refuse, and a prepared runner."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import ClassVar

import torch

from ..candidate import BackendUnsupportedError, Candidate, ConfigValue
from ..device import DeviceKey
from ..inputs import Inputs
from ..problem import MoEProblem

NO_FP8 = (
    "tensor cores before compute capability 8.9 have no FP8. vLLM serves such weights there by Marlin, which "
    "multiplies in 16 bits"
)


def lacks_fp8(device: DeviceKey) -> bool:
    """Whether the device is a GPU without FP8."""
    return device.capability is not None and device.capability < (8, 9)


class Runner(ABC):
    """A backend prepared for one problem, device and configuration.

    Safe to keep and to call any number of times; holds no weights.

    Attributes
    ----------
    most_tokens : int or None
        T of the largest call that it may be given, if a bound on memory says so: see `serving.chunks`.
    """

    most_tokens: int | None = None

    @abstractmethod
    def run(self, inputs: Inputs, output: torch.Tensor) -> None:
        """Write the layer's result into ``output``, ``[T, H]`` bfloat16, every element of it.

        The inputs were checked before, and are `RoutedInputs` only of a backend without `routed_reasons`. T is at
        least 1. Does not synchronise with the host.
        """

    def run_in(self, inputs: Inputs, output: torch.Tensor, memory: torch.Tensor) -> None:
        """`run` with its intermediate tensors in ``memory``, uint8, which nobody else uses meanwhile on this stream.

        What doesn't fit is reserved as by `run`. A library that reserves its own doesn't look at it.
        """
        self.run(inputs, output)

    def compile(self, inputs: Inputs) -> None:  # noqa: B027  # most have nothing to compile ahead
        """Compile what `run` would launch, without a launch: what can be compiled ahead, while other kernels run.

        In the executor of Triton's `AsyncCompileMode`, where one is on. `run` compiles the rest.
        """

    @abstractmethod
    def workspace_bytes(self, num_tokens: int) -> int:
        """Device memory in bytes that one call at ``num_tokens`` takes besides inputs and output."""

    def reserved_bytes(self, num_tokens: int) -> int:
        """Of these, what `run_in` takes from the memory that it is given."""
        return 0

    def most_reserved_bytes(self, first: int, last: int) -> int:
        """The most of `reserved_bytes` for ``first`` to ``last`` tokens, which may take less for more tokens.

        To be overridden, with `reserved_bytes`, by what needn't ask for each T.
        """
        if type(self).reserved_bytes is Runner.reserved_bytes:
            return 0
        return max(map(self.reserved_bytes, range(first, last + 1)))


class Backend(ABC):
    """One way to run the layer. Stateless: one instance is registered for the whole process."""

    name: ClassVar[str]
    default_config: ClassVar[Mapping[str, ConfigValue]] = MappingProxyType({})
    # Whether it takes the routing's bias in bfloat16, whatever it is given.
    rounds_bias: ClassVar[bool] = False

    def configs(self) -> Iterator[Mapping[str, ConfigValue]]:
        """Configurations worth measuring, the default one first."""
        yield self.default_config

    def packages(self, config: Mapping[str, ConfigValue]) -> tuple[str, ...]:
        """Distributions whose release decides how fast it is: times under one don't hold for another."""
        return ("torch",)

    @abstractmethod
    def not_supported_reasons(
        self, problem: MoEProblem, device: DeviceKey, config: Mapping[str, ConfigValue]
    ) -> list[str]:
        """Every reason why it can't run this; an empty list means that it can.

        Asks the device's capability before it imports or calls any library.
        """

    def routed_reasons(self, problem: MoEProblem, config: Mapping[str, ConfigValue]) -> list[str]:
        """Every reason why it can't run a layer whose experts are chosen before the call (`RoutedInputs`)."""
        return []

    def remarks(self, problem: MoEProblem, device: DeviceKey, config: Mapping[str, ConfigValue]) -> list[str]:
        """What to know before it runs where it can, as what its first call builds; asked only where it can."""
        return []

    def kernels(
        self,
        problem: MoEProblem,
        capability: tuple[int, int] | None,
        config: Mapping[str, ConfigValue],
        num_tokens: int,
    ) -> str | None:
        """For people: which kernels run at ``num_tokens``; ``None`` where a library decides it."""
        return None

    @abstractmethod
    def prepare(self, problem: MoEProblem, device: DeviceKey, config: Mapping[str, ConfigValue]) -> Runner:
        """Make the runner.

        Raises
        ------
        BackendUnsupportedError
            With all of `not_supported_reasons`, if there are any.
        """

    def refuse_if_unsupported(self, problem: MoEProblem, device: DeviceKey, config: Mapping[str, ConfigValue]) -> None:
        """Raise `BackendUnsupportedError` unless `not_supported_reasons` is empty."""
        reasons = self.not_supported_reasons(problem, device, config)
        if reasons:
            raise BackendUnsupportedError(Candidate(self.name, config), reasons)

    def unknown_config_reasons(self, config: Mapping[str, ConfigValue], allowed: Mapping[str, tuple]) -> list[str]:
        """Reasons for options that this backend doesn't have, or values that they can't take."""
        reasons = []
        for key, value in config.items():
            if key not in allowed:
                reasons.append(f"option {key!r} is unknown; known: {', '.join(allowed) or 'none'}")
            elif value not in allowed[key]:
                reasons.append(f"option {key}={value!r} is unknown; known: {', '.join(map(str, allowed[key]))}")
        return reasons
