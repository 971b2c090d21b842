"""The CPU backend: numba kernels on memory-mapped weights, run by a pool of threads."""
