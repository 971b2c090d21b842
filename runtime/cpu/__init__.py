"""The CPU backend: numba kernels on memory-mapped weights, run by a pool of threads."""

from .operators import CPU

__all__ = ["CPU"]
