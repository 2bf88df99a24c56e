"""Embedding lookup, and its gradient from tokens sorted once."""

from .op import embed
from .order import TokenOrder, sort_tokens

__all__ = ["TokenOrder", "embed", "sort_tokens"]
