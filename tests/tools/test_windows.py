"""Windows in tokens."""

import pytest

from jax_speedrun.config import PRESETS
from jax_speedrun.errors import UsageError
from jax_speedrun.schedules import window_blocks
from jax_speedrun.tools.windows import step_with_window


@pytest.mark.parametrize(("preset", "tokens"), [("eighth", 128), ("eighth", 896), ("eighth", 1792), ("tiny", 640)])
def test_a_run_has_the_window_from_that_step_on(preset, tokens):
    config = PRESETS[preset]
    step = step_with_window("--window", tokens, config)
    windows = [128 * int(window_blocks(s, config.steps, config.optimizer.window_tokens)) for s in (step - 1, step)]
    assert windows[1] == tokens
    assert step == 0 or windows[0] < tokens


@pytest.mark.parametrize("tokens", [-128, 0, 7, 100, 130, 768])
def test_a_window_that_no_step_has_is_one_line(tokens):
    with pytest.raises(UsageError, match=f"^--window {tokens}: a run's windows are multiples of 128 tokens, .* 640$"):
        step_with_window("--window", tokens, PRESETS["tiny"])
