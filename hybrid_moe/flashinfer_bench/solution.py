"""Solutions for flashinfer-bench: a policy, or one candidate, as sources that run without this package.

Written by its schema of 0.1.2 (``flashinfer_bench.data.Solution``), which flashinfer's own (``flashinfer.trace``)
reads too; neither is needed to write one.

**What is in it.** ``main.py`` with the policy's choices as a literal table and the entry point ``run``, and under
``hybrid_moe/`` those modules of this package that the choices can reach (`bundle`). The package itself is no
dependency: no release of it need be there, or be the one that wrote the file.

**Value-returning, not destination-passing**, because both who call it can do that. flashinfer-bench 0.1.2 takes either
(``bench/evaluators/default.py``). ``flashinfer.trace_apply`` takes a Python Solution that returns its output; for one
that writes into it, it would have to allocate the output, which it refuses for this layer, as the template doesn't say
of what dtype (``trace_apply/adapt.py``, ``_alloc_like``). It costs one ``torch.empty`` in the timed call.

**Keyword options.** flashinfer-bench gives the definition's ten inputs in order. ``trace_apply`` gives them by name,
with ``top_k``, ``n_group`` and ``topk_group`` besides, which the definition has in its name: ``run`` checks them.

**A missing library.** The first call on a device tries to prepare every choice of the table. In place of one that can't
run comes, with a warning, the policy's default or else the next of its choices: as `policy.select` has it, but for
candidates that the policy chooses nowhere, which aren't in the file. Decided once; nothing changes later. A Solution of
one candidate has nothing to fall back on, and raises.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from .. import backends
from ..backends.triton_fused import GEMMS, provider_module
from ..candidate import PEER_PREFIX, Candidate
from ..device import DeviceKey
from ..inputs import MoEInputs
from ..policy.schema import Policy
from ..policy.select import resolve
from ..problem import MoEProblem
from ..version import __version__
from .bundle import bundle, check_sources
from .traces import candidate_of, solution_name

AUTHOR = "hybrid_moe"
ENTRY = "main.py"
# Of `main.py`, where the modules of this package are: names that can't be taken for an installed package's.
FOLDER = "hybrid_moe"

Table = tuple[tuple[int, Candidate], ...]


def policy_table(policy: Policy) -> Table:
    """The policy's choices: ``(first T, choice)``, sorted; each holds up to the next one's first T."""
    spans = resolve(policy, policy.problem, DeviceKey(policy.device)).spans()
    table: list[tuple[int, Candidate]] = []
    for span in spans:
        choice = backends.complete(span.decision.choice)
        if not table or table[-1][1] != choice:
            table.append((span.first if table else 0, choice))
    return tuple(table)


def policy_solution(policy: Policy, *, name: str | None = None, author: str = AUTHOR) -> dict[str, Any]:
    """The Solution that runs, at every T, what a policy says.

    Parameters
    ----------
    policy
        Its refusals are those of the place where it runs, not of this one.
    name
        Of the Solution; ``hybrid_moe_<device>`` if not given. `learn` passes its traces over, as it is no candidate.
    author
        Of the Solution.

    Returns
    -------
    dict
        The Solution as a JSON object; the same policy gives the same bytes (`dumps_solution`).

    Raises
    ------
    ValueError
        The name is a candidate's: its traces would be taken for that candidate's.
    BundleError
        The sources don't stand alone.
    """
    name = f"hybrid_moe_{policy.device}" if name is None else name
    table = policy_table(policy)
    chosen = {choice for _, choice in table}
    for choice in chosen:
        _check_known(choice)
    # As `select` goes on where a choice can't run: the default, then the candidates in the policy's order.
    order = [backends.complete(choice) for choice in (policy.default, *policy.candidates)]
    otherwise = [choice for choice in dict.fromkeys(order) if choice in chosen]
    candidate = candidate_of(name, {})
    if candidate != Candidate(PEER_PREFIX + name) and chosen != {candidate}:
        raise ValueError(
            f"name is {name!r}, which is what the candidate {candidate} is called in traces; "
            f"this solution runs {', '.join(map(str, otherwise))}"
        )
    about = f"the policy learned for {policy.device}"
    return _solution(name, author, about, policy.problem, table, otherwise if len(otherwise) > 1 else [])


def candidate_solution(
    choice: Candidate, problem: MoEProblem, *, name: str | None = None, author: str = AUTHOR
) -> dict[str, Any]:
    """The Solution that runs one candidate at every T, and raises where it can't.

    Under its own name (`traces.solution_name`) its traces are records of that candidate for `learn`.

    Raises
    ------
    ValueError
        The choice is unknown, or the name is another candidate's.
    BundleError
        The sources don't stand alone.
    """
    choice = backends.complete(choice)
    _check_known(choice)
    name = solution_name(choice) if name is None else name
    candidate = candidate_of(name, {})
    if candidate not in (choice, Candidate(PEER_PREFIX + name)):
        raise ValueError(f"name is {name!r}, which is what the candidate {candidate} is called in traces; not {choice}")
    return _solution(name, author, f"the candidate {choice}", problem, ((0, choice),), [])


def _check_known(choice: Candidate) -> None:
    known = list(backends.get_backend(choice.backend).configs())
    if dict(choice.config) not in [dict(config) for config in known]:
        listed = ", ".join(str(Candidate(choice.backend, config)) for config in known)
        raise ValueError(f"candidate: expected one of {listed}, got {choice}")


def dumps_solution(solution: Mapping[str, Any]) -> str:
    """The Solution as JSON text, newline at the end. Equal Solutions, equal text."""
    return json.dumps(solution, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _solution(
    name: str, author: str, about: str, problem: MoEProblem, table: Table, otherwise: Sequence[Candidate]
) -> dict[str, Any]:
    # It becomes the name of folders and logs.
    if re.fullmatch(r"[\w.,=+\[\]-]+", name) is None:
        raise ValueError(f"name: expected letters, digits and any of _ . , = + [ ] -, got {name!r}")
    if not author.strip():
        raise ValueError(f"author: expected a name, got {author!r}")
    choices = list(dict.fromkeys(choice for _, choice in table))
    dependencies = list(dict.fromkeys(p for c in choices for p in backends.get_backend(c.backend).packages(c.config)))
    classes = {name: type(backends.get_backend(name)) for name in dict.fromkeys(c.backend for c in choices)}
    roots = {"flashinfer_bench.runtime": ["BakedLayer"], "inputs": ["MoEInputs"]}
    roots |= {_module(kind.__module__): [kind.__name__] for kind in classes.values()}
    used = {provider_module(str(c.config["gemm"])) for c in choices if "gemm" in c.config}
    left_out = {_module(provider_module(gemm)) for gemm in GEMMS} - {_module(name) for name in used}
    sources = {f"{FOLDER}/{path}": text for path, text in bundle(roots, left_out).items()}
    sources[ENTRY] = _main(about, problem, table, otherwise, list(classes.values()))
    check_sources(sources, dependencies)
    return {
        "name": name,
        "definition": problem.definition,
        "author": author,
        "description": _description(about, table, otherwise),
        "spec": {
            "language": "triton" if "triton" in dependencies else "python",
            "target_hardware": ["cuda"],
            "entry_point": f"{ENTRY}::run",
            "dependencies": dependencies,
            "destination_passing_style": False,
        },
        "sources": [{"path": path, "content": sources[path]} for path in sorted(sources)],
    }


def _module(name: str) -> str:
    return name.removeprefix(__package__.partition(".")[0] + ".")


def _spans(table: Table) -> list[str]:
    ends = [first - 1 for first, _ in table[1:]]
    found = []
    for (first, choice), end in zip(table, [*ends, None], strict=True):
        first = max(first, 1)
        found.append(f"T = {first}{' and more' if end is None else '' if end == first else f'-{end}'}: {choice}")
    return found


def _description(about: str, table: Table, otherwise: Sequence[Candidate]) -> str:
    text = f"hybrid_moe {__version__}, {about}. {'; '.join(_spans(table))}."
    if otherwise:
        text += f" Where a choice can't run, the first that can of {', '.join(map(str, otherwise))}, with a warning."
    return text


def _main(about: str, problem: MoEProblem, table: Table, otherwise: Sequence[Candidate], kinds: Sequence[type]) -> str:
    def literal(value: object) -> str:
        return json.dumps(value) if isinstance(value, str) else repr(value)

    def candidate(choice: Candidate) -> str:
        config = ", ".join(f"{literal(key)}: {literal(value)}" for key, value in choice.config.items())
        return f"{literal(choice.backend)}, {{{config}}}"

    rows = "".join(f"    ({first}, {candidate(choice)}),\n" for first, choice in table)
    others = "".join(f"    ({candidate(choice)}),\n" for choice in otherwise)
    fields = "".join(f"    {literal(name)}: {literal(value)},\n" for name, value in dataclasses.asdict(problem).items())
    backend_list = "".join(
        f'    importlib.import_module(".{_module(kind.__module__)}", __name__).{kind.__name__}(),\n' for kind in kinds
    )
    parameters = "".join(f"    {name},\n" for name in MoEInputs._fields)
    arguments = "".join(f"        {name},\n" for name in MoEInputs._fields)
    return f'''"""{problem.definition}: {about}.

Written by hybrid_moe {__version__} (`hybrid-moe solution`): don't edit, write it again.
"""

from __future__ import annotations

import importlib
import os

# Who loads this file gives it a package around it or none; so it is itself the package of the modules next to it.
__path__ = [os.path.join(os.path.dirname(os.path.abspath(__file__)), "{FOLDER}")]

PROBLEM = {{
{fields}}}
# The first T, and what runs from there up to the next one's.
TABLE = (
{rows})
# What runs, the first that can, in place of a choice that can't: decided at the first call.
OTHERWISE = (
{others})

MoEInputs = importlib.import_module(".inputs", __name__).MoEInputs
BACKENDS = (
{backend_list})
LAYER = importlib.import_module(".flashinfer_bench.runtime", __name__).BakedLayer(PROBLEM, TABLE, OTHERWISE, BACKENDS)


def run(
{parameters}    **options,
):
    """The layer's output, [T, hidden_size] bfloat16; options are checked against PROBLEM."""
    inputs = MoEInputs(
{arguments}    )
    return LAYER.run(inputs, options)
'''
