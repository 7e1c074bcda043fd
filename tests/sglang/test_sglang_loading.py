"""Load formats, dummy weights, and reloads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from sglang_compare import RAW_SCALES, UNREAD, Job, run
from sglang_models import MODELS, Checkpoints, Model, dims_of
from sglang_on_cpu import load_for_updates, load_model, make_server_args, rank_of
from sglang_ranks import Ranks
from sglang_states import as_bytes, differences, expert_layers, experts_state, storage_of

from nvfp4_prep.checkpoint.filenames import EXPERTS_PREFIX, INDEX
from nvfp4_prep.checkpoint.safetensors_header import read_header
from nvfp4_prep.load import ExpertLoader, LoadOptions, WholeTensors, handle_of
from nvfp4_prep.options import ConvertOptions
from nvfp4_prep.sglang.sources import serves_prepared
from nvfp4_prep_kernels import MoeLayout, PreparedTensor

CUTEDSL, TRTLLM = "flashinfer_cutedsl", "flashinfer_trtllm"
QWEN, DEEPSEEK = MODELS["qwen3_moe"], MODELS["deepseek_v3"]
pytestmark = pytest.mark.usefixtures("plugin")


def left_out(backend: str) -> tuple[str, ...]:
    return (*RAW_SCALES, *UNREAD) if backend == CUTEDSL else RAW_SCALES


def share_nbytes(model: Model, ranks: int) -> int:
    """Bytes of one rank's share of all codes and block scales."""
    layout = MoeLayout.trtllm(gated=model.gated)
    layer = sum(layout.expert_nbytes(tensor, dims_of(model)) for tensor in PreparedTensor) * model.sizes[0]
    return layer * len(model.layers) // ranks


@pytest.mark.parametrize(
    "load",
    [
        {"load_format": "safetensors"},
        {"model_loader_extra_config": {"enable_multithread_load": False}},
        {"load_format": "nvfp4_prep"},
        {"load_format": "nvfp4_prep", "model_loader_extra_config": {"others": "auto", "threads": 1}},
        {"load_format": "nvfp4_prep", "model_loader_extra_config": {"threads": 2, "others": "safetensors"}},
    ],
    ids=["safetensors", "one thread", "nvfp4_prep", "nvfp4_prep, one thread", "nvfp4_prep, others by SGLang"],
)
@pytest.mark.parametrize("backend", [CUTEDSL, TRTLLM])
def test_load_formats(checkpoints: Checkpoints, backend: str, load: dict[str, Any]) -> None:
    source, prepared = checkpoints.get(QWEN, trtllm=backend == TRTLLM)
    outcome = run(Job(str(source), str(prepared), backend, left_out=left_out(backend), load=load))
    assert (outcome.unsupported, outcome.differences) == (None, [])
    rank_exact = load.get("load_format") == "nvfp4_prep"
    assert outcome.prepared.nbytes == (share_nbytes(QWEN, 1) if rank_exact else 0)
    streamed = rank_exact and load.get("model_loader_extra_config", {}).get("others", "auto") == "auto"
    assert outcome.prepared.whole_nbytes == (others_nbytes(prepared) if streamed else 0)


def files_of(prepared: Path, *, experts: bool) -> list[Path]:
    """Files that a server reads: of prepared experts, or the others."""
    names = set(json.loads((prepared / INDEX).read_text())["weight_map"].values())
    return [prepared / name for name in names if name.startswith(EXPERTS_PREFIX) == experts]


def others_nbytes(prepared: Path) -> int:
    """Bytes of all tensors that are not in the files of prepared experts."""
    return sum(record.nbytes for path in files_of(prepared, experts=False) for record in read_header(path).tensors)


def streams(args: Any, monkeypatch: pytest.MonkeyPatch, **load: Any) -> tuple[list[Any], int]:
    """What a model gets of everything that is not a prepared expert, and how often SGLang opened a file for it."""
    from sglang.srt.model_loader import weight_utils
    from sglang.srt.model_loader.loader import DefaultModelLoader

    got, opened = list[Any](), 0
    load_weights_only, safe_open = DefaultModelLoader.load_weights_only, weight_utils.safetensors.safe_open

    def counted_open(*args: Any, **kwargs: Any) -> Any:
        nonlocal opened
        opened += 1
        return safe_open(*args, **kwargs)

    def kept(weights: Any) -> Any:
        for name, tensor in weights:
            if ".experts.w" not in name:
                got.append((name, tensor.dtype, tuple(tensor.shape), as_bytes(tensor).tolist()))
            yield name, tensor

    with monkeypatch.context() as patched, rank_of(args):
        patched.setattr(
            DefaultModelLoader,
            "load_weights_only",
            staticmethod(lambda model, weights, device: load_weights_only(model, kept(weights), device)),
        )
        patched.setattr(weight_utils.safetensors, "safe_open", counted_open)
        load_model(args, **load)
    return got, opened


@pytest.mark.parametrize("name", ["deepseek_v3", "kimi_k25", "llama4"])
def test_the_rest_is_streamed_as_sglang_reads_it(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The same names in the same order, dtypes, shapes and bytes, and no file is read whole into host memory."""
    _, prepared = checkpoints.get(MODELS[name], trtllm=True)
    args = make_server_args(prepared)
    expected, files = streams(args, monkeypatch)
    others = len(files_of(prepared, experts=False))
    assert files == others + len(files_of(prepared, experts=True))
    actual, opened = streams(args, monkeypatch, load_format="nvfp4_prep")
    assert (actual == expected, opened) == (True, 0)
    by_sglang, opened = streams(
        args, monkeypatch, load_format="nvfp4_prep", model_loader_extra_config={"others": "safetensors"}
    )
    assert (by_sglang == expected, opened) == (True, others)


@pytest.mark.parametrize("option", ["weight_loader_disable_mmap", "weight_loader_drop_cache_after_load"])
def test_sglangs_own_options_for_the_rest_are_kept(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    _, prepared = checkpoints.get(QWEN, trtllm=True)
    expected, _ = streams(make_server_args(prepared), monkeypatch)
    with monkeypatch.context() as patched:
        patched.setattr(WholeTensors, "stream", lambda *_args, **_kwargs: pytest.fail("SGLang's own was asked for"))
        args = make_server_args(prepared, **{option: True})
        assert streams(args, monkeypatch, load_format="nvfp4_prep")[0] == expected


def test_the_files_of_one_draft_model_of_several(tmp_path: Path) -> None:
    """SGLang numbers draft models from 0 each, and passes over the others' tensors; so do the handles."""
    from sglang.srt.configs.load_config import LoadConfig

    from nvfp4_prep.serving.expert_files import ExpertFiles
    from nvfp4_prep.sglang.load_format import PreparedModelLoader

    names = [f"model.mtp.layers.{number}.mlp.experts.routed_experts.w2_weight" for number in range(3)]
    file = tmp_path / "experts-layer-00000.safetensors"
    save_file({name: torch.full((2, 2), number, dtype=torch.uint8) for number, name in enumerate(names)}, file)
    loader = PreparedModelLoader(LoadConfig(draft_model_idx=2))
    with ExpertLoader("cpu", LoadOptions(threads=1)) as experts:
        files = ExpertFiles(experts)
        files.set_apart([str(file)])
        (name, handle), *others = loader._handles(files)
        found = handle_of(handle)
        experts.finish()
    assert others == [] and name == names[0]
    assert found is not None and found.record.name == names[2]


TP2, EP2 = {"tp_size": 2}, {"tp_size": 2, "ep_size": 2}


@pytest.mark.parametrize(
    ("parallel", "extra", "exchanged"),
    [(TP2, {}, 2), (TP2, {"cooperative": False}, 0), (EP2, {}, 0)],
    ids=["TP2", "TP2, each rank alone", "TP2 with EP2"],
)
@pytest.mark.parametrize("asked", ["auto", CUTEDSL], ids=["no flag", "permuted"])
def test_rank_exact_format(
    checkpoints: Checkpoints, ranks: Any, parallel: dict[str, Any], extra: dict[str, Any], exchanged: int, asked: str
) -> None:
    """The ranks read the experts once, each its share of the experts or of their columns, and no byte more."""
    model = replace(QWEN, one_input_scale=True)
    source, prepared = checkpoints.get(model, trtllm=True)
    outcomes = ranks.run(tensor_parallel_job(source, prepared, asked, parallel, extra))
    for outcome in outcomes:
        assert (outcome.unsupported, outcome.differences) == (None, [])
        assert outcome.prepared.nbytes == share_nbytes(model, 2)
        assert outcome.prepared.exchanged == exchanged * outcome.layers
    whole = sum(path.stat().st_size for path in prepared.glob("experts-layer-*.safetensors"))
    if not extra:
        assert sum(outcome.prepared.read_nbytes for outcome in outcomes) <= 1.01 * whole


def tensor_parallel_job(
    source: Path, prepared: Path, asked: str, parallel: dict[str, Any], extra: dict[str, Any], failing: str = ""
) -> Job:
    load = {"load_format": "nvfp4_prep", "model_loader_extra_config": {"direct_io": "never", **extra}}
    backend = TRTLLM if asked == "auto" else asked
    return Job(str(source), str(prepared), backend, asked, options=parallel, load=load, failing=failing)


def test_a_file_padded_for_two_ranks(checkpoints: Checkpoints, ranks: Any) -> None:
    """`--moe-tp 2` serves I 192 at TP2, each rank 96 of it, where SGLang gives rank 0 the first 128 of the source.

    So the ranks' weights differ from the source's, and nothing else.
    """
    options = ConvertOptions(moe_tp=2)
    source, prepared = checkpoints.get(
        replace(QWEN, one_input_scale=True).with_sizes(4, 256, 192), options, trtllm=True
    )
    for outcome in ranks.run(Job(str(source), str(prepared), TRTLLM, options=TP2)):
        assert outcome.unsupported is None
        assert outcome.prepared.calls == 9 * outcome.layers
        weights = {tensor.value for tensor in PreparedTensor}
        aliases = {"w13_blockscale_swizzled", "w2_blockscale_swizzled"}
        assert {name.rpartition("/")[2] for name in outcome.differences} <= weights | aliases
        assert outcome.differences


def test_a_rank_that_cannot_read_ends_all(checkpoints: Checkpoints, ranks: Any) -> None:
    source, prepared = checkpoints.get(replace(QWEN, one_input_scale=True), trtllm=True)
    failed = ranks.run_to_failure(tensor_parallel_job(source, prepared, "auto", TP2, {}, "cannot read"))
    for text in failed:
        assert text is not None
        assert "nvfp4_prep.errors.LoadError: rank 1 of 2 failed: " in text and "Input/output error" in text


def test_a_killed_rank_ends_the_other(checkpoints: Checkpoints) -> None:
    source, prepared = checkpoints.get(replace(QWEN, one_input_scale=True), trtllm=True)
    mortal = Ranks()
    try:
        job = tensor_parallel_job(source, prepared, "auto", TP2, {}, "killed before it exchanges")
        survivor, killed = mortal.run_to_failure(job)
    finally:
        mortal.close()
    assert killed is None and survivor is not None
    assert "nvfp4_prep.errors.LoadError: rank 1 of 2, which does not answer, did not take part" in survivor


@pytest.mark.parametrize("backend", [CUTEDSL, TRTLLM])
def test_rank_exact_format_without_the_padding_of_h(checkpoints: Checkpoints, backend: str) -> None:
    source, prepared = checkpoints.get(QWEN.with_sizes(4, 384, 128), trtllm=backend == TRTLLM)
    load = {"load_format": "nvfp4_prep"}
    outcome = run(Job(str(source), str(prepared), backend, left_out=left_out(backend), load=load))
    assert (outcome.unsupported, outcome.differences) == (None, [])
    assert outcome.prepared.nbytes == share_nbytes(QWEN.with_sizes(4, 384, 128), 1) * 384 // 512


def test_rank_exact_format_of_a_stock_checkpoint(checkpoints: Checkpoints) -> None:
    from nvfp4_prep.errors import ServingError

    source, _ = checkpoints.get(QWEN)
    args = make_server_args(source, moe_runner_backend=TRTLLM)
    with rank_of(args), pytest.raises(ServingError, match="found no prepared experts"):
        load_model(args, load_format="nvfp4_prep")


def test_dummy_weights_need_no_files(checkpoints: Checkpoints, tmp_path: Path) -> None:
    _, prepared = checkpoints.get(QWEN, trtllm=True)
    (tmp_path / "config.json").write_bytes((prepared / "config.json").read_bytes())
    states = []
    for directory, load in ((prepared, {}), (tmp_path, {"load_format": "dummy"})):
        args = make_server_args(directory)
        with rank_of(args):
            states.append(experts_state(load_model(args, **load)))
            assert serves_prepared()
    real, dummy = states
    assert dummy.keys() == real.keys()
    for name, value in real.items():
        if isinstance(value, torch.Tensor):
            assert (dummy[name].shape, dummy[name].dtype) == (value.shape, value.dtype), name
        else:
            assert dummy[name] == value, name


@pytest.mark.parametrize("backend", [CUTEDSL, TRTLLM])
@pytest.mark.parametrize("trtllm", [False, True], ids=["cutedsl file", "trtllm file"])
def test_reload_twice(checkpoints: Checkpoints, backend: str, trtllm: bool) -> None:
    """The same values in the same storage, permuted again where needed."""
    _, prepared = checkpoints.get(QWEN, trtllm=trtllm)
    _, other = checkpoints.get(replace(QWEN, family="qwen3_moex"), trtllm=trtllm)  # other bytes, same sizes
    args = make_server_args(prepared, moe_runner_backend=backend)
    with rank_of(args):
        model, updater = load_for_updates(args)
        first, where = experts_state(model), storage_of(model)
        for directory in (other, prepared, prepared):
            assert updater.update_weights_from_disk(str(directory), "auto")[0]
            assert storage_of(model) == where
            changed = any(name.endswith("w13_weight") for name in differences(first, experts_state(model)))
            assert changed == (directory == other)
        assert differences(first, experts_state(model)) == []


def test_redundant_experts_move_in_place(checkpoints: Checkpoints) -> None:
    """The parameters that EPLB moves are SGLang's own set, expert by expert."""
    states = []
    for directory, backend in zip(checkpoints.get(QWEN, trtllm=True), (TRTLLM, "auto"), strict=True):
        args = make_server_args(directory, moe_runner_backend=backend)
        with rank_of(args):
            model = load_model(args)
            names = {
                name: sorted(key for key, _ in layer.named_per_expert_tensors(layer.num_local_experts))
                for name, layer in expert_layers(model).items()
            }
            states.append(names)
    assert states[0] == states[1]
