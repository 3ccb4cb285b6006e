"""The child process that parses and renders clients' chat templates; `templates` starts it and talks to it."""

import sys
from collections.abc import Iterator
from typing import Any

import jinja2
import jinja2.meta
from jinja2 import nodes
from transformers.utils import chat_template_utils

from service.engine.limited_child import run

MAX_REASON = 500
"""Characters of an error that are answered."""
MAX_NAME = 100
"""Characters of a name that are answered."""
Expression = nodes.Expr | nodes.Node | None
SAMPLES: list[dict[str, Any]] = [
    {
        "template": "{% for m in messages %}{{ m.content | tojson }}{{ strftime_now('%Y') }}{% endfor %}",
        "messages": [{"role": "user", "content": "x"}],
        "arguments": {},
    },
    {"template": "{{ raise_exception('x') }}{% for"},
]


def require(owner: Any, name: str) -> None:
    """End this process when a library no longer has a private name that is used here."""
    if not hasattr(owner, name):
        sys.exit(f"{owner.__name__} has no {name}: install the pins in requirements/")


def _without_filters(node: Expression) -> Expression:
    while isinstance(node, nodes.Filter | nodes.Test):
        node = node.node
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
        return _without_filters(node.node)
    return node


def _is_content(node: Expression, names: set[str]) -> bool:
    """Whether an expression is the content of a message, or a variable among `names`."""
    node = _without_filters(node)
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
    if isinstance(node, nodes.Getattr):
        return node.attr == "content"
    return isinstance(node, nodes.Name) and node.name in names


def _content_names(tree: nodes.Template) -> set[str]:
    """Variables that hold the content of a message: by their name, or as parameters of macros that get one."""
    macros = tree.find_all(nodes.Macro)
    return {"content"}.union(*(_content_parameters(macro, tree) for macro in macros))


def _content_parameters(macro: nodes.Macro, tree: nodes.Template) -> Iterator[str]:
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Name) and call.node.name == macro.name:
            for parameter, value in zip(macro.args, call.args, strict=False):
                if _is_content(value, set()):
                    yield parameter.name
            yield from (keyword.key for keyword in call.kwargs if _is_content(keyword.value, set()))


def inspect(template: str) -> dict[str, Any]:
    """The variables that a template reads; whether it goes through the parts of a content ("openai") or takes it as
    one text ("string"); and a function that it calls and nothing defines, or None.
    """
    environment = _compile(template).environment
    tree = environment.parse(template)
    names = _content_names(tree)
    parts = any(_is_content(loop.iter, names) for loop in tree.find_all(nodes.For))
    variables = jinja2.meta.find_undeclared_variables(tree)
    unknown = sorted(_called_names(tree) & variables - environment.globals.keys())
    return {
        "format": "openai" if parts else "string",
        "variables": sorted(variables),
        "unknown": unknown[0][:MAX_NAME] if unknown else None,
    }


def _called_names(tree: nodes.Template) -> set[str]:
    """Names that are called, those left out for which the template asks whether they are there."""
    calls = {call.node.name for call in tree.find_all(nodes.Call) if isinstance(call.node, nodes.Name)}
    tests = {test.node.name for test in tree.find_all(nodes.Test) if isinstance(test.node, nodes.Name)}
    return calls - tests


def _compile(template: str) -> jinja2.Template:
    require(chat_template_utils, "_compile_jinja_template")
    compiled: jinja2.Template = chat_template_utils._compile_jinja_template(template)
    return compiled


def render(template: str, messages: list[Any], arguments: dict[str, Any], max_bytes: int) -> dict[str, Any]:
    """The text that the template makes of `messages`, as the tokenizer's `apply_chat_template` would."""
    (text,), _ = chat_template_utils.render_jinja_template([messages], chat_template=template, **arguments)
    if len(text) > max_bytes or len(text.encode()) > max_bytes:
        return {"error": f"its text is longer than {max_bytes} bytes"}
    return {"text": text}


def answer(request: dict[str, Any], max_bytes: int) -> dict[str, Any]:
    """What a request asks for, or an `error` that says why the template cannot be used."""
    try:
        if "messages" in request:
            return render(request["template"], request["messages"], request["arguments"], max_bytes)
        return inspect(request["template"])
    except jinja2.TemplateSyntaxError as error:
        reason = f"not a valid Jinja template, line {error.lineno}: {error.message}"
    except MemoryError:
        reason = "it needs too much memory"
    except RecursionError:
        reason = "it is nested too deeply"
    except Exception as error:  # whatever a template raises is said to the client that brought it
        reason = str(error) or type(error).__name__
    return {"error": reason[:MAX_REASON]}


if __name__ == "__main__":
    run(answer, SAMPLES)
