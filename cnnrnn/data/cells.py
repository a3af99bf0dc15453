"""The labels in a cell of a table: separated, quoted, or a list as JSON and Python write one."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Container, Iterable
from typing import Any

from cnnrnn.data.files import short

DELIMITERS = (";", "|", ",")
"""What may separate labels, in order of precedence; white space only by option."""
NO_LABELS = frozenset({"nan", "none", "null", "n/a"})

_QUOTES = "'\""
_BRACKETS = {"[": "]", "(": ")", "{": "}"}
_STRING = r"""[uU]?(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
# Nothing is given back (`*+`): else white space could be shared out in ever other ways.
_LIST = re.compile(
    rf"[\[({{]\s*+(?:{_STRING}\s*+(?:,\s*+{_STRING}\s*+)*+,?\s*+)?[\])}}]", re.DOTALL
)


class CellError(ValueError):
    """A cell that cannot be read as labels; the message says what was expected and found."""


def cell_labels(
    text: str, delimiter: str | None, names: Container[str] = ()
) -> tuple[str, ...] | None:
    """Return the labels of a cell, or None for a word that means none, such as `nan`.

    Args:
        text: the cell.
        delimiter: between labels; `space` is any white space, None separates nothing.
        names: labels that are known: a cell that is one of them is not taken apart.

    Raises:
        CellError: a quote or bracket has no other end, or a list holds something else than strings.
    """
    text = text.strip()
    if not text:
        return ()
    if text in names:
        return (text,)
    cell = _unquoted(text)
    if not cell:
        return ()
    if (listed := _list_labels(cell)) is not None:
        return listed
    if cell.lower() in NO_LABELS:
        return None
    pieces = [cell]
    if delimiter is not None:
        pieces = cell.split() if delimiter == "space" else cell.split(delimiter)
    labels = [_unquoted(piece.strip()) for piece in pieces]
    for label in labels:
        if _is_unbalanced(label):
            raise CellError(
                f"labels must have both ends of a quote or bracket, got {short(label)} in "
                f"{short(text)}"
            )
    return tuple(label for label in labels if label)


def shown_delimiter(cells: Iterable[str], names: Container[str] = ()) -> str | None:
    """Return the first of `DELIMITERS` that any cell has; lists and known names do not count."""
    found: set[str] = set()
    for text in cells:
        signs = [sign for sign in DELIMITERS if sign in text and sign not in found]
        if signs and text.strip() not in names and not is_list(text):
            found.update(signs)
    return next((sign for sign in DELIMITERS if sign in found), None)


def is_list(text: str) -> bool:
    """Tell whether a cell is a list of strings."""
    return _LIST.fullmatch(_unquoted(text.strip())) is not None


def looks_separated_by_spaces(cells: Iterable[str]) -> str | None:
    """Return a cell with several words where cells combine the same words again and again."""
    values = {" ".join(text.split()) for text in cells}
    words = {word for value in values for word in value.split()}
    several = sorted(value for value in values if " " in value)
    return several[0] if several and len(words) < len(values) else None


def _list_labels(text: str) -> tuple[str, ...] | None:
    """Return the strings of a list, None where the text is no list."""
    if text == "set()":
        return ()
    if text[0] not in _BRACKETS or text[-1] != _BRACKETS[text[0]]:
        return None
    values = _parsed(text)
    if _LIST.fullmatch(text) and values is not None:  # so that all of them are strings
        return tuple(label for value in values if (label := str(value).strip()))
    inside = text[1:-1].strip()
    if inside and (inside[0] in _QUOTES or inside[-1] in _QUOTES or values is not None):
        raise CellError(f"labels must be a list of strings, got {short(text)}")
    return None


def _parsed(text: str) -> list[object] | None:
    """Return the values of a list in JSON or Python, None where it is neither."""
    values: Any = None
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        try:
            values = ast.literal_eval(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            return None
    if isinstance(values, (list, tuple)) or values == {}:
        return list(values)
    return sorted(values, key=str) if isinstance(values, set) else None


def _unquoted(text: str) -> str:
    """Take off quotes around the whole text; those of `'a','b'` are not."""
    if len(text) < 2 or text[0] not in _QUOTES or text[-1] != text[0]:
        return text
    inside = text[1:-1]
    if re.search(rf"(?<!\w){text[0]}|{text[0]}(?!\w)", inside):
        return text
    return inside.strip()


def _is_unbalanced(label: str) -> bool:
    """Tell whether a label begins or ends with a quote or bracket that has no other end in it."""
    for end in (label[:1], label[-1:]):
        if end and end in _QUOTES and (label.count(end) % 2 or label[0] == label[-1] == end):
            return True
        for left, right in _BRACKETS.items():
            if end and end in (left, right) and label.count(left) != label.count(right):
                return True
    return False
