"""`moe-backend bench` from a clone: our kernels beside the other backends of the installed vLLM.

python benchmarks/moe.py --help
"""

import sys

from moe_backend.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
