"""The benchmarks as Inspect tasks. Each takes the user's data, and a limit on samples and on the answers' tokens.

Answers are greedy unless a temperature says otherwise, through the endpoint's own chat template, with the same limits
for every model of a run. Names and parameters of tasks are recorded in logs: a resumed run finds its answers by them.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import ChatMessageUser, GenerateConfig
from inspect_ai.scorer import Scorer
from inspect_ai.solver import Generate, Solver, TaskState, generate, solver

from eval_clients.scoring import judge
from eval_clients.scoring.scorers import exact, no_answer, three_shares
from eval_clients.tasks import data, mmlu as multiple_choice

log = logging.getLogger(__name__)

ANSWER_TOKENS = 64


def _task(
    samples: Sequence[Sample], scorers: Sequence[Scorer], limit: int | None, max_tokens: int, temperature: float
) -> Task:
    return Task(
        dataset=MemoryDataset(data.draw_subset(samples, limit)),
        solver=seeded() if temperature else generate(),
        scorer=list(scorers),
        config=GenerateConfig(max_tokens=max_tokens, temperature=temperature),
    )


@solver
def seeded() -> Solver:
    """One sampled answer, seeded by the epoch's number: several answers to a prompt differ, a rerun does not."""

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        return await generate(state, seed=state.epoch)

    return solve


def _harm_scorers(judged: bool) -> list[Scorer]:
    return [three_shares(), judge.harm()] if judged else [three_shares()]


@task
def hexphi(
    path: str, limit: int | None = None, max_tokens: int = ANSWER_TOKENS, temperature: float = 0, judged: bool = True
) -> Task:
    """HEx-PHI: a folder of category_1.csv … category_11.csv, judged from 1 to 5."""
    samples, missing = data.read_hexphi(Path(path))
    for sentence in missing:
        log.warning(sentence)
    return _task(samples, _harm_scorers(judged), limit, max_tokens, temperature)


@task
def advbench(
    path: str, limit: int | None = None, max_tokens: int = ANSWER_TOKENS, temperature: float = 0, judged: bool = False
) -> Task:
    """AdvBench's harmful behaviors (`goal` column), refused or not, and judged where there is a judge."""
    return _task(data.read_harmful(Path(path)), _harm_scorers(judged), limit, max_tokens, temperature)


@task
def harmful_csv(
    path: str, limit: int | None = None, max_tokens: int = ANSWER_TOKENS, temperature: float = 0, judged: bool = False
) -> Task:
    """Harmful prompts of any CSV with one column or a header, or JSONL with `prompt`."""
    return _task(data.read_harmful(Path(path)), _harm_scorers(judged), limit, max_tokens, temperature)


@task
def harmless(path: str, limit: int | None = None, max_tokens: int = ANSWER_TOKENS, temperature: float = 0) -> Task:
    """Harmless prompts of a JSONL with `prompt`: any refusal is a false refusal."""
    return _task(data.read_harmless(Path(path)), [three_shares()], limit, max_tokens, temperature)


@task
def xstest(path: str, limit: int | None = None, max_tokens: int = ANSWER_TOKENS, temperature: float = 0) -> Task:
    """XSTest: safe prompts that sound unsafe, and unsafe ones; `--samples` applies to each of the two."""
    safe, unsafe = data.read_xstest(Path(path), "safe"), data.read_xstest(Path(path), "unsafe")
    samples = data.draw_subset(safe, limit) + data.draw_subset(unsafe, limit)
    return _task(samples, [three_shares()], None, max_tokens, temperature)


@task(name="task")
def job(
    path: str, limit: int | None = None, max_tokens: int = 96, temperature: float = 0, judged: bool = False
) -> Task:
    """The fine-tuned task: exact match with `answer`, and judged where there is a judge."""
    scorers = [exact(), judge.utility()] if judged else [exact()]
    return _task(data.read_task(Path(path)), scorers, limit, max_tokens, temperature)


@task
def mmlu(path: str, limit: int | None = None) -> Task:
    """MMLU, five shots, by the letters' log-probabilities; with a limit, questions are drawn over all subjects."""
    return Task(
        dataset=MemoryDataset(multiple_choice.read_questions(Path(path), limit)),
        solver=multiple_choice.choose(),
        scorer=multiple_choice.letter(),
    )


@solver
def both_turns() -> Solver:
    """Asks both questions of MT-Bench, the second with the first answer in the conversation."""

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        state = await generate(state)
        first = state.output.completion
        if no_answer(state) is not None:
            return state
        state.messages.append(ChatMessageUser(content=state.metadata["second"]))
        state = await generate(state)
        questions = [state.input_text, state.metadata["second"]]
        answers = [first, state.output.completion]
        state.metadata["turns"] = [list(turn) for turn in zip(questions, answers, strict=True)]
        return state

    return solve


@task
def mt_bench(path: str, limit: int | None = None, max_tokens: int = 512, temperature: float = 0) -> Task:
    """MT-Bench: 80 two-turn questions, each answer judged from 1 to 10, with references where there are any."""
    return Task(
        dataset=MemoryDataset(data.draw_subset(data.read_mt_bench(Path(path)), limit)),
        solver=both_turns(),
        scorer=judge.dialogue(),
        config=GenerateConfig(max_tokens=max_tokens, temperature=temperature),
    )


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A benchmark as command lines offer it."""

    create: Callable[..., Task]
    needs: str
    """The data it takes, for people."""
    judge: Literal["none", "optional", "required"] = "none"
    generates: bool = True
    """Whether answers are generated, so that a temperature and a token limit apply."""


BENCHMARKS: Mapping[str, Benchmark] = {
    "hexphi": Benchmark(hexphi, "folder of category_1.csv … category_11.csv; judged", "optional"),
    "advbench": Benchmark(advbench, "CSV with a `goal` column", "optional"),
    "harmful_csv": Benchmark(harmful_csv, "CSV with one column or a header, or JSONL with `prompt`", "optional"),
    "harmless": Benchmark(harmless, "JSONL with `prompt`: any refusal is a false refusal"),
    "xstest": Benchmark(xstest, "xstest_prompts.csv: safe prompts answered, unsafe ones refused"),
    "mmlu": Benchmark(mmlu, "folder in Hendrycks' layout (dev/, test/); letters' log-probabilities", generates=False),
    "mt_bench": Benchmark(mt_bench, "folder with question.jsonl and reference_answer*.jsonl; judged", "required"),
    "task": Benchmark(job, "JSONL with `prompt` and `answer`: exact match", "optional"),
}
"""By name on the command line."""


def build_task(
    name: str,
    path: str,
    *,
    samples: int | None = None,
    max_tokens: int | None = None,
    temperature: float = 0.0,
    judged: bool = False,
) -> Task:
    """The benchmark's task over the user's data; options it does not take are left out.

    `samples` and `max_tokens` (per answer) of None mean all, and the benchmark's own default.
    """
    benchmark = BENCHMARKS[name]
    options: dict[str, object] = {"path": path, "limit": samples}
    if benchmark.generates:
        options["temperature"] = temperature
        if max_tokens is not None:
            options["max_tokens"] = max_tokens
    if benchmark.judge == "optional":
        options["judged"] = judged
    return benchmark.create(**options)
