"""The README.md of a gate's folder."""

from collections.abc import Mapping
from typing import Any

from training.gates.calibration import RECALL, Estimate


def make_card(report: Mapping[str, Any]) -> str:
    """The card as Markdown; `report` is the content of gate.json."""
    settings, rows, held, readout = (report[key] for key in ("settings", "rows", "held_out", "readout"))
    sign = "-" if readout["offset"] < 0 else "+"
    alarms = f"false alarms at {RECALL:.0%} recall"
    facts = {
        "value": f"log p({settings['yes']!r}) - log p({settings['no']!r}) of the token after the prompt "
        f"(tokens {readout['yes']} and {readout['no']})",
        "share": f"1 / (1 + exp(-({readout['scale']:g}·value {sign} {abs(readout['offset']):g}))), "
        + _describe_share(settings),
        "data": f"{rows['source']}, {rows['dangerous']} prompts answered by a refusal, {rows['harmless']} others, "
        f"sha256 {rows['sha256'][:16]}…",
        "held out": f"{held['source']}, {held['dangerous']} and {held['harmless']}, sha256 {held['sha256'][:16]}…",
        "area under the curve, held out": Estimate(**report["area"]),
        f"{alarms}, held out": Estimate(**report["false_alarms"]),
        "shape": f"rank {settings['rank']}, {', '.join(settings['targets'])}, float16",
        "training": f"{settings['epochs']} epoch{'s' * (settings['epochs'] > 1)}, {settings['batch_rows']} prompts per "
        f"step, {report['steps']} steps, learning rate {settings['learning_rate']:g} (cosine, warm-up 0.05), dropout "
        f"{settings['dropout']:g}, weight decay {settings['weight_decay']:g}; both kinds count alike",
        "seed": settings["seed"],
        "time": f"{report['seconds']} s",
        "date": report["date"],
        "versions": ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return (
        f"# Gate for {settings['base']}\n\nIt acts at a prompt's last position alone and chooses weights: "
        f"`gate(1*task + 0.8*safety, by=risk, safety in 0..0.8)`. Intervals are of 95 %.\n\n"
        f"```\n{report['command']}\n```\n\n| what | value |\n| --- | --- |\n{table}\n"
    )


def _describe_share(settings: Mapping[str, Any]) -> str:
    if settings["recall"]:
        return f"1/2 where {settings['recall']:.3g} of the dangerous prompts held out lie above"
    return "the probability of danger, calibrated on the prompts held out"
