"""The options that say what the layer is, the same for every command that wants one."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from ..measure.workloads import MODELS, ModelName
from ..problem import MoEProblem, RoutingMethod

# The fields of MoEProblem but the block, which has one value alone; and the model, which has them all.
_OPTIONS: Mapping[str, Any] = {
    "model": Annotated[
        ModelName | None,
        typer.Option(help="A model's layer on one of 8 ranks. The sizes below change it. [default: deepseek-v3]"),
    ],
    "num_experts": Annotated[int | None, typer.Option(min=1, help="Experts of the whole model. [default: 256]")],
    "num_local_experts": Annotated[int | None, typer.Option(min=1, help="Experts of this rank. [default: 32]")],
    "top_k": Annotated[int | None, typer.Option(min=1, help="Experts chosen for each token. [default: 8]")],
    "n_group": Annotated[int | None, typer.Option(min=1, help="Groups of experts. [default: 8]")],
    "topk_group": Annotated[int | None, typer.Option(min=1, help="Groups kept for each token. [default: 4]")],
    "hidden_size": Annotated[int | None, typer.Option(min=1, help="A multiple of 128. [default: 7168]")],
    "intermediate_size": Annotated[int | None, typer.Option(min=1, help="A multiple of 128. [default: 2048]")],
    "routing_method": Annotated[
        RoutingMethod | None, typer.Option(help="How scores are made of the logits. [default: deepseek_v3]")
    ],
    "num_shared_experts": Annotated[
        int | None, typer.Option(min=0, help="Experts of every token, fused behind the routed ones. [default: 0]")
    ],
    "weight_on_input": Annotated[
        bool | None, typer.Option("--weight-on-input/--weight-on-output", help="For top 1. [default: weight-on-output]")
    ],
    "gate_first": Annotated[
        bool | None, typer.Option("--gate-first/--up-first", help="Half stored first in GEMM1. [default: up-first]")
    ],
}


@dataclass(frozen=True, slots=True)
class ProblemOptions:
    """What the options say of the layer."""

    model: ModelName | None
    fields: Mapping[str, Any]

    def problem(self, base: MoEProblem = MoEProblem()) -> MoEProblem:  # noqa: B008 (frozen)
        """The model's layer, or else ``base``, with the sizes given; ValueError if they contradict one another."""
        return dataclasses.replace(base if self.model is None else MODELS[self.model], **self.fields)


def takes_problem(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options in place of its one parameter ``sizes``, a `ProblemOptions`."""

    @functools.wraps(command)
    def called(**given: Any) -> None:
        fields = {name: value for name in _OPTIONS if (value := given.pop(name)) is not None}
        command(**given, sizes=ProblemOptions(fields.pop("model", None), fields))

    kind = inspect.Parameter.KEYWORD_ONLY
    options = [inspect.Parameter(name, kind, default=None, annotation=hint) for name, hint in _OPTIONS.items()]
    hints = typing.get_type_hints(command, include_extras=True)
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        parameters += options if name == "sizes" else [parameter.replace(kind=kind, annotation=hints[name])]
    called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return called
