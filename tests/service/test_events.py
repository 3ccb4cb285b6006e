"""Events of the key-value cache, in vLLM's own block pool: which name they have."""

import pytest
from vllm.distributed.kv_events import BlockStored
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.request import Request

from service.engine import block_keys
from service.engine.events import name_events
from service.engine.models import mix_request

BLOCK = 4


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    kv_cache_utils.init_none_hash(sha256)
    monkeypatch.setattr(LoRARequest, "name", LoRARequest.name)  # put back at the end
    block_keys.install()
    name_events()


def stored(lora: LoRARequest | None) -> BlockStored:
    """The event of a prompt's first two blocks."""
    hasher = kv_cache_utils.get_request_block_hasher(BLOCK, sha256)
    request = Request("r", list(range(9)), SamplingParams(max_tokens=1), None, lora_request=lora, block_hasher=hasher)
    pool = BlockPool(num_gpu_blocks=8, enable_caching=True, hash_block_size=BLOCK, enable_kv_cache_events=True)
    pool.cache_full_blocks(
        request=request,
        blocks=pool.get_new_blocks(2),
        num_cached_blocks=0,
        num_full_blocks=2,
        block_size=BLOCK,
        kv_cache_group_id=0,
    )
    (event,) = pool.take_events()
    assert isinstance(event, BlockStored)
    return event


@pytest.mark.parametrize("weights", [[(2, 0.5), (3, -1.0)], None], ids=["mixed", "built"])
def test_a_block_has_the_name_that_the_client_sent(weights: list[tuple[int, float]] | None) -> None:
    loaded = LoRARequest("~stack/abc", 1000, "/folder/adapter")
    event = stored(mix_request(loaded, "ab" * 32, weights, "balanced"))
    assert event.lora_name == "balanced"
    assert event.extra_keys is not None
    assert "," not in "".join(str(key) for keys in event.extra_keys for key in keys or ())
    assert "/folder" not in str(event)


def test_a_block_of_the_base_has_none_and_one_without_a_public_name_its_own() -> None:
    assert stored(None).lora_name is None
    assert stored(LoRARequest("plain", 1, "/x")).lora_name == "plain"


def test_what_identifies_an_adapter_is_as_before() -> None:
    one, other = (LoRARequest("~stack/a", 1, "/x", name) for name in ("balanced", "other"))
    assert one == other
    assert hash(one) == hash(other)
    assert stored(one).block_hashes == stored(other).block_hashes
