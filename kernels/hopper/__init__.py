"""The ground floor of all Hopper kernels: what a kernel is made of, and the matmul that takes an epilogue."""
