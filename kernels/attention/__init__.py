"""Block-sparse attention: the op, its reference, its fast paths, and pictures of its masks."""

from .op import block_sparse_attention, unsupported

__all__ = ["block_sparse_attention", "unsupported"]
