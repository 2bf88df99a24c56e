"""JAX beside PyTorch on the same card: the work behind scripts/compare.py.

`modes` holds what the script can do; `turns` starts each framework in a process
of its own, one after the other; `worker` is what runs in such a process, against
`jax_side` or `torch_side`; `parity` and `report` judge and show the results.
"""
