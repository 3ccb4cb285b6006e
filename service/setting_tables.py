"""All settings as a table, and as JSON."""

import json
from dataclasses import fields

from service.setting_values import name_type, write_value
from service.settings import Settings, variable


def describe() -> str:
    """All settings as a Markdown table: variable, default, meaning."""
    lines = ["| variable | default | meaning |", "| --- | --- | --- |"]
    for setting in fields(Settings):
        default = write_value(setting.name, setting.default)
        shown = f"`{default}`" if default else "(empty)"
        lines.append(f"| `{variable(setting.name)}` | {shown} | {setting.metadata['help']} |")
    return "\n".join(lines)


def describe_json() -> str:
    """All settings as a JSON list of objects: name, variable, type, default (as the variable's text), help."""
    return json.dumps(
        [
            {
                "name": setting.name,
                "variable": variable(setting.name),
                "type": name_type(setting.type),
                "default": write_value(setting.name, setting.default),
                "help": setting.metadata["help"],
            }
            for setting in fields(Settings)
        ],
        indent=1,
    )
