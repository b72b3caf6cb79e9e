"""Grouped experts in Triton, for NVIDIA GPUs: `kernel.TritonKernel`."""
