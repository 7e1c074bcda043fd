"""What the plugin must not do: touch stock checkpoints. And what plain vLLM must do: refuse a prepared one."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nvfp4_prep.vllm import register
from support.paths import SUPPORT
from support.serving.compare import Counts, counting
from support.serving.families import COMPRESSED, FAMILIES
from support.serving.results import REFUSALS, Checkpoints
from support.serving.stand_ins import without_plugin
from support.serving.states import differences, snapshot
from support.serving.vllm_on_cpu import load_model, make_vllm_config, rank_of, routed_experts

QWEN = FAMILIES["qwen3_moe"]
MIXED = replace(QWEN, quant="modelopt_mixed")
LEGACY = replace(FAMILIES["deepseek_v3"], quant="modelopt_legacy")
STOCK = {"modelopt": QWEN, "mixed": MIXED, "compressed-tensors": COMPRESSED, "hf_quant_config.json": LEGACY}


def observe(directory: Path, **options: Any) -> dict[str, Any]:
    """Everything that a user or a model could notice of the resolved configuration, and all loaded state."""
    config = make_vllm_config(directory, **options)
    with rank_of(config), counting(Counts()):  # which gives parameters that no file has a fixed value
        model = load_model(config)
        layers = routed_experts(model).values()
        quant = config.quant_config
        return {
            **snapshot(model),
            "method": config.model_config.quantization,
            "nvfp4": config.model_config.is_nvfp4_quantized(),
            "config class": type(quant),
            "config name": quant.get_name(),
            "config state": {key: repr(value) for key, value in vars(quant).items()},
            "hf config": config.model_config.hf_config.quantization_config,
            "arch config": config.model_config.model_arch_config.quantization_config,
            "expert methods": [type(layer.quant_method) for layer in layers],
            "requested backends": [layer.moe_config.moe_backend for layer in layers],
            "methods": sorted({type(getattr(m, "quant_method", None)).__name__ for m in model.modules()}),
        }


@pytest.mark.parametrize("kind", STOCK)
def test_a_stock_checkpoint_behaves_as_without_the_plugin(checkpoints: Checkpoints, kind: str) -> None:
    source, _ = checkpoints.get(STOCK[kind])
    with without_plugin():
        before = observe(source)
    register()
    after = observe(source)
    if kind == "mixed":
        before.pop("config state"), after.pop("config state")  # sub-config objects, whose repr is their address
    assert differences(before, after) == []
    assert after["expert methods"] == before["expert methods"]


@pytest.mark.parametrize("kind", ["modelopt", "compressed-tensors"])
def test_the_backend_choice_for_a_stock_checkpoint_stays(checkpoints: Checkpoints, kind: str) -> None:
    """With --moe-backend auto the choice among all backends is vLLM's own."""
    source, _ = checkpoints.get(STOCK[kind])
    with without_plugin():
        before = observe(source, moe_backend="auto")
    register()
    assert differences(before, observe(source, moe_backend="auto")) == []


@pytest.mark.parametrize("kind", STOCK)
def test_a_prepared_checkpoint_resolves_as_its_source(checkpoints: Checkpoints, kind: str) -> None:
    """What other parts of vLLM ask for: method name, NVFP4 or not, the quantization config, linear layers' methods."""
    source, prepared = checkpoints.get(STOCK[kind])
    register()
    stock, ours = observe(source), observe(prepared, moe_backend="auto")
    same = ("method", "nvfp4", "config name")
    assert {key: ours[key] for key in same} == {key: stock[key] for key in same}
    assert stock["nvfp4"] or kind == "mixed"  # of which vLLM 0.31 says no
    assert isinstance(ours["config class"], type) and issubclass(ours["config class"], stock["config class"])
    if kind != "mixed":  # that one holds sub-config objects, whose repr is their address
        assert {key: value for key, value in ours["config state"].items() if key != "stamp"} == stock["config state"]
    for place in ("hf config", "arch config"):
        assert {key: value for key, value in ours[place].items() if key != "nvfp4_prep_stamp"} == stock[place]
    stock_experts = {method.__name__ for method in stock["expert methods"]}
    assert set(ours["methods"]) - {"PreparedNvFp4MoEMethod"} == set(stock["methods"]) - stock_experts


def test_plain_vllm_refuses_a_prepared_checkpoint(checkpoints: Checkpoints) -> None:
    """Before anything is loaded, with the method's name in the message."""
    _, prepared = checkpoints.get(QWEN)
    with without_plugin(), pytest.raises(ValueError, match="Unknown quantization method: nvfp4_prep") as caught:
        make_vllm_config(prepared)
    REFUSALS.append(("plain vLLM, no plugin", str(caught.value).splitlines()[1].strip()[:120] + " …"))


SCRIPT = """
import os, sys
sys.path[:0] = {path!r}
from support.serving.vllm_on_cpu import bring_up, make_vllm_config
bring_up()
from pathlib import Path
from vllm.plugins import load_general_plugins
for plugins in {cases!r}:
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        continue
    if plugins:
        os.environ["VLLM_PLUGINS"] = plugins
    load_general_plugins()
    try:
        config = make_vllm_config(Path({directory!r}), moe_backend="auto")
        print(plugins, "RESOLVED", config.model_config.quantization, type(config.quant_config).__name__, flush=True)
    except Exception as error:
        print(plugins, "REFUSED", str(error).replace(chr(10), " "), flush=True)
    os._exit(0)
"""
CASES = {"": True, "nvfp4_prep": True, "something_else": False}
"""Values of the allow-list VLLM_PLUGINS, unset for the first, and whether a prepared checkpoint is served."""


@pytest.fixture(scope="module")
def resolved(checkpoints: Checkpoints) -> dict[str, str]:
    """What each case gives in a new process, forked into one a case where vLLM is imported and has loaded no plugin."""
    _, prepared = checkpoints.get(QWEN)
    script = SCRIPT.format(path=[str(SUPPORT.parent)], directory=str(prepared), cases=list(CASES))
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_PLUGINS"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if " RESOLVED " in line or " REFUSED " in line]
    assert len(lines) == len(CASES), done.stdout + done.stderr
    return dict(zip(CASES, lines, strict=True))


@pytest.mark.parametrize("plugins", CASES)
def test_the_installed_entry_point_is_what_vllm_loads(resolved: dict[str, str], plugins: str) -> None:
    """In a process of its own, through importlib.metadata, with and without the allow-list VLLM_PLUGINS."""
    if CASES[plugins]:
        assert resolved[plugins] == f"{plugins} RESOLVED modelopt_fp4 PreparedModelOptNvFp4Config"
    else:
        assert resolved[plugins].startswith(f"{plugins} REFUSED ")
        assert "Unknown quantization method: nvfp4_prep" in resolved[plugins]
