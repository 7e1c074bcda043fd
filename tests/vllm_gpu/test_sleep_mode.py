"""vLLM's sleep mode with prepared experts: vLLM's own allocator of GPU memory and its worker's ``sleep`` and
``wake_up``.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.gpu

PROMPT = list(range(10, 31))


@pytest.fixture
def asleep_and_awake(case: Any) -> Any:
    """The model in vLLM's pool, and a worker that has nothing but it."""
    from vllm.device_allocator.cumem import CuMemAllocator
    from vllm.device_allocator.sleep_mode_backend import CuMemBackend
    from vllm.v1.worker.gpu_worker import Worker

    from support.serving.vllm_on_gpu import loaded

    class OneModel(Worker):
        """``sleep`` and ``wake_up`` as they are; of the rest what they read."""

        def __init__(self, config: Any, model: torch.nn.Module) -> None:
            self.vllm_config, self.model_config = config, config.model_config
            self.model_runner = SimpleNamespace(model=model)
            self._sleep_mode_backend = CuMemBackend()
            self._sleep_saved_buffers: dict[str, torch.Tensor] = {}
            self._sleep_saved_draft_buffers: dict[str, torch.Tensor] = {}
            self._sleep_saved_parameters: dict[str, torch.Tensor] = {}

        def get_draft_model(self) -> None:
            return None

        def synchronize_device(self) -> None:
            torch.accelerator.synchronize()

    allocator = CuMemAllocator.get_instance()
    pool = allocator.use_memory_pool("weights")
    with loaded(case.prepared, pool, moe_backend="flashinfer_cutedsl") as whole:
        yield whole, OneModel(whole.config, whole.model), allocator
        allocator.wake_up()  # what sleeps cannot be freed


def pooled(model: torch.nn.Module, allocator: Any) -> int:
    """Bytes of the pool; every parameter and kernel argument of the experts lies in it."""
    from support.serving.states import storage_of

    ranges = [(pointer, pointer + data.handle[1]) for pointer, data in allocator.pointer_to_data.items()]
    outside = [
        name for name, address in storage_of(model).items() if not any(low <= address < high for low, high in ranges)
    ]
    assert outside == []
    assert not any(data.is_asleep for data in allocator.pointer_to_data.values())
    return sum(data.handle[1] for data in allocator.pointer_to_data.values())


@pytest.mark.parametrize("level", [1, 2])
def test_awake_again_the_model_is_what_it_was(case: Any, asleep_and_awake: Any, level: int) -> None:
    """Level 2 throws the weights away: the same directory brings them back."""
    from support.serving.installed import reload_from
    from support.serving.states import differences, snapshot, storage_of

    whole, worker, allocator = asleep_and_awake
    expected, before, storage = whole.log_probabilities(PROMPT), snapshot(whole.model), storage_of(whole.model)
    nbytes = pooled(whole.model, allocator)
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    worker.sleep(level=level)
    freed = torch.cuda.mem_get_info()[0] - free
    assert freed >= nbytes
    worker.wake_up()
    assert storage_of(whole.model) == storage
    if level == 2:
        gone = differences(before, snapshot(whole.model))
        assert any(name.endswith("/w13_weight") for name in gone)
        reload_from(whole.config, whole.model, case.prepared)
    assert storage_of(whole.model) == storage
    assert differences(before, snapshot(whole.model)) == []
    assert torch.equal(whole.log_probabilities(PROMPT), expected)
    print(
        f"\n{case.model.name}, {case.layout.value}, level {level}: {nbytes:,} bytes in the pool, {freed:,} freed;"
        f" {len(before)} tensors and the forward pass bit-equal"
    )
