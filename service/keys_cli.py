"""`lora-fusion keys`: make, list, rotate and revoke API keys, of a running server or, --offline, of its registry."""

import argparse
import asyncio
import json
import sys
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from pydantic import ValidationError

from service.audit import Actor, current_actor
from service.callers import ROLES
from service.errors import ApiError
from service.http_client import DEFAULT_URL, AnswerError, ask, ask_pages
from service.settings import CLIENT_KEY, SettingsError, read_settings
from service.validation import describe_fault

COLUMNS = ("id", "role", "tenant", "label", "state", "created", "expires", "used")
ONLINE = f"A running server is asked with the admin's key in {CLIENT_KEY}, which no list of processes shows."
OFFLINE = "change the registry that the FUSION_* variables name, which no server uses: for the first key"


def _make_parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=f"{__doc__} {ONLINE}")
    commands = parser.add_subparsers(dest="command", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--url", default=DEFAULT_URL, help=f"the server ({DEFAULT_URL})")
    shared.add_argument("--offline", action="store_true", help=OFFLINE)
    shared.add_argument("--json", action="store_true", help="print JSON")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", parents=[shared])

    create = add("create", "make a key, and show its secret this once")
    create.add_argument("--role", choices=ROLES, required=True, help="what it may do; the first key is an admin's")
    create.add_argument("--tenant", default="", help="whose things it has; without it the operator's, which are public")
    create.add_argument("--label", default="", help="what people call it")
    create.add_argument("--expires", metavar="WHEN", help="a time, or a span as 90d or 12h; without it never")
    add("list", "list all keys, without secrets")
    rotate = add("rotate", "give a key a new secret, and show it this once")
    rotate.add_argument("id")
    rotate.add_argument(
        "--grace", default="24h", metavar="SPAN", help="for how long the old secret is taken, too (24h)"
    )
    add("revoke", "end a key at once").add_argument("id")
    return parser


def _ask_server(args: argparse.Namespace) -> Any:
    """What the server answers to the command."""
    match args.command:
        case "create":
            body = {"role": args.role, "tenant": args.tenant, "label": args.label, "expires": args.expires}
            return ask(args.url, "POST", "/v1/keys", json=body)
        case "list":
            return list(ask_pages(args.url, "/v1/keys"))
        case "rotate":
            return ask(args.url, "POST", f"/v1/keys/{args.id}/rotate", json={"grace": args.grace})
        case _:
            return ask(args.url, "DELETE", f"/v1/keys/{args.id}")


def _change_registry(args: argparse.Namespace) -> Any:
    """The same, done to the registry itself."""
    from service.key_cards import KeyBody, RotateBody, list_all, make, rotate
    from service.key_ring import KeyRing, has_operator_key
    from service.keys import Keys
    from service.registry import Registry

    settings = read_settings()
    settings.data.mkdir(mode=0o700, parents=True, exist_ok=True)
    shared, timeout_s = bool(settings.store), settings.database_timeout_s
    folder = None if shared else settings.data  # which a replica may be using
    registry = Registry(settings.registry_url, timeout_s=timeout_s, shared=shared, folder=folder)
    current_actor.set(Actor(role="operator", address="offline"))
    try:
        ring = KeyRing(registry, ["vllm"] if has_operator_key(settings) else [])
        keys = Keys(settings, registry, asyncio.Lock(), ring)
        calls: dict[str, Callable[[], Coroutine[Any, Any, Any]]] = {
            "create": lambda: make(keys, KeyBody(**{name: getattr(args, name) for name in KeyBody.model_fields})),
            "list": lambda: list_all(keys),
            "rotate": lambda: rotate(keys, args.id, RotateBody(grace=args.grace)),
            "revoke": lambda: keys.revoke(args.id),
        }

        async def work() -> Any:
            answer = await calls[args.command]()
            await registry.settle()  # behind what writes the audit's file
            return answer

        answer = asyncio.run(work())
    finally:
        registry.close()
    return [card.model_dump() for card in answer] if isinstance(answer, list) else answer and answer.model_dump()


def _print(args: argparse.Namespace, answer: Any) -> None:
    if args.json:
        print(json.dumps(answer, indent=1))
    elif args.command == "list":
        rows = [COLUMNS, *(tuple(str(key[name] or "") for name in COLUMNS) for key in answer)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    elif args.command == "revoke":
        print(f"{args.id} is revoked")
    else:
        print(answer["key"])
        until = f", the old secret until {answer['old_until']}" if answer["old_until"] else ""
        ends = f"ends {answer['expires']}" if answer["expires"] else "never ends"
        note = f"key {answer['id']} of the role {answer['role']}, {ends}{until}; the secret is not shown again"
        print(note, file=sys.stderr)


def main(argv: Sequence[str] | None = None, *, prog: str = "lora-fusion keys") -> int:
    """Run one command; 0: done, 1: refused, 2: invalid settings. A new secret is all of standard output."""
    args = _make_parser(prog).parse_args(argv)
    try:
        answer = _change_registry(args) if args.offline else _ask_server(args)
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ValidationError as error:
        print(f"error: {describe_fault(error.errors())[0]}", file=sys.stderr)
        return 1
    except (AnswerError, ApiError, RuntimeError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    _print(args, answer)
    return 0


if __name__ == "__main__":
    sys.exit(main())
