"""The language-model head: FP8 matmuls, soft cap and cross-entropy in one op."""

from .numerics import HeadPrecision
from .op import fp8_supported, head_logits, head_loss, unsupported

__all__ = ["HeadPrecision", "fp8_supported", "head_logits", "head_loss", "unsupported"]
