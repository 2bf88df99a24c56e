"""Attention windows as users name them: in tokens."""

from ..config import Config
from ..errors import UsageError
from ..kernels.block_mask import BLOCK_SIZE
from ..schedules import step_of_window


def step_with_window(option: str, tokens: int, config: Config) -> int:
    """Return the first step of a run at which the long window has `tokens` tokens.

    Raises:
      UsageError: it never has; the message begins with `option`.
    """
    final = config.optimizer.window_tokens
    blocks, rest = divmod(tokens, BLOCK_SIZE)
    try:
        return step_of_window(0 if rest else blocks, config.steps, final)
    except ValueError:
        largest = -(-final // BLOCK_SIZE) * BLOCK_SIZE
        raise UsageError(
            f"{option} {tokens}: a run's windows are multiples of {BLOCK_SIZE} tokens, here up to {largest}"
        ) from None
