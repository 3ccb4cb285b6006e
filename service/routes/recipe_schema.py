"""The JSON form of a recipe, as OpenAPI describes it."""

from typing import Annotated, Any

from pydantic import WithJsonSchema

JSON_RECIPE = {
    "type": "object",
    "required": ["adapters"],
    "properties": {
        "adapters": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["name"],
                "properties": {"name": {"type": "string"}, "weight": {"type": ["number", "object"], "default": 1}},
                "additionalProperties": False,
            },
        },
        "method": {"type": "string", "default": "sum"},
        "answer": {"type": "boolean", "default": False, "description": "all weights are 0 in the prompt"},
        "gate": {
            "type": "object",
            "required": ["by", "bounds"],
            "properties": {
                "by": {"type": "string"},
                "bounds": {"type": "object", "additionalProperties": {"type": "array", "items": {"type": "number"}}},
            },
            "additionalProperties": False,
        },
    },
    "additionalProperties": {"description": "an option of the method"},
}
FusionValue = Annotated[
    Any,  # the recipe language checks it, and says what is wrong and where
    WithJsonSchema(
        {
            "anyOf": [{"type": "string"}, JSON_RECIPE],
            "description": "a recipe as text or in JSON form, or the name of a profile",
            "examples": ["0.6*task + 0.4*safety", {"adapters": [{"name": "task", "weight": 0.6}]}],
        }
    ),
]
