"""The language-model head: FP8 matmuls, soft cap and cross-entropy in one op."""

from .numerics import HeadPrecision
from .op import IGNORE_INDEX, fp8_supported, head_logits, head_loss, unsupported

__all__ = ["IGNORE_INDEX", "HeadPrecision", "fp8_supported", "head_logits", "head_loss", "unsupported"]
