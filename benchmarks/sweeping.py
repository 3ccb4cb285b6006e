"""An eleven-point sweep against the reference's way: `python -m benchmarks.sweeping [--prompts N]`.

The reference, for each λ: load the base, merge the adapters with PEFT (`cat`), generate one prompt at a time. Ours:
`eval_clients.sweeps.sweep` on a running service, with scoring, logs and report; the service's start is measured apart.
Same prompts, chat template, greedy, same longest answer, float32, both cores, in one process tree at a time.
"""

import argparse
import json
import sys
import tempfile
import time
from itertools import count
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.common import BASE, Comparison, Measurement, ours, record
from benchmarks.serving import ENGINE, SHIPPED
from eval_clients.endpoint import Endpoint
from eval_clients.running import Running, ready
from eval_clients.sweeps.points import Point, expand
from eval_clients.sweeps.report import make
from eval_clients.sweeps.sweep import sweep
from eval_clients.tasks import benchmarks as tasks
from training.builtin.safety import read_rows

POINTS: list[Point] = expand(["{1-l}*task + {l}*safety"], ["l=0:1:0.1"])
TOKENS = 32
ROUNDS = 3
COMMAND = "python -m benchmarks.sweeping"


def reference(prompts: list[str]) -> float:
    """Seconds of the reference's way over all points."""
    began = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    for point in POINTS:
        model = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32), SHIPPED["task"], adapter_name="task"
        )
        model.load_adapter(SHIPPED["safety"], adapter_name="safety")
        share = point.values["l"]
        model.add_weighted_adapter(["task", "safety"], [1 - share, share], "mixed", combination_type="cat")
        model.set_adapter("mixed")
        model.eval()
        for prompt in prompts:
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
            )
            inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
            with torch.inference_mode():
                model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
    return time.perf_counter() - began


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--prompts", type=int, default=8, help="of every weight; default: %(default)s")
    args = parser.parse_args()
    rows = [row.prompt for row in read_rows("heldout") if row.kind == "harmless"]
    numbers = count()
    with tempfile.TemporaryDirectory() as place:
        scratch = Path(place)
        settings = {"FUSION_ADAPTERS": ",".join(f"{n}={p}" for n, p in SHIPPED.items())}
        settings["FUSION_ADAPTER_ROOTS"] = str(SHIPPED["task"].parent)

        def fresh() -> list[str]:
            """Prompts that were not asked before, so that no cache helps."""
            turn = next(numbers)
            return [f"{prompt} (note {turn})" for prompt in rows[: args.prompts]]

        def ours_takes(url: str, prompts: list[str]) -> float:
            folder = scratch / f"sweep-{next(numbers)}"
            ready(folder, resume=False)
            data = folder / "prompts.jsonl"
            data.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
            began = time.perf_counter()
            found = sweep(
                Endpoint(f"{url}/v1"),
                POINTS,
                lambda: [tasks.harmless(str(data), max_tokens=TOKENS)],
                folder,
                Running(display="none"),
            )
            make(folder, found, [], title="Sweep", command=COMMAND)
            return time.perf_counter() - began

        taken: tuple[list[float], list[float]] = ([], [])
        starts = []
        for round_ in range(ROUNDS):
            prompts = fresh()
            # One side at a time: the idle server would not disturb, yet its memory counts.
            with ours(ENGINE, scratch, **settings) as server:
                starts.append(server.started_s)
                taken[0].append(ours_takes(server.url, prompts))
            taken[1].append(reference(prompts))
            print(f"    round {round_ + 1}/{ROUNDS}: {taken[0][-1]:.1f} s against {taken[1][-1]:.1f} s", flush=True)
    record(
        "sweeping.json",
        COMMAND,
        [
            Comparison(
                f"sweep of 11 weights over {args.prompts} prompts",
                "sweep on a running service, with its report",
                "load, merge with PEFT, generate one by one",
                "s",
                ("<=", 0.25),
                tuple(taken[0]),
                tuple(taken[1]),
            ),
            Measurement("start of the service before the sweep", "s", 60, tuple(starts)),
        ],
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
