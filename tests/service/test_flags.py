"""vLLM's flags: which are refused, what is set where the user says nothing."""

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from vllm.platforms.interface import UnspecifiedPlatform

from service.engine import flags
from service.engine.flags import EngineOptions, count_ranks, parse_flags, prepare_cpu


def options(*extra: str) -> EngineOptions:
    return EngineOptions("model", "name", 8, 1, 4, mixing=True, extra=extra)


@pytest.mark.parametrize(
    ("flag", "named"),
    [
        (["--fully-sharded-loras"], "--fully-sharded-loras"),
        (["--enable-expert-parallel"], "--enable-expert-parallel"),
        (["--prefill-context-parallel-size", "2"], "--prefill-context-parallel-size"),
        (["--max-model-len", "128"], None),
    ],
)
def test_flags_that_rule_mixing_out_are_named(flag: list[str], named: str | None) -> None:
    if named is None:
        assert parse_flags(options(*flag)).max_model_len == 128
        return
    with pytest.raises(ValueError, match=f"{named} cannot be combined with mixing"):
        parse_flags(options(*flag))
    assert parse_flags(replace(options(*flag), mixing=False)).model == "model"


def test_a_flag_that_vllm_does_not_know_is_named() -> None:
    with pytest.raises(ValueError, match="FUSION_ENGINE_ARGS='--no-such-flag'"):
        parse_flags(options("--no-such-flag"))


def test_the_build_for_gpus_without_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flags, "current_platform", UnspecifiedPlatform())
    with pytest.raises(ValueError, match="finds none that it can use .*`make serve GPU=`"):
        parse_flags(options())


def test_another_scheduler_is_refused_since_ours_ends_overflows() -> None:
    with pytest.raises(ValueError, match="--scheduler-cls cannot be set"):
        parse_flags(options("--scheduler-cls", "vllm.v1.core.sched.scheduler.Scheduler"))


def test_templates_of_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="--trust-request-chat-template cannot be set"):
        parse_flags(options("--trust-request-chat"))


@pytest.mark.parametrize("flag", ["--port", "--ssl-certfile=a", "--ssl_keyfile", "--uds", "--host"])
def test_a_flag_that_would_do_nothing_is_refused(flag: str) -> None:
    with pytest.raises(ValueError, match=f"{flag} in FUSION_ENGINE_ARGS has no effect"):
        parse_flags(options(flag, "1"))


@pytest.mark.parametrize(
    ("slow", "given", "dtype"),
    [(True, (), "float32"), (True, ("--dtype", "bfloat16"), "bfloat16"), (False, (), "auto")],
)
def test_cpus_that_emulate_bfloat16_get_float32_by_default(
    slow: bool, given: tuple[str, ...], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.engine.flags.slow_bfloat16", lambda: slow)
    assert parse_flags(options(*given)).dtype == dtype


def test_a_quantized_base_keeps_its_own_dtype(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("service.engine.flags.slow_bfloat16", lambda: True)
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "awq"}}')
    assert parse_flags(replace(options(), model=str(tmp_path))).dtype == "auto"


@pytest.mark.parametrize(("extra", "set_"), [((), True), (("--gpu_memory_utilization=0.5",), False)])
def test_the_cpu_cache_takes_a_quarter_of_free_memory(
    monkeypatch: pytest.MonkeyPatch, extra: tuple[str, ...], set_: bool
) -> None:
    environment: dict[str, str] = {}
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=9 * 2**30))
    prepare_cpu(extra)
    assert environment.get("VLLM_CPU_KVCACHE_SPACE") == ("2" if set_ else None)
    environment["VLLM_CPU_KVCACHE_SPACE"] = "7"
    prepare_cpu(extra)
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "7"


@pytest.mark.parametrize("extra", [(), ("--structured-outputs-config", '{"backend": "guidance"}')])
def test_forms_of_answers_are_checked_by_the_backend_with_limits(extra: tuple[str, ...]) -> None:
    assert parse_flags(options(*extra)).structured_outputs_config.backend == "guidance"


@pytest.mark.parametrize("backend", ["xgrammar", "outlines", "lm-format-enforcer"])
@pytest.mark.parametrize("form", ["--structured-outputs-config={}", "--structured-outputs-config.backend={}"])
def test_a_backend_that_compiles_without_limits_is_refused(backend: str, form: str) -> None:
    flag = form.format(backend if form.endswith("backend={}") else f'{{"backend": "{backend}"}}')
    with pytest.raises(ValueError, match=f"backend '{backend}' .* cannot be set.*'guidance' is taken"):
        parse_flags(options(flag))


@pytest.mark.parametrize("given", [None, "0"])
def test_on_cpus_nothing_is_compiled_unless_the_user_says_so(
    monkeypatch: pytest.MonkeyPatch, given: str | None
) -> None:
    environment = {} if given is None else {"TORCH_COMPILE_DISABLE": given}
    monkeypatch.setattr(os, "environ", environment)
    prepare_cpu(())
    assert environment["TORCH_COMPILE_DISABLE"] == (given or "1")


@pytest.mark.parametrize(("cores", "given", "spins"), [(2, None, "3000"), (4, "passive", None), (8, None, None)])
def test_threads_of_few_cores_soon_sleep(
    cores: int, given: str | None, spins: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = {} if given is None else {"OMP_WAIT_POLICY": given}
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    prepare_cpu(())
    assert environment.get("GOMP_SPINCOUNT") == spins


@pytest.mark.parametrize(("ranks", "threads", "bind"), [(1, "8", None), (2, "4", "nobind"), (16, "1", "nobind")])
def test_ranks_share_the_cores_of_a_machine_with_one_numa_node(
    ranks: int, threads: str, bind: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment: dict[str, str] = {}
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(flags, "get_visible_memory_node", lambda: [0])
    prepare_cpu((), ranks)
    assert environment["OMP_NUM_THREADS"] == threads
    assert environment.get("VLLM_CPU_OMP_THREADS_BIND") == bind
    environment["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"
    prepare_cpu((), ranks)
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == "0|1"


@pytest.mark.parametrize(
    ("given", "ranks"),
    [
        ("", 1),
        ("--tensor-parallel-size 2 --pipeline-parallel-size 3", 6),
        ("--data-parallel-size 2 --tensor-parallel-size 2", 4),
        ("--data-parallel-size 4 --data-parallel-size-local 1", 1),
    ],
)
def test_flags_say_how_many_workers_there_are(given: str, ranks: int) -> None:
    assert count_ranks(parse_flags(options(*given.split()))) == ranks


@pytest.mark.parametrize("flag", ["--distributed-executor-backend", "--data-parallel-backend"])
def test_ray_is_refused_where_vllm_has_none(flag: str) -> None:
    with pytest.raises(ValueError, match="current platform cpu does not support ray.*leave"):
        parse_flags(options(flag, "ray"))
