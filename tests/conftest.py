"""Eight virtual CPU devices for every test, made before anything can ask for another number, and a cache of its own.

Hypothesis draws the same examples every time, so that one commit has one verdict; to look for new ones,
`pytest --hypothesis-profile explore`.
"""

import os
import signal
import tempfile

import jax
from hypothesis import settings

# XLA ends a process whose devices wait 40 s for each other. Eight of them on two busy cores may.
PATIENCE = "--xla_cpu_collective_call_terminate_timeout_seconds=600 --xla_cpu_collective_timeout_seconds=600"
# Tests wait for the compiler more than for what it makes.
QUICK = "--xla_backend_optimization_level=1"
os.environ["XLA_FLAGS"] = f"{QUICK} {PATIENCE} {os.environ.get('XLA_FLAGS', '')}".strip()
# A shell's background jobs ignore SIGINT, and so would all that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Neither what the user has compiled decides a test, nor an earlier run of the tests.
CACHE = tempfile.TemporaryDirectory(prefix="jax_speedrun-tests-", ignore_cleanup_errors=True)
os.environ["XDG_CACHE_HOME"] = CACHE.name
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
# A device takes 32 computations at a time. An interpreted kernel dispatches more of them from inside its own, and waits
# for ever where a test has filled the queue behind it.
jax.config.update("jax_cpu_enable_async_dispatch", False)
assert len(jax.devices()) == 8

settings.register_profile("repeatable", derandomize=True, max_examples=50)
settings.register_profile("explore", derandomize=False, max_examples=1000)
settings.load_profile("repeatable")
