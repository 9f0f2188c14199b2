"""What can be chosen: a backend with its configuration, and the error for one that can't run.

Apart from the backends themselves, so that policies and records can be read without loading any of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

ConfigValue = str | int | bool
# Of the backends of records that are of other pipelines than ours.
PEER_PREFIX = "peer:"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A backend and its configuration: one candidate, or what was chosen.

    Parameters
    ----------
    backend
        Registered name, as ``"triton_fused"``.
    config
        Options of that backend, as ``{"gemm": "triton"}``. Equal whatever the order of its keys.
    """

    backend: str
    config: Mapping[str, ConfigValue] = field(default_factory=dict)
    # Every call looks its runner up by the choice.
    _hash: int = field(init=False, repr=False, compare=False)
    _text: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "config", MappingProxyType(dict(sorted(self.config.items()))))
        object.__setattr__(self, "_hash", hash((self.backend, tuple(self.config.items()))))
        options = ",".join(f"{key}={value}" for key, value in self.config.items())
        object.__setattr__(self, "_text", f"{self.backend}[{options}]" if options else self.backend)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Candidate):
            return NotImplemented
        return self._hash == other._hash and self.backend == other.backend and self.config == other.config

    def __reduce__(
        self,
    ) -> tuple[type[Candidate], tuple[str, dict[str, ConfigValue]]]:  # a mappingproxy can't be pickled
        return Candidate, (self.backend, dict(self.config))

    def __str__(self) -> str:
        return self._text

    @classmethod
    def parse(cls, text: str) -> Candidate:
        """Read ``str(choice)`` back: ``name`` or ``name[key=value,...]``; values are strings."""
        name, bracket, rest = text.partition("[")
        if bracket and not rest.endswith("]"):
            raise ValueError(f"candidate: expected name[key=value,...], got {text!r} without the closing ']'")
        config: dict[str, ConfigValue] = {}
        for item in filter(None, rest.removesuffix("]").split(",")):
            key, equals, value = item.partition("=")
            if not equals:
                raise ValueError(f"candidate {text!r}: expected key=value, got {item!r}")
            config[key.strip()] = value.strip()
        return cls(name.strip(), config)


class BackendFailedError(RuntimeError):
    """A backend raised an unforeseen error when it was prepared; ``__cause__`` is that error."""

    def __init__(self, choice: Candidate, error: Exception) -> None:
        self.choice = choice
        super().__init__(f"backend {choice} failed to prepare: {type(error).__name__}: {error}")


class BackendUnsupportedError(RuntimeError):
    """A backend was asked for that cannot run this problem on this device; the message lists why."""

    def __init__(self, choice: Candidate, reasons: Sequence[str]) -> None:
        self.choice = choice
        self.reasons = list(reasons)
        super().__init__(f"backend {choice} can't run here: " + "; ".join(self.reasons))
