"""Where policies are: found, read strictly, and written whole or not at all."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import platformdirs
from pydantic import ValidationError

from .. import backends
from ..files import POLICY, decode, parse_json, read_whole, write_whole
from ..problem import MoEProblem
from ..text import printable
from ..version import __version__
from .schema import SCHEMA_VERSION, Policy, PolicyError, describe

# The list of the shipped policies' digests, in their folder; made by `make digests`.
DIGESTS = "SHA256SUMS"
# Both ways to a policy, for messages.
_HOW_TO_MAKE_ONE = "`hybrid-moe regenerate` on that GPU, or from its records by `hybrid-moe learn`"


def dumps_policy(policy: Policy) -> str:
    """The policy as JSON text: fixed order of keys, indented by 2, newline at the end. Equal policies, equal text."""
    return json.dumps(policy.model_dump(mode="json"), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def digest_of(policy: Policy) -> str:
    """SHA-256 of the policy's text: of its file, if `save_policy` wrote that."""
    return hashlib.sha256(dumps_policy(policy).encode()).hexdigest()


def load_policy(path: str | Path) -> Policy:
    """Read a policy file.

    Raises
    ------
    PolicyError
        The file is missing, no regular file, too large, unreadable, cut short, of another schema version, or has a
        field that is wrong, missing, unknown or there twice. Nothing is guessed in its place.
    """
    return _parse(path, _read(path))


def _read(path: str | Path) -> bytes:
    try:
        return read_whole(path)
    except FileNotFoundError:
        if os.path.islink(path):
            raise PolicyError(f"policy file {path} is a link to {os.readlink(path)}, which doesn't exist") from None
        raise PolicyError(
            f"policy file {path} doesn't exist; make it with `hybrid-moe regenerate -o {path}` on the GPU that it is "
            f"for, or from records with `hybrid-moe learn RECORDS -o {path}`"
        ) from None
    except OSError as error:
        raise PolicyError(f"policy file {path} can't be read: {error.strerror or error}") from error
    except ValueError as error:
        raise PolicyError(f"policy file can't be read: {error}") from error


def _parse(path: str | Path, content: bytes) -> Policy:
    try:
        text = decode(content)
        data = parse_json(text)
    except ValueError as error:
        raise PolicyError(
            printable(
                f"policy file {path} {error}; it may have been cut short or changed when it was copied: copy it again, "
                f"or make it again with {_HOW_TO_MAKE_ONE}"
            )
        ) from error
    if not isinstance(data, dict):
        raise PolicyError(f"policy file {path}: expected a policy's object, got a JSON {type(data).__name__}")
    # Before the fields: another version has other fields, and a list of those would hide the cause.
    version = data.get("schema_version")
    if version != SCHEMA_VERSION or isinstance(version, bool):
        found = f"schema_version {version!r:.40}" if "schema_version" in data else "no schema_version"
        newer = isinstance(version, int) and version > SCHEMA_VERSION
        raise (_OtherReleaseError if newer else PolicyError)(
            printable(
                f"policy file {path}: expected schema_version {SCHEMA_VERSION}, got {found}: make it again with "
                f"{_HOW_TO_MAKE_ONE}, or use the release of hybrid_moe that wrote it"
            )
        )
    try:
        return Policy.model_validate_json(text)
    except ValidationError as error:
        raise PolicyError(printable(f"policy file {path} is wrong: {describe(error)}")) from error


class _OtherReleaseError(PolicyError):
    """The file may be a good policy, but not for this release."""


def _known_here(policy: Policy, what: str) -> Policy:
    """The policy; refuses one that names a backend that this release doesn't have."""
    named = (policy.default, *policy.candidates, *(regime.choice for regime in policy.regimes))
    unknown = dict.fromkeys(choice.backend for choice in named if choice.backend not in backends.BACKENDS)
    if unknown:
        raise _OtherReleaseError(
            printable(
                f"{what} names the backend {', '.join(unknown)}, which release {__version__} doesn't know, only "
                f"{', '.join(backends.BACKENDS)}: use the release that wrote the policy, or make a new one "
                f"with {_HOW_TO_MAKE_ONE}"
            )
        )
    return policy


def save_policy(policy: Policy, path: str | Path) -> None:
    """Write a policy file, whole or not at all, in place of nothing but a policy; see `files.write_whole`."""
    write_whole(path, dumps_policy(policy).encode(), POLICY)


def user_policy_dir() -> Path:
    """Where policies learned on this machine are kept."""
    return platformdirs.user_data_path("hybrid_moe") / "policies"


def shipped_policy_dir() -> Path:
    """Where the policies of the package are: inside it in a wheel, next to it in an editable install."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "_policies"
    return inside if inside.is_dir() else package.parent / "policies"


def policy_path(root: str | Path, device: str, problem: MoEProblem) -> Path:
    """Where the policy for a device and a problem is written under ``root``."""
    return Path(root) / device / f"{problem.definition}.json"


@dataclass(frozen=True, slots=True)
class Scan:
    """What is in a folder of policies.

    Attributes
    ----------
    policies
        Those that can be used, sorted by path.
    skipped
        Every other ``*.json`` there, and why it can't.
    foreign
        Policies among the skipped ones: they name a backend that this release doesn't know.
    """

    policies: tuple[tuple[Path, Policy], ...]
    skipped: Mapping[Path, PolicyError]
    foreign: tuple[Policy, ...]


def scan(root: str | Path) -> Scan:
    """Read ``root/*.json`` and ``root/*/*.json``; nothing is there if ``root`` doesn't exist.

    Among the shipped policies, a file is used only if its digest is in their list.
    """
    root = Path(root)
    digests = _listed_digests(root) if root.resolve() == shipped_policy_dir() else None
    policies, skipped, foreign = [], {}, []
    for path in sorted([*root.glob("*.json"), *root.glob("*/*.json")]):
        try:
            content = _read(path)
            if digests is not None:
                _check_digest(path, content, root, digests)
            policy = _parse(path, content)
            try:
                policies.append((path, _known_here(policy, f"policy file {path}")))
            except PolicyError:
                foreign.append(policy)
                raise
        except PolicyError as error:
            skipped[path] = error
    return Scan(tuple(policies), skipped, tuple(foreign))


def policies_in(root: str | Path) -> list[tuple[Path, Policy]]:
    """The policies of a folder that can be used, see `scan`; warns of each other file once in a process."""
    found = scan(root)
    _warn_of_skipped(found)
    return list(found.policies)


def _warn_of_skipped(found: Scan) -> None:
    for error in found.skipped.values():
        warn_once(f"{error}. It is skipped")


@functools.cache
def warn_once(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn once in a process: Python's own once-a-place would repeat it at every place that makes a layer."""
    warnings.warn(message, category, stacklevel=2)


def _listed_digests(root: Path) -> dict[str, str]:
    """SHA-256 by path in the folder, as `sha256sum` lists them."""
    try:
        lines = decode(read_whole(root / DIGESTS)).splitlines()
    except (OSError, ValueError):
        return {}  # then each file says that it isn't listed
    pairs = (line.split("  ", 1) for line in lines if "  " in line)
    return {name: digest for digest, name in pairs}


def _check_digest(path: Path, content: bytes, root: Path, digests: Mapping[str, str]) -> None:
    found, listed = hashlib.sha256(content).hexdigest(), digests.get(path.relative_to(root).as_posix())
    if listed != found:
        why = f"expected the SHA-256 {listed:.12}..., got {found:.12}..." if listed else f"{DIGESTS} doesn't list it"
        raise PolicyError(
            f"policy file {path} isn't as it was shipped ({why}): install hybrid-moe again. Policies of your own "
            f"belong in {user_policy_dir()}; in a checkout, `make digests` lists what was changed on purpose"
        )


def find_policy(
    problem: MoEProblem, device: str, policy: Policy | str | Path | None = None, *, what: str = "the policy given"
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
    what
        What to call a `Policy` that is given: the file that it was read from.

    Returns
    -------
    policy
        ``None`` if none was given and none is found.
    where
        For people: where it came from, or where it was looked for and what to do.

    Raises
    ------
    PolicyError
        The policy given is for another problem or device, or names a backend that this release doesn't know; the folder
        given has none that matches; two files of one folder match; or the file that is asked for, one given or the one
        that has the policy's own name (`policy_path`), can't be used. Other files that can't be used are skipped with a
        warning.
    """
    if isinstance(policy, Policy):
        return _matching(policy, problem, device, what), what
    if policy is not None:
        path = Path(policy)
        if not path.is_dir():
            return find_policy(problem, device, load_policy(path), what=f"policy file {path}")
        found = _find_in(path, problem, device)
        if found is None:
            there = scan(path)
            policies = [*(p for _, p in there.policies), *there.foreign]
            known = sorted({f"{p.device} with {_describe_problem(p.problem)}" for p in policies})
            skipped = "".join(f". {error}" for error in there.skipped.values())
            raise PolicyError(
                f"no policy in {path} is for {device} with {_describe_problem(problem)}; it has: "
                f"{'; '.join(known) or 'none'}{skipped}. {how_to_make_one(problem)}"
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
    there = scan(root)
    found = [(path, p) for path, p in there.policies if p.device == device and p.problem == problem]
    if not found:
        # The one that is asked for, by its name: to go on without it would be to guess.
        broken = there.skipped.get(policy_path(root, device, problem))
        if broken is not None and not isinstance(broken, _OtherReleaseError):
            raise broken
    _warn_of_skipped(there)
    if any(p != found[0][1] for _, p in found):
        raise PolicyError(
            f"{' and '.join(str(path) for path, _ in found)} are for the same device and problem: delete all but one"
        )
    return found[0] if found else None


def _matching(policy: Policy, problem: MoEProblem, device: str, what: str) -> Policy:
    if policy.device != device or policy.problem != problem:
        raise PolicyError(
            f"{what}: expected one for {device} with {_describe_problem(problem)}, got one for {policy.device} with "
            f"{_describe_problem(policy.problem)}: leave the policy out to look one up. "
            f"{how_to_make_one(problem)}"
        )
    return _known_here(policy, what)


def _describe_problem(problem: MoEProblem) -> str:
    # The definition name leaves out what policies match on as well.
    values: Mapping[str, object] = dataclasses.asdict(problem)
    rest = ", ".join(f"{name}={values[name]}" for name in ("num_experts", "routing_method", "gate_first"))
    return f"{problem.definition} ({rest})"
