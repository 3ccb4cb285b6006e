"""What vLLM says and ships about its HTTP routes, for the API's description."""

from pathlib import Path

from starlette.routing import BaseRoute
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.serve import instrumentator
from vllm.utils.argparse_utils import FlexibleArgumentParser

from service.engine.cli import cli
from service.engine.routes import keep_served

SWAGGER_UI = Path(instrumentator.__file__).parent / "static"
"""The folder of `swagger-ui-bundle.js` and `swagger-ui.css`, which vLLM ships for `--enable-offline-docs`."""


def text_routes() -> list[BaseRoute]:
    """The routes that vLLM serves for a text model; no engine is started."""
    args = cli.make_arg_parser(FlexibleArgumentParser()).parse_args(["--enable-scale-out"])
    app = build_app(args, ("generate",))
    keep_served(app)
    return list(app.routes)
