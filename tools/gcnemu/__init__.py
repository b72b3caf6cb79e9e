"""gcnemu: run gfx942 and gfx950 machine code on any CPU, and check what it does.

`program.Program(assembly)(...)` runs one launch; `triton_driver` and `flydsl_driver` run unmodified
launches of those languages on CPU tensors. docs/amd.md says what is modelled.
"""
