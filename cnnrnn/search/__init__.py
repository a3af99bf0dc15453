"""Search over label paths: the reference, the compiled searches and their result."""

from cnnrnn.search.checks import NonFiniteError, OnNonFinite
from cnnrnn.search.engine import beam_search
from cnnrnn.search.exact import BestSets, best_sets
from cnnrnn.search.result import SearchResult, SearchStats

__all__ = [
    "BestSets",
    "NonFiniteError",
    "OnNonFinite",
    "SearchResult",
    "SearchStats",
    "beam_search",
    "best_sets",
]
