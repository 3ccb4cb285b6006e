"""The tables of the docs that are made from the code: settings, routes, fusion methods, data formats."""

import re

from adapters import METHODS
from service.setting_tables import describe
from training.config import list_settings
from training.rows.formats import FORMATS


def settings() -> str:
    """Every setting of the service."""
    return describe()


def methods() -> str:
    """Every fusion method with its options and source."""
    rows = ["| method | what it computes | options (default) | source |", "| --- | --- | --- | --- |"]
    for method in METHODS.values():
        options = ", ".join(f"`{o.name}` ({'required' if o.default is None else o.default})" for o in method.options)
        text, _, link = method.reference.rpartition("https://")
        source = (
            f"[{text.strip(', ') or link.removesuffix('/')}](https://{link})"
            if "https://" in method.reference
            else link
        )
        rows.append(f"| `{method.name}` | {method.summary} | {options} | {source} |")
    return "\n".join(rows)


def formats() -> str:
    """Every format of training rows."""
    rows = ["| format | a row is |", "| --- | --- |"]
    for name, format in FORMATS.items():
        text = re.sub(r"[{[].*[}\]]", r"`\g<0>`", format.summary)
        rows.append(f"| `{name}` | {text} |")
    return "\n".join(rows)


def training_settings() -> str:
    """Every setting of the trainer with its default, as TOML would have it."""
    return "\n".join(["```text", *(f"{key} = {value}" for key, value in list_settings()), "```"])


def routes() -> str:
    """Every route of our own, as the OpenAPI document has it, with the role that it takes; vLLM's are left out, so no
    engine is asked.
    """
    from service.roles import LEAST
    from service.routes.openapi import OWN_ROUTERS, build_document

    own = [route for router in OWN_ROUTERS for route in router.routes]
    roles = {(method, re.sub(":[a-z]+}", "}", path)): role for (method, path), role in LEAST.items()}
    rows = ["| route | role | description |", "| --- | --- | --- |"]
    for path, methods in build_document(own, [])["paths"].items():
        for method, operation in methods.items():
            text = operation.get("description") or f"{operation['summary']}."
            role = roles.get((method.upper(), path), "none")
            rows.append(f"| `{method.upper()} {path}` | {role} | {text.splitlines()[0]} |")
    return "\n".join(rows)
