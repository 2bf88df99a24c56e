"""`slow(value, ...)`: a parameter of a test whose case CI alone runs, a rarer one of what another case shows."""

import functools

import pytest

slow = functools.partial(pytest.param, marks=pytest.mark.slow)
