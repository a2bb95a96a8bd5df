"""Write what the twins of experiments begin with: twins/models and twins/data.

    python -m ain_jax.twins
    python launch/local.py --exp ain_7b_twin

It takes some seconds and 30 MB; nothing is downloaded.
"""

import argparse
import os
import sys
from pathlib import Path

from ain_jax import twins


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ain_jax.twins", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("twins"), help="where they go")
    folder = parser.parse_args().folder
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    for place in twins.write(folder):
        print(place)
    return 0


if __name__ == "__main__":
    sys.exit(main())
