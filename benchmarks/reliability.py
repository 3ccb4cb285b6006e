"""The table of docs/reliability.md: what the long proofs tried, how often, and what came out."""

import json
from collections.abc import Mapping
from typing import Any

from benchmarks.common import RESULTS

ROWS: Mapping[str, tuple[str, str, str]] = {
    "churn, tiny": (
        "churn on a tiny base, {recipes} recipes of {forms} forms, {tenants} tenants",
        "{requests:,} requests",
        "{wrong} wrong of {compared:,} compared, {lost} lost; memory × {memory_growth} from the second quarter to the "
        "last one; open files {open_files[0]:g} and {open_files[1]:g}, series {series[0]:g} and {series[1]:g} then",
    ),
    "churn, smollm2-135m-instruct": (
        "churn on the shipped base, {recipes} recipes of {forms} forms, {tenants} tenants",
        "{requests:,} requests",
        "{wrong} wrong of {compared:,} compared, {lost} lost; plain sums within {largest_difference_from_peft:.0e} of "
        "PEFT's",
    ),
    "faults, disk": (
        "faults at random moments, with SQLite: {drawn}",
        "{faults} faults",
        "{survived} survived; {acknowledged_changes:,} acknowledged changes, none lost; {answers_compared:,} answers, "
        "none wrong; longest until all was right again: {longest_s:g} s",
    ),
    "faults, database": (
        "faults at random moments, with PostgreSQL: {drawn}",
        "{faults} faults",
        "{survived} survived; {acknowledged_changes:,} acknowledged changes, none lost; {answers_compared:,} answers, "
        "none wrong; longest until all was right again: {longest_s:g} s",
    ),
    "restart": (
        "start to the first right answer after kill -9, against one after SIGTERM",
        "{pairs} pairs",
        "ratio of medians {ratio}",
    ),
    "fuzz": (
        "schemathesis as user, deployer and admin, statefully too, {operations} operations",
        "{cases:,} cases",
        "{server_errors} server errors, {breaches} breaches of the description",
    ),
    "load": (
        "{clients_at_once:,} clients at once on the CPU engine, of which {max_requests} are let in",
        "{requests:,} requests",
        "all answered in the end; refusals (429) within {refused_within_s[p99]} s (99 %); memory at most × "
        "{memory_ratio}; the first token as fast as before {recovery_s} s after the end",
    ),
}
"""By part of the result file: what was tried, how often, what came out."""


def render() -> str:
    """The table."""
    parts: dict[str, dict[str, Any]] = json.loads((RESULTS / "reliability.json").read_text())
    lines = ["| tried | how often | came out | seed, date |", "| --- | --- | --- | --- |"]
    for kind, cells in ROWS.items():
        for name in (name for name in parts if name in (kind, f"{kind}, {parts[name]['seed']}")):
            part = parts[name]
            part["drawn"] = ", ".join(f"{kind} {count}" for kind, count in part.get("kinds", {}).items())
            source = f"{part['seed']}, {part['date']}" + ", short" * (part["size"] == "short")
            if name != "fuzz" and 0 < part["limit_s"] < part.get("seconds", 0):  # whole rounds of fuzzing are made
                source += f", ended after {part['limit_s']:g} s"
            lines.append(f"| {' | '.join(cell.format(**part) for cell in cells)} | {source} |")
    return "\n".join(lines)
