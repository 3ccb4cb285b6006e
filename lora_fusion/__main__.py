"""`python -m lora_fusion`, the same as `lora-fusion`."""

import sys

from lora_fusion.cli import main

if __name__ == "__main__":
    sys.exit(main())
