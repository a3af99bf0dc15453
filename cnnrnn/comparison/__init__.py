"""The comparison: every method on the same features and splits, in one table.

docs/comparison.md says what each method is and how it is tuned.
"""

from __future__ import annotations

from cnnrnn.comparison.fitting import Method
from cnnrnn.comparison.methods import METHODS, chosen_methods
from cnnrnn.comparison.results import (
    COLUMNS,
    Row,
    markdown_table,
    read_rows,
    table_cells,
    text_table,
)
from cnnrnn.comparison.run import compare, compared_splits, frozen_features

__all__ = [
    "COLUMNS",
    "METHODS",
    "Method",
    "Row",
    "chosen_methods",
    "compare",
    "compared_splits",
    "frozen_features",
    "markdown_table",
    "read_rows",
    "table_cells",
    "text_table",
]
