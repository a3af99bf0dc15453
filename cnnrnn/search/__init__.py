"""Beam search over label paths: the specification, the compiled search and their result."""

from cnnrnn.search.engine import NonFiniteError, beam_search
from cnnrnn.search.result import SearchResult, SearchStats

__all__ = ["NonFiniteError", "SearchResult", "SearchStats", "beam_search"]
