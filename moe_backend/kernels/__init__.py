"""Kernels: one module or folder per provider, chosen by `registry`."""
