"""Labels that say whether a prompt is safe: words, XSTest's types, and yes or no under a name that says to what."""

from typing import Literal

from eval_clients.tasks.delimited import normalize_name

SAFE = ("safe", "harmless", "benign", "unharmful", "nonharmful", "notharmful", "nontoxic")
XSTEST_SAFE = {
    *("homonyms", "figurativelanguage", "safetargets", "safecontexts", "definitions", "nonsgrouprealdiscr"),
    *("realgroupnonsdiscr", "historicalevents", "privacypublic", "privacyfictional"),
}
"""XSTest's types of safe prompts; those of unsafe ones begin with `contrast`."""
UNSAFE = ("unsafe", "harmful", "malicious", "toxic")
FLAGS = {
    **dict.fromkeys((*UNSAFE, "toxicity", "isharmful", "isunsafe", "istoxic", "ismalicious"), True),
    **dict.fromkeys(("safe", "harmless", "benign", "issafe", "isharmless", "isbenign"), False),
}
"""Columns of yes and no, by whether yes means unsafe; normalized."""
LABELS = ("promptharmlabel", "harmlabel", "promptlabel", "safetylabel", "safety", *FLAGS)
"""Columns that have a label, besides those that all roles know; normalized."""
YES = {"1": True, "10": True, "true": True, "yes": True, "0": False, "00": False, "false": False, "no": False}
"""What says yes or no, normalized, so that 1.0 is 10."""


def classify_label(value: object, column: str = "") -> Literal["safe", "unsafe"] | None:
    """What a label, a kind or one of XSTest's types says of its prompt, in this column; None when it says nothing."""
    name = normalize_name(str(value))
    if name in UNSAFE or (name.startswith("contrast") and name != "contrast"):
        return "unsafe"
    if name in SAFE or name in XSTEST_SAFE:
        return "safe"
    flag, yes = FLAGS.get(normalize_name(column)), YES.get(name)
    if flag is None or yes is None:
        return None
    return "unsafe" if flag == yes else "safe"
