"""Grouped experts in Triton, for NVIDIA and AMD GPUs: `kernel.TritonKernel`."""
