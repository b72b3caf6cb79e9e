"""Correctness outside pytest too: metrics, cases, must-fail controls, and the run over them."""
