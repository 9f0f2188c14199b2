"""Text that comes from elsewhere (files, exceptions of libraries), made fit to be shown and kept."""

from __future__ import annotations

import re

# What moves a terminal's cursor, hides or reorders text, or can't be encoded: control characters but for newline and
# tab, bidirectional overrides, line separators, and the halves of surrogate pairs by which Python keeps odd bytes.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ufff9-\ufffb\ud800-\udfff]"
)


def printable(text: str) -> str:
    r"""The text with what a terminal would act on, or can't show, as escapes: ``\x1b``, ``\u202e``, ``\udcff``."""
    return _UNPRINTABLE.sub(lambda found: found.group().encode("unicode_escape").decode(), text)


def printable_json(text: str) -> str:
    r"""JSON text as `printable` has it, but still JSON: every escape is ``\uXXXX``."""
    # In JSON, such characters can only be inside of strings.
    return _UNPRINTABLE.sub(lambda found: f"\\u{ord(found.group()):04x}", text)


def describe_exception(error: BaseException, longest: int = 2000) -> str:
    """``TypeName: message``, fit to be kept in a record whatever the message is; cut after ``longest`` characters."""
    try:
        message = str(error)
    # The message is made by foreign code, which may itself be what is broken.
    except Exception as inner:
        message = f"(its message can't be made: {type(inner).__name__})"
    text = printable(f"{type(error).__name__}: {message[: 2 * longest]}")
    return text if len(text) <= longest else f"{text[:longest]}... ({len(message)} characters)"
