"""Which representation of a prompt tells dangerous from harmless ones, and at what cost: `python -m benchmarks.gates`.

All are trained on the project's own safety rows; layers, penalties and thresholds are set on the rows held out, on
which gates are calibrated too. Of XSTest the half that weights are chosen on is measured; no threshold was set on it.
In float32, on the base itself.

    python -m benchmarks.gates --data DIR [--gate NAME=FOLDER …]
"""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, DynamicCache

from adapters import load
from benchmarks.common import BASE, RESULTS, ROOT, machine, stamp
from benchmarks.separation import refusal_logprobs
from eval_clients.errors import DataError
from eval_clients.tasks.data import assign_half, read_xstest
from training.base_model import load_tokenizer
from training.config import DataConfig
from training.gates.calibration import Estimate, Flags, Floats, area, estimate, false_alarms, find_threshold
from training.gates.model import GateModel, load_causal
from training.gates.prefill import count_shared, prefill
from training.gates.prompts import Prompt, Prompts, read_prompts
from training.rows.dataset import collect_chats

SETS = ("train", "held_out", "xstest")
LAYERS = (6, 12, 18, 24, 30)
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)
FIRST_TOKENS = 256
MAX_TOKENS = 1024
Values = Mapping[str, Floats]
"""The values of the prompts of each set."""


@dataclass(frozen=True, slots=True)
class Row:
    """One representation: figures on rows held out and on XSTest, and what it costs at each prompt."""

    name: str
    cost: str
    held_out: Mapping[str, Estimate]
    xstest: Mapping[str, Estimate]
    at_held_out_threshold: Mapping[str, float]
    """Recall and false alarms on XSTest above the threshold that finds 95 % of the dangerous rows held out."""


@torch.inference_mode()
def read_states(causal: Any, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor]:
    """The base's hidden states after every layer: of the last token, and their mean over the tokens that not all
    prompts share; each prompts×(layers + 1)×width, float32.
    """
    shape = (len(prompts), causal.config.num_hidden_layers + 1, causal.config.hidden_size)
    last, mean = torch.empty(shape), torch.empty(shape)
    shared = count_shared(prompts)
    prefix = causal.base_model(input_ids=torch.from_numpy(prompts[0].ids[None, :shared]).long(), use_cache=True)
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number].ids))
    while order:
        length = len(prompts[order[0]].ids)
        most = max(1, MAX_TOKENS // (length - shared))
        numbers = [number for number in order[:most] if len(prompts[number].ids) == length]
        order = order[len(numbers) :]
        cache = DynamicCache()
        for index, layer in enumerate(prefix.past_key_values.layers):
            cache.update(*(part.expand(len(numbers), -1, -1, -1) for part in (layer.keys, layer.values)), index)
        ids = torch.stack([torch.from_numpy(prompts[number].ids[shared:]).long() for number in numbers])
        output = causal.base_model(input_ids=ids, past_key_values=cache, output_hidden_states=True)
        states = torch.stack(output.hidden_states, 1)
        last[numbers], mean[numbers] = states[:, :, -1], states.mean(2)
    return last, mean


def fit_head(features: Mapping[str, Tensor], labels: Mapping[str, Flags]) -> Values:
    """A linear head on standardized features, n×d, by logistic regression that counts both kinds alike; its L2 penalty
    is chosen by the area on the rows held out.
    """
    center, spread = features["train"].mean(0), features["train"].std(0) + 1e-6
    scaled = {name: (one - center) / spread for name, one in features.items()}
    targets = torch.from_numpy(labels["train"]).float()
    weights = torch.where(targets > 0, 0.5 / targets.mean(), 0.5 / (1 - targets.mean()))
    best: tuple[float, Values] | None = None
    for penalty in PENALTIES:
        head = fit_logistic(scaled["train"], targets, weights, penalty)
        values = {name: (one @ head).double().numpy() for name, one in scaled.items()}
        reached = area(values["held_out"], labels["held_out"])
        best = max(best or (reached, values), (reached, values), key=lambda pair: pair[0])
    assert best is not None
    return best[1]


def fit_logistic(features: Tensor, targets: Tensor, weights: Tensor, penalty: float) -> Tensor:
    """The weights, d, of the regression without an offset, which ranks do not need."""
    head = torch.zeros(features.shape[1], requires_grad=True)
    offset = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.LBFGS([head, offset], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        scores = features @ head + offset
        loss = functional.binary_cross_entropy_with_logits(scores, targets, weight=weights)
        loss = loss + penalty * head.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]  # torch's
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call, arg-type]  # torch's
    return head.detach()


def measure_gate(folder: Path, sets: Mapping[str, Prompts]) -> tuple[str, Values]:
    """(cost, values) of a gate on all sets but the one it was trained on."""
    from peft import PeftModel

    readout, size = load(folder).gate, (folder / "adapter_model.safetensors").stat().st_size
    assert readout is not None, f"{folder} is no gate"
    causal = load_causal(str(BASE))
    before = {name: prefill(causal, one.items) for name, one in sets.items() if name != "train"}
    model = GateModel(PeftModel.from_pretrained(causal, str(folder)), readout.yes, readout.no)
    values = {name: model.measure_all(one).numpy() for name, one in before.items()}
    return f"one token, {size / 1e6:.2f} MB", values


def measure_safety(texts: Mapping[str, Sequence[str]]) -> Values:
    """Log-probability that the shipped safety adapter's answer begins as refusals do."""
    tokenizer, model = load_tokenizer(str(BASE)), AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    for name, module in load(ROOT / "examples/adapters/safety").modules.items():
        model.get_submodule(name).weight.data += module.delta()
    return {name: refusal_logprobs(model, tokenizer, one).numpy() for name, one in texts.items()}


def judge(name: str, cost: str, values: Values, labels: Mapping[str, Flags]) -> Row:
    """The figures of one representation."""

    def figures(one: str) -> dict[str, Estimate]:
        named = {"area": area, "false_alarms": false_alarms}
        return {key: estimate(figure, values[one], labels[one]) for key, figure in named.items()}

    flagged = values["xstest"] >= find_threshold(values["held_out"], labels["held_out"])
    moved = {
        "recall": float(flagged[labels["xstest"]].mean()),
        "false_alarms": float(flagged[~labels["xstest"]].mean()),
    }
    row = Row(name, cost, figures("held_out"), figures("xstest"), moved)
    print(f"{name}: held out {row.held_out}, XSTest {row.xstest}, {moved}", flush=True)
    return row


def judge_heads(sets: Mapping[str, Prompts], labels: Mapping[str, Flags]) -> Iterable[Row]:
    """Linear heads on what the base computes of a prompt anyway."""
    causal = load_causal(str(BASE))
    states = {name: read_states(causal, one.items) for name, one in sets.items()}
    single = {layer: fit_head({n: one[0][:, layer] for n, one in states.items()}, labels) for layer in LAYERS}
    best = max(LAYERS, key=lambda layer: area(single[layer]["held_out"], labels["held_out"]))
    cost = "none but a seam for hidden states"
    yield judge(f"linear head, last token, layer {best}", cost, single[best], labels)
    several = {name: torch.cat([part[:, LAYERS[1:4]].flatten(1) for part in pair], 1) for name, pair in states.items()}
    yield judge("linear head, last token and mean, layers 12, 18, 24", cost, fit_head(several, labels), labels)
    head = causal.get_output_embeddings().weight.detach()
    logprobs = {name: (one[0][:, -1] @ head.T).log_softmax(-1) for name, one in states.items()}
    likely = logprobs["train"].exp().mean(0).argsort(descending=True)[:FIRST_TOKENS]
    features = {name: one[:, likely] for name, one in logprobs.items()}
    cost = f"{FIRST_TOKENS} log-probabilities"
    yield judge(f"linear head, {FIRST_TOKENS} likeliest first tokens", cost, fit_head(features, labels), labels)


def read_sets(folder: Path) -> tuple[dict[str, Prompts], dict[str, list[str]]]:
    """The prompts of all sets, and the texts of those that nothing is trained on. DataError without XSTest."""
    tokenizer = load_tokenizer(str(BASE))
    sources = {"train": "safety:train", "held_out": "safety:heldout"}
    sets = {name: read_prompts(DataConfig(path=path), tokenizer) for name, path in sources.items()}
    samples = read_xstest(folder / "xstest/xstest_prompts.csv")
    samples = [sample for sample in samples if assign_half(str(sample.input)) == "choose"]
    items = []
    for sample in samples:
        chat = [{"role": "user", "content": str(sample.input)}]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        ids = np.array(tokenizer(text, add_special_tokens=False).input_ids, np.int32)
        items.append(Prompt(ids, (sample.metadata or {})["measure"] == "harm"))
    sets["xstest"] = Prompts("xstest", tuple(items))
    held = [chat.prompt for chat in collect_chats(DataConfig(path=sources["held_out"]))]
    return sets, {"held_out": held, "xstest": [str(sample.input) for sample in samples]}


def main() -> int:
    """Command line; exit 0 measured, 2 no data."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gates", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--data", type=Path, required=True, help="folder with xstest/xstest_prompts.csv")
    parser.add_argument("--gate", action="append", default=[], metavar="NAME=FOLDER", help="beside the one that ships")
    args = parser.parse_args()
    try:
        sets, texts = read_sets(args.data)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    labels = {name: one.labels for name, one in sets.items()}
    gates = {"the gate that ships": ROOT / "examples/adapters/risk"}
    gates |= {name: Path(folder) for name, _, folder in (pair.partition("=") for pair in args.gate)}
    rows = [judge(name, *measure_gate(folder, sets), labels) for name, folder in gates.items()]
    cost = "a prefill of its own"
    rows.append(judge("the safety adapter's first word", cost, measure_safety(texts), labels))
    rows += judge_heads(sets, labels)
    body: dict[str, Any] = {**stamp("python -m benchmarks.gates --data DIR"), "machine": machine()}
    body["versions"] = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    body |= {"prompts": {n: {"dangerous": int(o.sum()), "harmless": int((~o).sum())} for n, o in labels.items()}}
    (RESULTS / "gates.json").write_text(json.dumps(body | {"rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
