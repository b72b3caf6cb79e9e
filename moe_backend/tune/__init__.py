"""`moe-backend tune`: measure the Hopper kernels' choices for one layer shape and keep the best."""
