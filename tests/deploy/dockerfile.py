"""Reads Dockerfiles."""

import shlex

Instruction = tuple[str, str]


def parse(dockerfile: str) -> list[Instruction]:
    """Keyword and text of each instruction, in order; comments dropped, continued lines joined."""
    code = "\n".join(line for line in dockerfile.splitlines() if line.strip() and line[0] != "#")
    lines = (line.partition(" ") for line in code.replace("\\\n", " ").splitlines())
    return [(keyword, " ".join(text.split())) for keyword, _, text in lines]


def last(instructions: list[Instruction], keyword: str) -> str:
    return [text for each, text in instructions if each == keyword][-1]


def variables(instructions: list[Instruction]) -> dict[str, str]:
    pairs = [pair for keyword, text in instructions if keyword == "ENV" for pair in shlex.split(text)]
    return dict(pair.split("=", 1) for pair in pairs)
