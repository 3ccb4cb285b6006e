"""`python -m eval_clients`: the command line of `eval_clients.cli`."""

import sys

from eval_clients.cli import main

if __name__ == "__main__":
    sys.exit(main())
