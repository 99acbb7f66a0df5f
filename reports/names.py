"""Names come from users and from files. Here they become harmless: in text, in tables, as names of files."""

from __future__ import annotations

import hashlib
import re
import unicodedata

LONGEST = 64  # characters of a name in a table
_RESERVED = re.compile(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\.|$)")  # devices of Windows, whatever the suffix


def clean(text: str) -> str:
    """One line of visible characters: no control characters, no marks that turn the direction of writing, no half pairs.

    >>> clean("a\\n b\\u202e c")
    'a b c'
    """
    if not (text.isascii() and text.isprintable()):
        kinds = ((c, unicodedata.category(c)) for c in text)
        text = "".join(" " if kind in ("Cc", "Zl", "Zp") else "" if kind in ("Cf", "Cs") else c for c, kind in kinds)
    return " ".join(text.split())


def clip(text: str, longest: int) -> str:
    """The beginning of a long text, with an ellipsis where something is missing."""
    text = clean(text)
    return text if len(text) <= longest else f"{text[: longest - 1].rstrip()}…"


def shorten(name: str, longest: int = LONGEST) -> str:
    """A name for a table: each of its parts (`model · condition · probe`) in at most so many characters.

    What is cut ends in four characters of a hash, so that names of equal beginnings stay apart.

    >>> shorten("net · " + "x" * 99)[:20], len(shorten("x" * 99))
    ('net · xxxxxxxxxxxxxx', 64)
    """
    return " · ".join(_short(part, longest) for part in clean(name).split(" · "))


def _short(part: str, longest: int) -> str:
    return part if len(part) <= longest else f"{part[: longest - 5]}…{_digest(part)[:4]}"


def safe_name(text: str, longest: int = 60) -> str:
    """A name as a part of a file's name: letters, digits, `.`, `_`, `-`; no path, not hidden, no device, never empty.

    Where something had to be changed, eight characters of a hash are added, so that two names never become one.

    >>> safe_name("trades")
    'trades'
    >>> safe_name("../../x")
    'x-9cdf6a50'
    """
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", plain)[:longest].strip(".-_")
    if _RESERVED.match(plain):
        plain = f"name-{plain}"
    return plain if plain and plain == text else f"{plain or 'name'}-{_digest(text)[:8]}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
