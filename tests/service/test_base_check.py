"""Bases that this vLLM cannot serve adapters on are refused before an engine is started, in one sentence."""

import json
import re
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.multimodal import MULTIMODAL_REGISTRY

from service.base_model import read_layers
from service.engine import base_check
from service.engine.base_check import check_base, explain
from service.engine.base_folder import BaseModelError
from tests.conftest import launch
from tests.service.families import FAMILIES, QUANTIZED, SIZES, VISION, Family, make_base
from tests.service.quantized import FORMATS, UNSERVED, quantize_base

MIXTURE = Family("qwen3_moe", settings={"head_dim": 32, "num_experts": 4, "moe_intermediate_size": 64})


def configure(base: Path, dtype: str = "float32", **flags: Any) -> Any:
    """vLLM's configuration for a base."""
    return AsyncEngineArgs(model=str(base), enable_lora=True, dtype=dtype, **flags).create_engine_config()


@pytest.fixture(scope="module")
def falcon(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(FAMILIES["Falcon"], tmp_path_factory.mktemp("falcon") / "base")


def test_a_family_without_lora_is_refused(falcon: Path) -> None:
    with pytest.raises(BaseModelError, match=r"vLLM 0.32.0\S* has no LoRA for the base '.*' \(FalconForCausalLM\)"):
        check_base(configure(falcon))


def test_experts_need_a_gpu(tmp_path: Path) -> None:
    base = make_base(MIXTURE, tmp_path / "base")
    with pytest.raises(BaseModelError, match="has experts .* serve it on a GPU, or choose a dense base"):
        check_base(configure(base))
    check_base(configure(base, lora_target_modules=["q_proj"]))


@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
def test_other_families_pass(kind: str, tmp_path: Path) -> None:
    check_base(configure(make_base(Family(kind), tmp_path / "base")))


@pytest.mark.parametrize("name", VISION)
def test_layers_of_a_base_that_sees_are_those_of_its_language_model(name: str, tmp_path: Path) -> None:
    layers = read_layers(str(make_base(VISION[name], tmp_path / "base"))).dense
    assert layers
    assert all(".language_model.layers." in layer for layer in layers)


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is installed")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "LLaVA" else pytest.mark.soak) for name in VISION]
)
def test_a_base_that_sees_needs_torchvision(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))  # what vLLM knows of models it could inspect before
    base = make_base(VISION[name], tmp_path / "base")
    with pytest.raises(ValueError, match="failed to be inspected") as caught:
        configure(base)
    says = r"cannot serve the base 'some/base': its model \w+ needs the package 'torchvision', which is not installed"
    assert re.search(says, str(explain(caught.value, "some/base")))


def test_what_cannot_prepare_images_names_the_way_to_do_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(model: Any) -> None:
        raise OSError("no preprocessor_config.json")

    monkeypatch.setattr(MULTIMODAL_REGISTRY, "create_processor", fail)
    model = SimpleNamespace(model="some/base", supports_multimodal_inputs=True)
    with pytest.raises(BaseModelError, match="here: no preprocessor_config.json; .* add --language-model-only to"):
        base_check._check_inputs(model)  # noqa: SLF001 - no base that sees can be configured without torchvision


def quantized(name: str, folder: Path) -> Path:
    return quantize_base(make_base(QUANTIZED, folder / "whole"), name, folder)[0]


@pytest.mark.parametrize("name", sorted(UNSERVED))
def test_a_quantized_base_without_kernels_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="since it is quantized as .*; serve it on a GPU, or serve the base"):
        check_base(configure(quantized(name, tmp_path), dtype="bfloat16"))


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in UNSERVED])
def test_other_quantized_bases_pass(name: str, tmp_path: Path) -> None:
    check_base(configure(quantized(name, tmp_path), dtype="bfloat16"))


def test_what_vllm_says_of_an_unknown_architecture_becomes_one_sentence(tmp_path: Path) -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model("llama", **SIZES)
    config.architectures = ["NoSuchForCausalLM"]
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="NoSuchForCausalLM") as caught:
        configure(tmp_path)
    said = str(explain(caught.value, "some/base"))
    assert said.startswith("vLLM 0.32.0")
    assert said.endswith("cannot serve the base 'some/base': it has no model for ['NoSuchForCausalLM']")


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"rope_parameters": {"rope_type": "of-tomorrow", "rope_theta": 1e4}}, "KeyError: 'of-tomorrow'"),
        ({"hidden_act": "of-tomorrow"}, "KeyError: 'of-tomorrow'"),
        ({"hidden_size": "x"}, "hidden_size"),
        ({"vocab_size": -5}, "negative dimension"),
    ],
)
def test_a_configuration_of_another_time_ends_in_one_sentence(
    extra: dict[str, Any], words: str, tmp_path: Path
) -> None:
    content = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **SIZES, **extra}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(BaseModelError, match=r"^transformers cannot read the base '.*': ") as caught:
        read_layers(str(tmp_path))
    assert words in str(caught.value)


def test_what_is_no_value_error_says_its_type() -> None:
    said = str(explain(KeyError("of-tomorrow"), "some/base"))
    assert said.endswith("cannot serve the base 'some/base': KeyError: 'of-tomorrow'")


def test_a_base_that_generates_nothing_is_refused() -> None:
    config = SimpleNamespace(model_config=SimpleNamespace(model="some/encoder", runner_type="pooling"))
    with pytest.raises(BaseModelError, match="'some/encoder' does not generate text"):
        check_base(config)


def test_shapes_of_what_is_no_language_model_are_refused(tmp_path: Path) -> None:
    from transformers import AutoConfig

    AutoConfig.for_model("vit").save_pretrained(tmp_path)
    with pytest.raises(BaseModelError, match="'vit' is not a causal language model"):
        read_layers(str(tmp_path))


def test_a_server_ends_with_that_sentence_and_no_trace(falcon: Path, tmp_path: Path) -> None:
    process, _ = launch(tmp_path / "data", tmp_path, tmp_path / "log", FUSION_BASE=str(falcon), FUSION_ENGINE_ARGS="")
    assert process.wait(200) == 1
    log = (tmp_path / "log").read_text()
    assert "Traceback" not in log
    assert "EngineCore" not in log
    (line,) = [line for line in log.splitlines() if line.startswith("error: ")]
    assert "has no LoRA for the base" in line
