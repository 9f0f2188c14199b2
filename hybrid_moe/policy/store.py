"""Where policies are: found, read strictly, and written whole or not at all."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import platformdirs
from pydantic import ValidationError

from ..files import POLICY, write_whole
from ..problem import MoEProblem
from .schema import SCHEMA_VERSION, Policy, PolicyError, describe

# Both ways to a policy, for messages.
_ANEW = "`hybrid-moe regenerate` on that GPU, or from its records by `hybrid-moe learn`"


def dumps_policy(policy: Policy) -> str:
    """The policy as JSON text: fixed order of keys, indented by 2, newline at the end. Equal policies, equal text."""
    return json.dumps(policy.model_dump(mode="json"), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def load_policy(path: str | Path) -> Policy:
    """Read a policy file.

    Raises
    ------
    PolicyError
        The file is missing, unreadable, cut short, of another schema version, or has a field that is wrong, missing or
        unknown. Nothing is guessed in its place.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode()
    except FileNotFoundError:
        raise PolicyError(
            f"policy file {path} doesn't exist; make it with `hybrid-moe regenerate -o {path}` on the GPU that it is "
            f"for, or from records with `hybrid-moe learn RECORDS -o {path}`"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise PolicyError(f"policy file {path} can't be read: {error}") from error
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise PolicyError(
            f"policy file {path} isn't whole JSON ({error.msg}, line {error.lineno} column {error.colno} of "
            f"{len(text)} characters): it may have been cut short when it was copied; "
            f"copy it again, or make it anew with {_ANEW}"
        ) from error
    if not isinstance(data, dict):
        raise PolicyError(f"policy file {path} holds a JSON {type(data).__name__}; a policy's object is wanted")
    # Before the fields: another version has other fields, and a list of those would hide the cause.
    version = data.get("schema_version")
    if version != SCHEMA_VERSION or isinstance(version, bool):
        found = f"schema_version {version!r}" if "schema_version" in data else "no schema_version"
        raise PolicyError(
            f"policy file {path} has {found}; {SCHEMA_VERSION} is wanted: make it anew with {_ANEW}, "
            "or use the release of hybrid_moe that wrote it"
        )
    try:
        return Policy.model_validate_json(text)
    except ValidationError as error:
        raise PolicyError(f"policy file {path} is wrong: {describe(error)}") from error


def save_policy(policy: Policy, path: str | Path) -> None:
    """Write a policy file, whole or not at all, in place of nothing but a policy; see `files.write_whole`."""
    write_whole(path, dumps_policy(policy).encode(), POLICY)


def user_policy_dir() -> Path:
    """Where policies learned on this machine are kept."""
    return platformdirs.user_data_path("hybrid_moe") / "policies"


def shipped_policy_dir() -> Path:
    """Where the policies of the package are: inside it in a wheel, beside it in an editable install."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "_policies"
    return inside if inside.is_dir() else package.parent / "policies"


def policy_path(root: str | Path, device: str, problem: MoEProblem) -> Path:
    """Where the policy for a device and a problem is written under ``root``."""
    return Path(root) / device / f"{problem.definition}.json"


def policies_in(root: str | Path) -> Iterator[tuple[Path, Policy]]:
    """Every policy of ``root/*.json`` and ``root/*/*.json``, sorted by path; none if ``root`` doesn't exist.

    Raises
    ------
    PolicyError
        One of the files can't be used: it might be the one that is wanted.
    """
    root = Path(root)
    for path in sorted([*root.glob("*.json"), *root.glob("*/*.json")]):
        yield path, load_policy(path)


def find_policy(
    problem: MoEProblem, device: str, policy: Policy | str | Path | None = None
) -> tuple[Policy | None, str]:
    """The policy for a problem on a device.

    Looks at the argument alone if there is one; else in the user's folder (`user_policy_dir`), then among the shipped
    ones (`shipped_policy_dir`). The device and the full problem inside a file decide, never its name.

    Parameters
    ----------
    problem
        What is to be computed.
    device
        Slug of the device's product name.
    policy
        A policy, a policy file, or a folder of them (``*.json`` or ``<device>/*.json``).

    Returns
    -------
    policy
        ``None`` if none was given and none is found.
    where
        For people: where it came from, or where it was looked for and what to do.

    Raises
    ------
    PolicyError
        The policy given is for another problem or device, the folder given has none that matches, two files of one
        folder match, or a file can't be used.
    """
    if isinstance(policy, Policy):
        return _matching(policy, problem, device, "the policy given"), "the policy given"
    if policy is not None:
        path = Path(policy)
        if not path.is_dir():
            return _matching(load_policy(path), problem, device, f"policy file {path}"), f"policy file {path}"
        found = _find_in(path, problem, device)
        if found is None:
            known = sorted({f"{p.device} with {_describe_problem(p.problem)}" for _, p in policies_in(path)})
            raise PolicyError(
                f"no policy in {path} is for {device} with {_describe_problem(problem)}; it has: "
                f"{'; '.join(known) or 'none'}. {how_to_make_one(problem)}"
            )
        return found[1], f"policy file {found[0]}"
    user, shipped = user_policy_dir(), shipped_policy_dir()
    for folder, kind in ((user, "your policy"), (shipped, "shipped policy")):
        found = _find_in(folder, problem, device)
        if found is not None:
            return found[1], f"{kind} {found[0]}"
    return None, (
        f"no policy for {device} with {_describe_problem(problem)} in {user} or {shipped}. {how_to_make_one(problem)}"
    )


def how_to_make_one(problem: MoEProblem) -> str:
    """How to come by a policy for a problem, for people: the command with its options."""
    options = []
    for field in dataclasses.fields(problem):
        value = getattr(problem, field.name)
        if value != field.default:
            option = f"--{field.name.replace('_', '-')}"
            options.append(option if value is True else f"{option} {value}")
    command = " ".join(["hybrid-moe regenerate", *options])
    return f"`{command}` makes one for the GPU that it runs on, `hybrid-moe learn` one from records"


def known_policies() -> list[tuple[Path, Policy]]:
    """Every policy that is looked up, of any device and problem: the user's own, then the shipped ones."""
    return [*policies_in(user_policy_dir()), *policies_in(shipped_policy_dir())]


def _find_in(root: Path, problem: MoEProblem, device: str) -> tuple[Path, Policy] | None:
    found = [(path, p) for path, p in policies_in(root) if p.device == device and p.problem == problem]
    if len(found) > 1:
        raise PolicyError(
            f"{' and '.join(str(path) for path, _ in found)} are for the same device and problem: delete all but one"
        )
    return found[0] if found else None


def _matching(policy: Policy, problem: MoEProblem, device: str, what: str) -> Policy:
    if policy.device != device or policy.problem != problem:
        raise PolicyError(
            f"{what} is for {policy.device} with {_describe_problem(policy.problem)}; "
            f"{device} with {_describe_problem(problem)} is wanted: leave the policy out to look one up. "
            f"{how_to_make_one(problem)}"
        )
    return policy


def _describe_problem(problem: MoEProblem) -> str:
    # The definition name leaves out what policies match on as well.
    values: Mapping[str, object] = dataclasses.asdict(problem)
    rest = ", ".join(f"{name}={values[name]}" for name in ("num_experts", "routing_method", "gate_first"))
    return f"{problem.definition} ({rest})"
