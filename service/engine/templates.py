"""Clients' chat templates, rendered by child processes with limits; this process only carries their text.

A template is a program: it may loop for ever, fill the memory, and already its compilation computes constants. vLLM
gets the text that a child has made of a conversation, so tokens, limits and all else are as with the base's template.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from service.engine.children import ChildError, ChildLimits, Children, ChildrenBusyError

CPU_S, WALL_S = 1.0, 5.0
"""Per render. A long conversation takes some milliseconds of CPU."""
MEMORY_BYTES = 256 * 2**20
MAX_TEMPLATES = 256
"""Templates whose variables are remembered."""
SAMPLE = [
    {"role": "user", "content": "Hello."},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Name three rivers."},
]
"""Without a system turn: many templates refuse one."""
SWITCHED_OFF = "this server takes no chat templates from clients; its operator can set FUSION_CLIENT_TEMPLATES=true"


TemplateError = ChildError
TemplatesBusyError = ChildrenBusyError


@dataclass(frozen=True, slots=True)
class ClientTemplate:
    """A template's text and what a child has found out about it."""

    text: str
    content_format: str
    variables: frozenset[str]
    unknown: str | None = None
    """A function that it calls and that nothing defines, if there is one."""


class TemplateRenderer(Children):
    """Renders clients' templates, each text at most `max_bytes` long."""

    def __init__(self, max_bytes: int) -> None:
        limits = ChildLimits(MEMORY_BYTES, max_bytes, CPU_S, WALL_S)
        super().__init__("service.engine.template_child", "chat templates", limits)
        self._known: OrderedDict[str, ClientTemplate] = OrderedDict()

    async def open(self, text: str) -> ClientTemplate:
        """What is known about a template; `TemplateError` when it cannot be parsed within the limits."""
        if text not in self._known:
            reply = await self.ask({"template": text})
            template = ClientTemplate(text, reply["format"], frozenset(reply["variables"]), reply["unknown"])
            self._known[text] = template
            if len(self._known) > MAX_TEMPLATES:
                self._known.popitem(last=False)
        self._known.move_to_end(text)
        return self._known[text]

    async def render(self, text: str, messages: Sequence[Any], arguments: Mapping[str, Any]) -> str:
        """The text that a template makes of `messages`; `arguments` are those of `apply_chat_template`."""
        reply = await self.ask({"template": text, "messages": messages, "arguments": arguments})
        return str(reply["text"])

    async def check(self, text: str) -> None:
        """Raise `TemplateError` unless a template makes a text of a single turn and of a short conversation, and all
        functions that it calls are known.
        """
        template = await self.open(text)
        sample: list[dict[str, Any]] = [dict(turn) for turn in SAMPLE]
        if template.content_format == "openai":
            sample = [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in sample]
        for turns in (sample[:1], sample):
            await self.render(text, turns, {"add_generation_prompt": True})
        if template.unknown:
            raise TemplateError(f"it calls {template.unknown!r}, a function that chat templates do not have")
