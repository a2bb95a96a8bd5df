"""python -m ain_jax.plan --exp ain_7b --plan v5p-128"""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

    from ain_jax.plan.command import main

    sys.exit(main(sys.argv[1:], Path("experiments")))
