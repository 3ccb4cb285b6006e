"""`lora-fusion audit`: check the audit of a server, or its files."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from service.audit import MAX_ENTRIES
from service.audit_check import BrokenChainError, check_chain, merge, read_lines
from service.http_client import DEFAULT_URL, AnswerError, ask_pages

HELP = """Check that no entry was changed, removed or moved, and print the head: the hash of the last one. Keep it
elsewhere: --head with it finds an end that was cut off, or an audit that was written anew as a whole."""


def main(argv: Sequence[str] | None = None, *, prog: str = "lora-fusion audit") -> int:
    """Check an audit; 0: whole, 1: broken, 2: it cannot be read."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="verify")
    verify = commands.add_parser("verify", help="check an audit's chain of hashes", description=HELP)
    verify.add_argument(
        "files", nargs="*", type=Path, metavar="FILE", help="audit.jsonl, and the older files beside it"
    )
    verify.add_argument("--url", default=DEFAULT_URL, help=f"without a file: the server to ask ({DEFAULT_URL})")
    verify.add_argument("--start", metavar="HASH", help="hash of the entry before the first, where older ones are gone")
    verify.add_argument("--head", metavar="HASH", help="a head from before, which must still be there")
    args = parser.parse_args(argv)
    try:
        start = args.start
        if args.files:
            entries = merge(read_lines(file.read_text().splitlines(), str(file)) for file in args.files)
        else:
            entries = {int(row["id"]): row for row in ask_pages(args.url, "/v1/audit")}
            if len(entries) >= MAX_ENTRIES:  # older ones have made room
                start = start or str(entries[min(entries)]["entry"]["previous"])
        report = check_chain(entries, start=start, head=args.head)
    except (OSError, UnicodeDecodeError, AnswerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenChainError as error:
        print(f"broken: {error}", file=sys.stderr)
        return 1
    print(f"whole: entries {report.first} to {report.last}\nhead: {report.head}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
