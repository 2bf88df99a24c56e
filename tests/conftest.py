"""Eight virtual CPU devices for every test, made before anything can ask for another number."""

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
assert len(jax.devices()) == 8
