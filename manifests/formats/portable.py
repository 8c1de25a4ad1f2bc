"""Sample ids as names of files that every system can hold, spelt so that no two of them meet."""

from __future__ import annotations

import re

_DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d|conin\$|conout\$)\s*(\.|$)", re.IGNORECASE)
_UNUSABLE = re.compile(r'[<>:"|?*\\%\x00-\x1f\ud800-\udfff]|^[.\s]|[.\s]$')  # % too, because it begins a spelling


def portable(sample_id: str) -> str:
    """A sample id as a relative path that no system refuses; nearly all are spelt as they are.

    Characters that Windows has no names for, dots and spaces at the ends, and names that it takes for devices are
    spelt as % and two hex digits for each byte: "a:b" becomes "a%3Ab". Slashes stay, and no path leaves its root.
    """
    return "/".join(map(_part, sample_id.split("/")))


def _part(name: str) -> str:
    if not name:
        return "%"
    first = 1 if _DEVICES.match(name) else 0
    return "".join(map(_spelt, name[:first])) + _UNUSABLE.sub(lambda match: _spelt(match[0]), name[first:])


def _spelt(character: str) -> str:
    escaped = "\udc80" <= character <= "\udcff"  # how Python keeps a byte that is not UTF-8
    return "".join(
        f"%{byte:02X}" for byte in character.encode(errors="surrogateescape" if escaped else "surrogatepass")
    )
