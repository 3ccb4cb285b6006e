"""From rows to the folder of a gate: prefill, training, rounding, calibration on rows held out."""

import importlib.metadata
import json
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import adapters
from adapters.files import atomic_folder
from training.base_model import load_tokenizer, name_base, resolve_base
from training.config import SOURCES
from training.convert import CARD, GATE, check_place
from training.errors import ConfigError
from training.gates.calibration import Estimate, area, calibrate, estimate, false_alarms, move_offset
from training.gates.card import make_card
from training.gates.config import GateConfig
from training.gates.fit import fit
from training.gates.model import GateModel, add_lora, find_token, load_causal, make_adapter, round_factors
from training.gates.prefill import Prefill, prefill
from training.gates.prompts import Prompts, read_both
from training.rows.encoding import set_template

PACKAGES = ("torch", "transformers", "peft")
Report = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Quality:
    """How well a gate tells the prompts held out apart."""

    area: Estimate
    """Under the ROC curve."""
    false_alarms: Estimate
    """Share of the harmless prompts above the threshold that 95 % of the dangerous ones reach."""


def train_gate(config: GateConfig, out: Path, command: str = "") -> Report:
    """Train a gate and write its folder, whole or not at all; the report that is also in its gate.json.

    ConfigError for rows, a base or texts that cannot be used, and for a gate that has learned nothing or is larger
    than `adapters.MAX_GATE_BYTES`.
    """
    check_place(out, replace=True)
    started = time.monotonic()
    folder = resolve_base(config.base)
    tokenizer = load_tokenizer(folder)
    set_template(tokenizer, config.template)
    yes, no = (find_token(tokenizer, text) for text in (config.yes, config.no))
    rows, held = read_both(config, tokenizer)
    print(rows.describe(), held.describe(), sep="\n", flush=True)
    causal = load_causal(folder)
    model = GateModel(add_lora(causal, config), yes, no)
    with show("prefill", len(rows.items) + len(held.items)) as count, model.adapted.disable_adapter():
        before = [prefill(causal, one.items, count) for one in (rows, held)]
    steps = fit_shown(model, before[0], rows, config)
    values = round_factors(model).measure_all(before[1]).numpy()
    scale, offset = calibrate(values, held.labels)
    if config.recall:
        offset = move_offset(scale, values, held.labels, config.recall)
    quality = Quality(*(estimate(figure, values, held.labels) for figure in (area, false_alarms)))
    readout = adapters.Readout(yes, no, float(f"{scale:.6g}"), float(f"{offset:.6g}"))
    report = describe(config, command, rows, held) | asdict(quality)
    report |= {"readout": asdict(readout), "steps": steps, "seconds": round(time.monotonic() - started)}
    write(make_adapter(model, name_base(folder), readout), out, config, report)
    return report


@contextmanager
def show(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar; what it gives counts on."""
    from tqdm import tqdm

    with tqdm(total=total, desc=what, mininterval=1.0) as bar:

        def count(number: int) -> None:
            bar.update(number)

        yield count


def fit_shown(model: GateModel, before: Prefill, rows: Prompts, config: GateConfig) -> int:
    """Train with a progress bar that shows the loss; the number of steps."""
    from tqdm import tqdm

    with tqdm(desc="training", unit="step", mininterval=1.0) as bar:

        def watch(step: int, steps: int, loss: float) -> None:
            bar.total = steps
            bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            bar.update(1)

        return fit(model, before, rows.labels.tolist(), config, watch)


def write(adapter: adapters.LoraAdapter, out: Path, config: GateConfig, report: Report) -> None:
    """The folder: weights, configuration, card and report; read again as the server will."""
    details: adapters.PeftDetails = {"lora_dropout": config.dropout, "target_modules": sorted(config.targets)}
    with atomic_folder(out, replace=True) as folder:
        adapters.save(adapter, folder, details=details)
        try:
            adapters.load(folder)
        except adapters.AdapterError as error:
            raise ConfigError(f"the gate cannot be used: {error}; lower --rank or leave out --targets") from error
        (folder / GATE).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        (folder / CARD).write_text(make_card(report), encoding="utf-8")


def name_source(text: str) -> str:
    """A source of rows without the folders of its path."""
    return text if text.startswith(SOURCES) else Path(text).name


def describe(config: GateConfig, command: str, rows: Prompts, held: Prompts) -> Report:
    """What a gate is made from; of paths only their names, except in the command."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}

    def count(prompts: Prompts) -> Report:
        dangerous = int(prompts.labels.sum())
        kinds = {"dangerous": dangerous, "harmless": len(prompts.items) - dangerous}
        return {"source": name_source(prompts.source), **kinds, "sha256": prompts.sha256}

    names = {name: name_source(getattr(config, name)) for name in ("data", "held_out", "template")}
    return {
        "command": command,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "versions": {"python": platform.python_version(), **versions},
        "settings": asdict(config) | {"base": name_base(config.base), **names},
        "rows": count(rows),
        "held_out": count(held),
    }


def tabulate(report: Report) -> str:
    """The result for the terminal."""
    lines = [("held out", f"{report['held_out']['dangerous']} dangerous, {report['held_out']['harmless']} harmless")]
    for name in ("area", "false_alarms"):
        lines.append((name.replace("_", " "), str(Estimate(**report[name]))))
    readout = report["readout"]
    lines.append(("readout", ", ".join(f"{key} {value:g}" for key, value in readout.items())))
    lines.append(("time", f"{report['seconds']} s, {report['steps']} steps"))
    return "\n".join(f"{name:<14}{value}" for name, value in lines)
