"""Benchmarks of the kernels, each beside what else could do its work."""
