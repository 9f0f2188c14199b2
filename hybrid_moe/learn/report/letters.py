"""The letter of each candidate: one table for figures, pages and the terminal, on every device."""

from __future__ import annotations

import string
from collections.abc import Iterable

from ...candidate import Candidate

_TABLE = {
    "flashinfer_cutlass": "A",
    "flashinfer_trtllm": "B",
    "triton_fused[gemm=deep_gemm]": "C",
    "triton_fused[gemm=sgl_kernel]": "D",
    "triton_fused[gemm=triton]": "E",
    "torch_reference": "F",
}


def assign_letters(candidates: Iterable[Candidate]) -> dict[Candidate, str]:
    """The letter of each candidate, in the order of the letters.

    Candidates that the table doesn't name take the letters after its own, by name, and numbers after Z.
    """
    distinct = sorted(set(candidates), key=str)
    unnamed = [c for c in distinct if str(c) not in _TABLE]
    found = {c: _TABLE[str(c)] for c in distinct if str(c) in _TABLE}
    found |= {c: _letter(i) for i, c in enumerate(unnamed, start=len(_TABLE))}
    return dict(sorted(found.items(), key=lambda item: index(item[1])))


def index(letter: str) -> int:
    """The place of a letter, which colours and markers go by: 0 for A."""
    return int(letter) if letter.isdigit() else string.ascii_uppercase.index(letter)


def _letter(place: int) -> str:
    return string.ascii_uppercase[place] if place < len(string.ascii_uppercase) else str(place)
