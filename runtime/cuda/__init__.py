"""The CUDA engine: kernels (*.cu), and what finds, fills and drives a GPU."""
