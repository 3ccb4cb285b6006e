"""Names that this server does not have, as other clients and servers spell those it has: `openai/balanced`,
`HuggingFaceTB/SmolLM2-135M-Instruct`, `balanced:latest`.
"""

import re
from collections.abc import Collection, Iterator

from adapters import did_you_mean

_RECIPE_SIGNS = re.compile(r"[*+(){}=,`\"]")
_TAG = re.compile(r"[:@#][^/:@#]*$")


def is_name(text: str) -> bool:
    """Whether `text`, which is not a valid recipe, is meant as a name: it has no operator or bracket of a recipe, does
    not start with a sign or a quote, and has blanks only if it starts with a letter.
    """
    text = text.strip()
    if not text or _RECIPE_SIGNS.search(text) or text[0] in "-'":
        return False
    return text[0].isalpha() or not re.search(r"\s", text)


def suggest(text: str, known: Collection[str]) -> str:
    """The clause "did you mean 'balanced'?" with the known name that is another form of `text`, or else is most like
    it; empty when there is none.
    """
    folded = {name.casefold(): name for name in known}
    for name in known:
        for form in _strip(name):
            folded.setdefault(form.casefold(), name)
    forms = list(_strip(text))
    near = next((folded[form.casefold()] for form in forms if form.casefold() in folded), None)
    if near is not None:
        return f"did you mean {near!r}?"
    return next(filter(None, (did_you_mean(form, known) for form in forms)), "")


def _strip(text: str) -> Iterator[str]:
    """`text`, then without its tag, its owner's name, and both."""
    text = text.strip()
    plain = _TAG.sub("", text)
    for form in dict.fromkeys((text, plain, text.rpartition("/")[2], plain.rpartition("/")[2])):
        if form:
            yield form
