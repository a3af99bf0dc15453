"""How values are written in messages and in JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any


def listed(names: Iterable[object], most: int = 8) -> str:
    """List the first names of many: `a, b and 3 more`."""
    texts = [str(name) for name in names]
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + more


def without_nan(value: Any) -> Any:
    """Return a JSON value with null for every number that is not finite, at any depth."""
    if isinstance(value, dict):
        return {key: without_nan(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
