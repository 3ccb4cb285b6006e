"""A training row as a chat."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Message = tuple[str, str]
"""(role, content); the roles are system, user, assistant and tool."""


@dataclass(frozen=True, slots=True)
class Chat:
    """One row: its turns, and where it came from."""

    messages: tuple[Message, ...]
    where: str
    muted: frozenset[int] = frozenset()
    """Numbers of the assistant turns that have no loss."""
    extras: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    """What the chat template gets of a turn besides role and content (tool_calls, name, …), by its number."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """The functions that the chat template lists, in OpenAI's form."""

    @property
    def answer(self) -> str:
        """The last assistant turn."""
        return self.messages[-1][1]

    @property
    def prompt(self) -> str:
        """The last user turn."""
        return next(content for role, content in reversed(self.messages) if role == "user")

    def is_empty(self, number: int) -> bool:
        """Whether a turn has neither text nor a tool call."""
        return not self.messages[number][1].strip() and "tool_calls" not in self.extras.get(number, {})

    def serialize(self) -> bytes:
        """All that is learned from the row; rows with the same bytes are duplicates."""
        text = "".join(f"{role}\0{content}\0" for role, content in self.messages)
        if self.muted or self.extras or self.tools:  # plain turns keep the digest that they have always had
            text += json.dumps([sorted(self.muted), dict(self.extras), self.tools], sort_keys=True, default=str)
        return text.encode()
