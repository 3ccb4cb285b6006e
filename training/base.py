"""`python -m training.base OUT`: make the default base model (see `training.builtin.base`)."""

import sys

from training.builtin.base import main

if __name__ == "__main__":
    sys.exit(main())
