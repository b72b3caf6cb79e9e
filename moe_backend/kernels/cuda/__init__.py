"""CUDA C++ compiled at run time and launched; the sources are beside the kernels that use them."""
