"""Numbers as text, and tables of text: the terminal, both pages and notebooks show the same ones.

A missing number is a dash. Bytes are counted in powers of 1000, as disks are sold; a minus is a minus sign, no hyphen.
"""

from __future__ import annotations

import html
import math
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Progress = Callable[[int, int], None]  # called with (done, total) while a long work goes on
MISSING = "–"
MINUS = "\N{MINUS SIGN}"
_BYTES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def percent(share: float | None, digits: int = 1) -> str:
    """0.123 -> "12.3". A share above 0 never becomes 0: 0.0004 -> "< 0.1"."""
    if share is None or math.isnan(share):
        return MISSING
    smallest = 10.0**-digits
    return f"< {smallest:g}" if 0 < 100 * share < smallest / 2 else f"{100 * share:.{digits}f}"


def points(change: float | None, digits: int = 1) -> str:
    """A change of a share in percentage points, with its sign: 0.021 -> "+2.1", -0.021 -> "−2.1".

    What rounds to 0 has no sign: -0.0001 -> "0.0".
    """
    if change is None or math.isnan(change):
        return MISSING
    text = f"{100 * change:+.{digits}f}"
    return text.replace("-", MINUS) if float(text) else text[1:]


def probability(value: float | None) -> str:
    """0.8731 -> "0.873"."""
    return MISSING if value is None or math.isnan(value) else f"{value:.3f}"


def duration(seconds: float) -> str:
    """83 -> "1 min 23 s"; seconds are left out from an hour on: 3725 -> "1 h 02 min"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def size(count: float | None) -> str:
    """A number of bytes: 1234567 -> "1.2 MB"."""
    if count is None or math.isnan(count):
        return MISSING
    unit, name = next((pair for pair in _BYTES if count >= pair[0]), (1.0, "B"))
    return f"{count / unit:.1f} {name}" if name != "B" else f"{count:.0f} B"


def number(count: int) -> str:
    """1234567 -> "1,234,567"."""
    return f"{count:,}"


def counted(count: int, one: str, many: str = "") -> str:
    """(1, "image") -> "1 image", (1234, "image") -> "1,234 images"; `many` where an s does not make the plural."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def dimensions(width: int, height: int) -> str:
    """(2048, 1024) -> "2048 × 1024"."""
    return f"{width} × {height}"


def listed(words: Sequence[str]) -> str:
    """("a", "b", "c") -> "a, b and c"."""
    return f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else "".join(words)


def reason(error: BaseException) -> str:
    """The words of an error in one line, never its class alone: KeyError('a') -> "there is no 'a'"."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())[:300]
    if isinstance(error, KeyError):
        return f"there is no {text}"
    return text or f"an error without words ({type(error).__name__})"


def kind_and_reason(error: BaseException) -> str:
    """The class of an error and its words in one line: what nobody has foreseen needs both."""
    words = reason(error)
    return words if words.startswith("an error without words") else f"{type(error).__name__}: {words}"


def plain(text: str) -> str:
    r"""The text with escapes such as \x1b for what would command a terminal: names in a message are data.

    Escaped are control characters, line breaks, invisible marks that turn the direction of reading, and bytes of file
    names that are not UTF-8.
    """
    return text if text.isprintable() else "".join(c if _shown(c) else _escape(c) for c in text)


def as_ascii(text: str) -> str:
    """The text in ASCII, for a terminal that cannot show more: lines and dashes as hyphens, others as escapes."""
    return "".join(c if c.isascii() else _ASCII.get(c) or _escape(c) for c in text)


_ASCII = {
    "–": "-", "—": "-", MINUS: "-", "─": "-", "━": "-", "╸": "-", "╺": "-", "…": "...", "×": "x", "→": "->", "±": "+-",
    "·": "*", "†": "+", "’": "'", "‘": "'", "“": '"', "”": '"', "\N{NO-BREAK SPACE}": " ",
}  # fmt: skip


def _shown(character: str) -> bool:
    return character.isprintable() or unicodedata.category(character) == "Zs"  # spaces of other scripts


def _escape(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # how Python keeps a byte that is not UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape", "backslashreplace").decode("ascii")


@dataclass(frozen=True)
class Table:
    """Rows of text under a header, the first column to the left and the others to the right.

    `last_is_total` sets the last row apart, and `notes` are sentences below the table. Raises ValueError for a row with
    another number of cells than the header.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    last_is_total: bool = False
    notes: Sequence[str] = ()

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.header):
                raise ValueError(
                    f"table {self.title!r}: row {list(row)} has {len(row)} cells but the header {len(self.header)}"
                )

    def lines(self) -> list[str]:
        """The table without its title, for a terminal; without a header there are only notes."""
        if not self.header:
            return [*map(plain, self.notes)]
        cells = [[plain(cell) for cell in row] for row in (self.header, *self.rows)]
        first, *others = [max(map(len, column)) for column in zip(*cells, strict=True)]
        header, *body = [
            "  ".join([f" {name:<{first}}", *(f"{cell:>{n}}" for cell, n in zip(row, others, strict=True))]).rstrip()
            for name, *row in cells
        ]
        rule = " " + "─" * (first + sum(others) + 2 * len(others))
        if self.last_is_total and body:
            body.insert(-1, rule)
        return [header, rule, *body, *map(plain, self.notes)]

    def __str__(self) -> str:
        return "\n".join([plain(self.title), *self.lines()])

    def _repr_html_(self) -> str:
        """The table for a notebook; every text is escaped."""

        def cells(row: Sequence[str], tag: str) -> str:
            return "".join(
                f'<{tag} style="text-align:{"right" if place else "left"}">{html.escape(cell)}</{tag}>'
                for place, cell in enumerate(row)
            )

        body = [f"<tr>{cells(row, 'td')}</tr>" for row in self.rows]
        total = f"<tfoot>{body.pop()}</tfoot>" if self.last_is_total and body else ""
        return (
            f"<table><caption>{html.escape(self.title)}</caption><thead><tr>{cells(self.header, 'th')}</tr></thead>"
            f"<tbody>{''.join(body)}</tbody>{total}</table>"
            + "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)
        )


class Shown:
    """A result that says what it shows: sentences, then tables. `print` and notebooks show what the commands print."""

    def lines(self) -> list[str]:
        """Sentences for a terminal."""
        return []

    def tables(self) -> list[Table]:
        """Tables in their order."""
        return []

    def __str__(self) -> str:
        sentences = "\n".join(map(plain, self.lines()))
        return "\n\n".join([*([sentences] if sentences else []), *map(str, self.tables())])

    def _repr_html_(self) -> str:
        sentences = "".join(f"<p>{html.escape(line)}</p>" for line in self.lines())
        return sentences + "".join(table._repr_html_() for table in self.tables())
