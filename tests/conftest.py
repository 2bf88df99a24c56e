"""Eight virtual CPU devices for every test, made before anything can ask for another number.

Hypothesis draws the same examples every time, so that one commit has one verdict; to look for new ones,
`pytest --hypothesis-profile explore`.
"""

import jax
from hypothesis import settings

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
assert len(jax.devices()) == 8

settings.register_profile("repeatable", derandomize=True)
settings.register_profile("explore", derandomize=False)
settings.load_profile("repeatable")
