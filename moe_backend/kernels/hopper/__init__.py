"""Grouped GEMMs for NVIDIA Hopper (compute capability 9.0)."""
