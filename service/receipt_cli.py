"""`lora-fusion verify`: what a receipt states, and which of it holds, offline."""

import argparse
import hashlib
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from adapters.recipes import RecipeError, fusion_digest, parse
from service.policy_rules import read_rules
from service.receipt_keys import ReceiptError, make_key, read_key
from service.settings import SettingsError

RECEIPT = re.compile(r"[\w-]+\.[\w-]+\.[\w-]+")
MAX_FILE = 2**20
Check = tuple[str, bool | None, str]
"""What is checked, whether it holds (None: it could not be compared), and why."""


def main(argv: Sequence[str] | None = None, *, prog: str = "lora-fusion verify") -> int:
    """Verify a receipt, or make a key. Exit 0 all that could be compared holds, 1 something does not, 2 bad usage."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument(
        "receipt", nargs="?", help="the receipt, a file with it (headers, too), or - for standard input"
    )
    parser.add_argument("--key", help="file with the public key, or the secret of HMAC")
    parser.add_argument("--request", type=Path, metavar="FILE", help="the body that was sent, byte for byte")
    parser.add_argument("--policy", metavar="FILE", help="the policy that is to have been in force")
    parser.add_argument("--json", action="store_true", help="print the receipt's content as JSON")
    parser.add_argument("--make-key", type=Path, metavar="FILE", help="write a new pair of keys: FILE and FILE.pub")
    args = parser.parse_args(argv)
    try:
        if args.make_key is not None:
            private, public = make_key(args.make_key)
            print(f"{private}: the private key, for FUSION_RECEIPT_KEY; {public}: the public one, for `verify --key`")
            return 0
        if args.receipt is None or args.key is None:
            parser.error("expected a receipt and --key, or --make-key")
        text, key = _read_text(args.receipt), read_key(args.key)
    except (OSError, ReceiptError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        content = key.verify(text)
    except ReceiptError as error:
        print(f"signature    does not hold: {error}")
        return 1
    try:
        checks = [("signature", True, f"{key.algorithm}, key {key.id}"), *check(content, args.request, args.policy)]
    except (OSError, SettingsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(content, indent=1))
    for what, holds, why in checks:
        state = {True: "holds", False: "does not hold", None: "not compared"}[holds]
        print(f"{what:<12} {state}: {why}", file=sys.stderr if args.json else sys.stdout)
    return 0 if all(holds is not False for _, holds, _ in checks) else 1


def check(content: dict[str, Any], request: Path | None = None, policy: str | None = None) -> Iterator[Check]:
    """What of a receipt's content can be checked without the server."""
    yield "answer", True, f"{content.get('time')}, by {_describe(content)} of the registry {content.get('registry')}"
    for what, call in (("digest", _check_digest), ("weights", _check_weights)):
        if content.get("digest") is not None:
            yield _guard(what, call, content)
    if request is None:
        yield "request", None, "--request FILE compares the body that was sent"
    else:
        found = hashlib.sha256(request.read_bytes()).hexdigest()
        yield "request", found == content.get("request"), f"the body's sha256 is {found}"
    stated = content.get("policy")
    stated = stated if isinstance(stated, dict) else {}
    rules = (
        "exempt from it" if stated.get("exempt") else f"rules {', '.join(map(str, stated.get('rules') or ['none']))}"
    )
    if policy is None:
        yield "policy", None, f"{str(stated.get('id'))[:12]}, {rules}; --policy FILE compares it"
    else:
        yield "policy", read_rules(policy).digest() == stated.get("id"), f"{str(stated.get('id'))[:12]}, {rules}"


def _guard(what: str, call: Callable[[dict[str, Any]], Check], content: dict[str, Any]) -> Check:
    try:
        return call(content)
    except (RecipeError, TypeError, ValueError, AttributeError, LookupError) as error:
        return what, False, f"what it states cannot be read: {error}"


def _describe(content: dict[str, Any]) -> str:
    if content.get("digest") is None:
        return f"the base {content.get('base')}"
    profile = f"the profile {content['profile']}, " if content.get("profile") else ""
    recipe = content.get("recipe")
    return f"{profile}{recipe if isinstance(recipe, str) else 'a recipe too long to be told'}"


def _check_digest(content: dict[str, Any]) -> Check:
    """Whether the fusion's digest is that of the recipe over these adapters on this base."""
    recipe, parents = content["recipe"], content["parents"]
    if not isinstance(recipe, str) or "sha256" in parents:
        return "digest", None, f"{content['digest']}; the recipe is too long to be told"
    parsed = parse(recipe, max_weight=math.inf)
    found = fusion_digest(parsed, base=content["base"], parents={name: parents[name] for name in parsed.parents})
    return "digest", found == content["digest"], f"{content['digest']} of the recipe, its adapters and the base"


def _check_weights(content: dict[str, Any]) -> Check:
    """Whether what a gate chose lies within the recipe's bounds."""
    recipe, weights = content["recipe"], content.get("weights", [])
    if not isinstance(recipe, str) or not isinstance(weights, list):
        return "weights", None, "they are too long to be told"
    gate = parse(recipe, max_weight=math.inf).gate
    if gate is None:
        return "weights", True, "those of the recipe"
    if not weights:
        return "weights", None, f"what the gate {gate.by!r} chose was not known when the answer began"
    bounds = dict(gate.bounds)
    inside = all(low <= chosen["weights"][name] <= high for chosen in weights for name, (low, high) in bounds.items())
    return "weights", inside, f"the gate {gate.by!r} chose {json.dumps(weights)}"


def _read_text(source: str) -> str:
    """The first receipt in the text, a file or standard input."""
    if source == "-":
        text = sys.stdin.read(MAX_FILE)
    elif RECEIPT.fullmatch(source) and not Path(source[:255]).is_file():
        return source
    else:
        with open(source, encoding="utf-8", errors="replace") as file:
            text = file.read(MAX_FILE)
    found = re.search(r"(?im)^x-fusion-receipt:\s*(\S+)\s*$", text)
    return found[1] if found else text.strip()


if __name__ == "__main__":
    sys.exit(main())
