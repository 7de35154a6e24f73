"""``python -m kfac_np``: the command line."""

import sys

from kfac_np.cli import main

if __name__ == "__main__":
    sys.exit(main())
