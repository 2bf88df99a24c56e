"""JAX beside PyTorch on the same card.

`compare` is the command; `modes` holds what it can do; `turns` starts each
framework in a process of its own, one after the other; `worker` is what runs in
such a process, against `jax_side` or `torch_side`; `parity` and `report` judge and
show the results. `reference_torch` is the recipe in PyTorch, `reference_run`
trains it.
"""
