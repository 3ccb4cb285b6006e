"""Fill the tables of README and docs: `python -m benchmarks.tables [--check]`.

Each stands between `<!-- NAME -->` and `<!-- /NAME -->` and is made from `benchmarks/results/*.json` or, for settings,
routes, methods and formats, from the code.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import headline, quality, reference, reliability
from benchmarks.common import HEADER, MEASUREMENTS, RESULTS, ROOT, Comparison, Measurement

REPLICAS = "replicas.json"
PAIRS_FOR_95 = 6
"""The fewest values between whose lowest and highest the median lies with 95 %."""


def read_result(name: str) -> dict[str, Any]:
    """What results/NAME.json holds."""
    content: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return content


def read_records(*names: str) -> list[dict[str, Any]]:
    """All comparisons and measurements on record."""
    files = [
        RESULTS / name
        for name in names
        or (
            *("serving.json", "fusing.json", "algebra.json", "training.json", "sweeping.json", "functions.json"),
            *("sources.json", "page.json", "smooth.json", REPLICAS),
        )
    ]
    return [row for file in files if file.exists() for row in json.loads(file.read_text()).values()]


def restore(row: Mapping[str, Any]) -> Comparison | Measurement:
    """The figure that a record holds."""
    kind = Comparison if "peer" in row else Measurement
    return kind(**{field.name: row[field.name] for field in fields(kind)})


def figures(*names: str) -> str:
    """Every figure of these result files with its aim, and the commands that made them."""
    rows = read_records(*names)
    sources = sorted({f"`{row['command']}`, {row['date']}, {row['machine']}" for row in rows})
    notes = [f"{row['name']}: {row['note']}." for row in rows if row["note"]]
    ratios = [restore(row).line() for row in rows if "peer" in row]
    alone = [restore(row).line() for row in rows if "peer" not in row]
    measured = ["", MEASUREMENTS, *alone] if alone else []
    return "\n".join([HEADER, *ratios, *measured, "", *(f"- {line}" for line in sources + notes)])


def scaling() -> str:
    """Seconds of the algebra by number of adapters, rank and layers."""
    content = read_result("algebra-scaling")
    lines = []
    for variable, rows in content["tables"].items():
        methods = list(rows[0]["seconds"])
        lines += [f"| {variable} | {' | '.join(methods)} |", "| --- " * (len(methods) + 1) + "|"]
        for row in rows:
            lines.append(f"| {row['at']} | {' | '.join(format(row['seconds'][m], '.3g') for m in methods)} |")
        lines.append("")
    return "\n".join([*lines, f"{content['case']}: `{content['command']}`, {content['date']}, {content['machine']}"])


def fleet() -> str:
    """Shares of requests that find their stack resident, by how a router chooses the replica."""
    content = read_result("fleet")
    lines = ["| stacks | arrivals | by stack key | at random |", "| --- | --- | --- | --- |"]
    for row in content["shares"]:
        lines.append(f"| {row['stacks']} | {row['pattern']} | **{row['stack']:.2f}** | {row['random']:.2f} |")
    run = read_result("fleet-soak")
    restart = (
        f"Two real replicas behind HAProxy, one restarted under load and away for {run['replica_away_s']} s: "
        f"{run['requests']:,} requests with {run['recipes']} recipes on {run['stacks']} stacks, {run['wrong']} wrong, "
        f"{run['lost']} lost, {run['streams_cut']} streams cut (`{run['command']}`, {run['date']})."
    )
    asked = [restore(row).line() for row in read_records("fleet-metrics.json")]
    return "\n".join([*lines, "", f"`{content['command']}`, {content['date']}.", "", restart, "", MEASUREMENTS, *asked])


SOAK = {
    "from a switch to the other's answer: median, longest": "{switch_median_s} s, {switch_longest_s} s of {switches}",
    "builds asked of both, each made by one, the same in files and answers": "{builds_made_once}",
    "from a SIGKILL in a build to the other's answer": "{kill_to_answer_s} s",
    "database answers to changes taken: stalled, stopped": "{stalled_to_current_s} s, {stopped_to_current_s} s",
    "files of stacks and builds that two had at the end, the same to the last bit": "{files_compared}",
    "date": "{date}",
}
"""Rows of `replicas`."""


def replicas() -> str:
    """What two real servers did that share a registry and a place."""
    content = read_result("replicas-soak")
    runs = content["folder"], content["bucket"]
    lines = ["| shared place | folder | bucket |", "| --- | --- | --- |"]
    for what, form in SOAK.items():
        lines.append(f"| {what} | {' | '.join(form.format(**run) for run in runs)} |")
    return "\n".join([*lines, "", f"`{content['command']}`, {content['base']}."])


def ray() -> str:
    """What two replicas on Ray Serve did while one, and an engine, were killed."""
    run = read_result("ray-serve")
    warm = run["sources_before_kill"]["warm"] / sum(run["sources_before_kill"].values())
    return (
        f"Two replicas on 2 cores, one killed under load and then one's engine: {run['requests']} requests with "
        f"{run['recipes']} recipes on {run['stacks']} stacks, {run['wrong']} wrong, {run['lost']} lost, "
        f"{run['streams_cut']} streams cut; before the kill {warm:.0%} found their stack resident. The second was "
        f"ready {run['scaled_up_s']} s after the load began (`{run['command']}`, Ray {run['ray']}, {run['date']})."
    )


def ranks() -> str:
    """How far answers of several ranks lie from the reference."""
    record = read_result("ranks")
    lines = ["| flag | engines | workers | difference |", "| --- | --- | --- | --- |"]
    for row in record.values():
        lines.append(f"| `{row['flags']}` | {row['engines']} | {row['ranks']} | {row['largest_difference']:.0e} |")
    sources = {f"`{row['command']}`, {row['date']}, vLLM {row['vllm']}, {row['device']}" for row in record.values()}
    return "\n".join([*lines, "", *sorted(sources)])


FIRST = (
    "first token with new weights, adapters resident",
    "first token, adapters not resident",
    "64 mixes in one slot, against 64 materialized adapters",
    "base model throughput, 16 streams",
    "start, installed",
)
"""What the README shows: three gains, the plain base beside it, and the price."""


def ratios(names: Sequence[str] = ()) -> str:
    """Figure, peer and ratio of all comparisons, or of those with these names, in that order."""
    rows = {row["name"]: row for row in read_records() if "peer" in row}
    lines = ["| on 2 CPU cores | against | ratio (95 % interval) |", "| --- | --- | --- |"]
    for row in [rows[name] for name in names] if names else rows.values():
        low, high = row["interval"]
        few = "*" if len(row["ours"]) < PAIRS_FOR_95 else ""
        what = f"**{row['ratio']:.2f}×** the {measured_quantity(row)} ({low:.2f}–{high:.2f}{few})"
        name = row["name"].replace(f" against {row['peer_is']}", "")  # the next column says it
        lines.append(f"| {name} | {row['peer_is']} | {what} |")
    return "\n".join(lines)


def measured_quantity(row: Mapping[str, Any]) -> str:
    """What a comparison compares: less time and memory is better, more throughput and speed."""
    if row["aim"][0] == "<=":
        return "memory" if row["unit"] == "GB" else "time"
    return "throughput" if "tok" in row["unit"] else "speed"


def quality_table() -> str:
    """What the shipped adapters do."""
    return quality.render(read_result("quality")["models"])


def headline_tables() -> str:
    """The paper's headline points at three seeds, and MMLU."""
    return headline.render(read_result("headline"))


def attacks() -> str:
    """What known attacks did to an earlier commit and do now."""
    records = read_result("attacks")
    commit = next(iter(records.values()))["commit"]
    rows = [f"| {attack} | {row['before']} | {row['now']} |" for attack, row in records.items()]
    sources = sorted({f"`{row['command']}`, {row['date']}, {row['machine']}" for row in records.values()})
    return "\n".join([f"| attack | {commit} | now |", "| --- | --- | --- |", *rows, "", *sources])


BASE_KINDS = {
    "families": "| family (random weights, float32) | base | mixed | built | effect of an adapter |",
    "vision": "| with vision (random weights, float32, text alone) | base | mixed | built | effect of an adapter |",
    "quantized": "| quantized (random weights, computed in bfloat16) | base | mixed | built | effect of an adapter |",
}


def bases() -> str:
    """How far served log-probabilities lie from transformers + PEFT, by family of base."""
    record = read_result("bases")
    lines = []
    for kind, header in BASE_KINDS.items():
        lines += ["", header, "| --- | --- | --- | --- | --- |"] if kind in record else []
        for name, row in record.get(kind, {}).items():
            figures = " | ".join(f"{row[column]:.0e}" for column in ("base", "mixed", "built"))
            lines.append(f"| {name} | {figures} | {row['effect']:.2f} |")
    rows = [row for kind in record.values() for row in kind.values()]
    sources = sorted({f"`{row['command']}`, {row['date']}, vLLM {row['vllm']}" for row in rows})
    return "\n".join([*lines[1:], "", *sources])


GATES = (
    "| representation | held out: area | false alarms | XSTest: area | false alarms | "
    "XSTest, at the threshold of the rows held out: found / false alarms | cost of a prompt |"
)


def gates() -> str:
    """How well representations of a prompt tell dangerous from harmless ones."""
    record = read_result("gates")
    lines = [GATES, "| --- | --- | --- | --- | --- | --- | --- |"]
    for row in record["rows"]:
        cells = [row[part][figure] for part in ("held_out", "xstest") for figure in ("area", "false_alarms")]
        figures = " | ".join(f"{cell['value']:.3f} ({cell['low']:.3f}–{cell['high']:.3f})" for cell in cells)
        moved = " / ".join(f"{value:.2f}" for value in row["at_held_out_threshold"].values())
        lines.append(f"| {row['name']} | {figures} | {moved} | {row['cost']} |")
    counts = ", ".join(f"{name} {n['dangerous']} + {n['harmless']}" for name, n in record["prompts"].items())
    source = f"`{record['command']}`, {record['date']}, {record['versions']}, {record['machine']}"
    return "\n".join([*lines, "", f"Prompts (dangerous + harmless): {counts}. {source}"])


POSITIONS = {
    "harm": "harm",
    "safe_answered": "safe prompts answered",
    "degenerate": "degenerate",
    "task": "orders exact",
    "prefill_harm": "harm when the answer is begun",
}
"""Measures of `positions`, and what the columns are called."""


def positions() -> str:
    """What points of every form do, on the half that no point was chosen on."""
    record = read_result("positions")
    lines = [f"| model | {' | '.join(POSITIONS.values())} |", "| --- " * (len(POSITIONS) + 1) + "|"]
    for point in record["points"]:
        cells = [point["half_report"][name] for name in POSITIONS]
        shares = (f"{100 * c['value']:.0f} % ({100 * c['low']:.0f}–{100 * c['high']:.0f})" for c in cells)
        lines.append(f"| `{point['model']}` | {' | '.join(shares)} |")
    chosen = ", ".join(f"{form}: `{best['best']}`" for form, best in record["best_by_form"].items())
    source = f"`{record['command']}`, {record['date']}"
    return "\n".join([*lines, "", f"Chosen on the other half, of each form: {chosen}.", "", source])


TABLES: Mapping[str, Mapping[str, Callable[[], str]]] = {
    "README.md": {"ratios": partial(ratios, FIRST)},
    "docs/performance.md": {"results": ratios},
    "docs/evaluation.md": {"quality": quality_table, "positions": positions},
    "docs/gates.md": {"gates": gates},
    "docs/fleet.md": {"fleet": fleet},
    "docs/ray.md": {"ray": ray},
    "docs/reliability.md": {"reliability": reliability.render},
    "docs/replicas.md": {"replicas": replicas},
    "docs/distribution.md": {"ranks": ranks},
    "docs/settings.md": {"settings": reference.settings},
    "docs/http-api.md": {"routes": reference.routes},
    "docs/security.md": {"attacks": attacks},
    "docs/bases.md": {"bases": bases},
    "docs/recipes.md": {"methods": reference.methods},
    "docs/training.md": {"training-settings": reference.training_settings, "formats": reference.formats},
    "benchmarks/README.md": {
        "tables": figures,
        "headline": headline_tables,
        "before": partial(figures, "before.json"),
        "gpu": partial(figures, "gpu.json"),
        "gpu-serving": partial(figures, "gpu-serving.json"),
        "scaling": scaling,
    },
}


def fill_tables(file: str) -> str:
    """The file's text with its tables renewed."""
    text = (ROOT / file).read_text()
    for name, make in TABLES[file].items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        text, n = re.subn(pattern, lambda m, make=make: f"{m[1]}{make()}\n{m[2]}", text, flags=re.DOTALL)  # type: ignore[misc]  # mypy and the default of a lambda
        if n != 1:
            raise ValueError(f"{file}: expected one <!-- {name} --> … <!-- /{name} -->, found {n}")
    return text


def main() -> int:
    """Command line; exit 0 written or right, 1 a table differs from the record."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--check", action="store_true", help="write nothing, say what differs")
    args = parser.parse_args()
    stale = [file for file in TABLES if fill_tables(file) != Path(ROOT / file).read_text()]
    for file in stale:
        print(f"{file}: {'differs from benchmarks/results' if args.check else 'renewed'}")
        if not args.check:
            (ROOT / file).write_text(fill_tables(file))
    return int(bool(stale) and args.check)


if __name__ == "__main__":
    sys.exit(main())
