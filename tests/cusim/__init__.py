"""A simulator that runs this project's CUDA kernels on the CPU; sim.py says how."""
