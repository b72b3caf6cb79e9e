"""`moe-backend bench`: our kernels beside the other backends of an installed vLLM, by layer."""
