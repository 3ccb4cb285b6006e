"""vLLM's command line, which its releases keep in different modules."""

from importlib import import_module
from typing import Any

import vllm

from service.engine.supported import VERSIONS, check_version, public_version, require

check_version(vllm.__version__)
cli: Any = import_module(VERSIONS[public_version(vllm.__version__)].cli)
require(cli, "make_arg_parser", "validate_parsed_serve_args", "propagate_flash_late_interaction")
