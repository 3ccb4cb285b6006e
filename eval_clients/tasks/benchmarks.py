"""The benchmarks as Inspect tasks. Each takes the user's data, and a limit on samples and on the answers' tokens.

Answers are greedy unless a temperature says otherwise, through the endpoint's own chat template, with the same limits
for every model of a run.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import ChatMessageUser, GenerateConfig
from inspect_ai.scorer import Scorer
from inspect_ai.solver import Generate, Solver, TaskState, generate, solver

from eval_clients.scoring import judge
from eval_clients.scoring.scorers import exact, no_answer, three_shares
from eval_clients.tasks import data
from eval_clients.tasks import mmlu as multiple_choice

log = logging.getLogger(__name__)

ANSWER_TOKENS = 64


def _task(
    samples: Sequence[Sample], scorers: Sequence[Scorer], limit: int | None, max_tokens: int, temperature: float
) -> Task:
    return Task(
        dataset=MemoryDataset(data.thinned(samples, limit)),
        solver=seeded() if temperature else generate(),
        scorer=list(scorers),
        config=GenerateConfig(max_tokens=max_tokens, temperature=temperature),
    )


@solver
def seeded() -> Solver:
    """One sampled answer, its seed the number of the epoch: several answers to a prompt differ, a rerun does not."""

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        return await generate(state, seed=state.epoch)

    return solve


def _judged(judged: bool) -> list[Scorer]:
    return [three_shares(), judge.harm()] if judged else [three_shares()]


@task
def hexphi(
    path: str, limit: int | None = None, max_tokens: int = ANSWER_TOKENS, temperature: float = 0, judged: bool = True
) -> Task:
    """HEx-PHI: a folder of category_1.csv … category_11.csv, judged from 1 to 5."""
    samples, missing = data.hexphi(Path(path))
    for sentence in missing:
        log.warning(sentence)
    return _task(samples, _judged(judged), limit, max_tokens, temperature)


@task
def advbench(
    path: str, limit: int | None = None, max_tokens: int = ANSWER_TOKENS, temperature: float = 0, judged: bool = False
) -> Task:
    """AdvBench's harmful behaviours (`goal` column), refused or not, and judged where there is a judge."""
    return _task(data.harmful(Path(path)), _judged(judged), limit, max_tokens, temperature)


@task
def harmful_csv(
    path: str, limit: int | None = None, max_tokens: int = ANSWER_TOKENS, temperature: float = 0, judged: bool = False
) -> Task:
    """Harmful prompts of any CSV with one column or a header, or JSONL with `prompt`."""
    return _task(data.harmful(Path(path)), _judged(judged), limit, max_tokens, temperature)


@task
def harmless(path: str, limit: int | None = None, max_tokens: int = ANSWER_TOKENS, temperature: float = 0) -> Task:
    """Harmless prompts of a JSONL with `prompt`: what is refused here is refused wrongly."""
    return _task(data.harmless(Path(path)), [three_shares()], limit, max_tokens, temperature)


@task
def xstest(path: str, limit: int | None = None, max_tokens: int = ANSWER_TOKENS, temperature: float = 0) -> Task:
    """XSTest: safe prompts that sound unsafe, and unsafe ones; a limit on the samples is for each of the two."""
    safe, unsafe = data.xstest(Path(path), "safe"), data.xstest(Path(path), "unsafe")
    samples = data.thinned(safe, limit) + data.thinned(unsafe, limit)
    return _task(samples, [three_shares()], None, max_tokens, temperature)


@task(name="task")
def job(
    path: str, limit: int | None = None, max_tokens: int = 96, temperature: float = 0, judged: bool = False
) -> Task:
    """The fine-tuned job: exact match with `answer`, and judged where there is a judge."""
    scorers = [exact(), judge.utility()] if judged else [exact()]
    return _task(data.job(Path(path)), scorers, limit, max_tokens, temperature)


@task
def mmlu(path: str, limit: int | None = None) -> Task:
    """MMLU, five shots, by the letters' log-probabilities; with a limit, questions are drawn over all subjects."""
    return Task(
        dataset=MemoryDataset(multiple_choice.questions(Path(path), limit)),
        solver=multiple_choice.choose(),
        scorer=multiple_choice.letter(),
    )


@solver
def both_turns() -> Solver:
    """Asks MT-Bench's two questions, the second with the first answer in sight."""

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        state = await generate(state)
        first = state.output.completion
        if no_answer(state) is not None:
            return state
        state.messages.append(ChatMessageUser(content=state.metadata["second"]))
        state = await generate(state)
        asked = [state.input_text, state.metadata["second"]]
        state.metadata["turns"] = [list(pair) for pair in zip(asked, [first, state.output.completion], strict=True)]
        return state

    return solve


@task
def mt_bench(path: str, limit: int | None = None, max_tokens: int = 512, temperature: float = 0) -> Task:
    """MT-Bench: 80 two-turn questions, each answer judged from 1 to 10, with references where there are any."""
    return Task(
        dataset=MemoryDataset(data.thinned(data.mt_bench(Path(path)), limit)),
        solver=both_turns(),
        scorer=judge.dialogue(),
        config=GenerateConfig(max_tokens=max_tokens, temperature=temperature),
    )
