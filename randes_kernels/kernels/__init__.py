"""Fused Triton kernels, one a file: the equation, the kernel, its launcher."""
