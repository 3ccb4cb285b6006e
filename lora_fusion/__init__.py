"""The `lora-fusion` command, and the adapters that ship with it.

The work is done by the packages `adapters`, `service`, `training` and `eval_clients`.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("lora-fusion")
except PackageNotFoundError:  # run from a checkout
    __version__ = "0+checkout"

__all__ = ["__version__"]
