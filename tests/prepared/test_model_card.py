"""The model card: front matter that the Hub's own client reads, and a body that says what the manifest says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from nvfp4_prep.checkpoint.filenames import MANIFEST
from nvfp4_prep.commands.convert import convert
from nvfp4_prep.commands.sample import SampleModel, write_sample
from nvfp4_prep.options import ConvertOptions, GateUpPolicy, LayoutName
from nvfp4_prep.prepared.manifest import Manifest
from nvfp4_prep.prepared.model_card import front_matter, make_model_card
from nvfp4_prep_kernels import MoeLayout

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CARD = b"""---
license: other
license_name: nvidia-open
license_link: LICENSE
language: [en, "no"]
library_name: Model Optimizer
pipeline_tag: text-generation
base_model:
- org/original
base_model_relation: quantized
tags:
- nvidia
- nvfp4
model-index:
- name: x
  results: []
date: 2026-01-02
title: "\xc3\xa4: b # c"
---
# Source card
"""


@pytest.fixture
def manifest(sample_prepared: Path) -> Manifest:
    return Manifest.from_bytes((sample_prepared / MANIFEST).read_bytes())


def from_hub(manifest: Manifest, card: bytes = CARD) -> Manifest:
    return replace(manifest, source="nvidia/Kimi-NVFP4", revision=COMMIT, texts={**manifest.texts, "README.md": card})


def test_the_client_reads_the_front_matter(manifest: Manifest) -> None:
    card = ModelCard(make_model_card(from_hub(manifest)).decode())
    assert card.data.base_model == ["nvidia/Kimi-NVFP4"]
    assert card.data.to_dict()["base_model_relation"] == "quantized"
    assert (card.data.license, card.data.license_name, card.data.license_link) == ("other", "nvidia-open", "LICENSE")
    assert card.data.library_name == "vllm"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.tags == ["nvidia", "nvfp4", "moe", "nvfp4-prep", "flashinfer", "vllm"]
    assert card.data.language == ["en", "no"]
    assert card.data.to_dict()["title"] == "ä: b # c"
    assert "model-index" not in card.data.to_dict()


def test_a_directory_keeps_the_family_tree_of_its_source(manifest: Manifest) -> None:
    local = replace(manifest, texts={"README.md": CARD})
    assert front_matter(local)["base_model"] == ["org/original"]
    assert "base_model" not in front_matter(replace(manifest, texts={}))


@pytest.mark.parametrize(
    "card",
    [
        b"",
        b"no front matter",
        b"---\n- a list\n---\n",
        b"---\na: [unclosed\n---\n",
        b"---\na: b\n",
        b"\xff\xfe---\na: b\n---\n",
        b"---\n!!python/object/apply:os.system ['true']\n---\n",
        b"---\ndate: 2024-13-45\n---\n",
        b"---\nupdated: 2001-12-14t21:59:43.10-99:99\n---\n",
        b"---\nsize: " + b"9" * 5000 + b"\n---\n",
        b"---\nflag: 0b_\n---\n",
        b"---\nflag: !!bool maybe\n---\n",
        b"---\ndeep: " + b"[" * 3000 + b"]" * 3000 + b"\n---\n",
    ],
)
def test_a_card_that_cannot_be_read_does_no_harm(manifest: Manifest, card: bytes) -> None:
    assert set(front_matter(from_hub(manifest, card))) == {"tags", "library_name", "base_model", "base_model_relation"}
    ModelCard(make_model_card(from_hub(manifest, card)).decode())


def test_windows_line_ends_and_byte_order_mark(manifest: Manifest) -> None:
    windows = b"\xef\xbb\xbf" + CARD.replace(b"\n", b"\r\n")
    assert front_matter(from_hub(manifest, windows)) == front_matter(from_hub(manifest))


def test_the_body_says_what_the_manifest_says(manifest: Manifest) -> None:
    text = make_model_card(from_hub(manifest)).decode()
    assert f"nvidia/Kimi-NVFP4 at commit `{COMMIT}`" in text
    assert "https://huggingface.co/nvidia/Kimi-NVFP4" in text
    assert f"nvfp4-prep {manifest.tool_version}" in text
    dims = manifest.layers[0].dims
    assert f"{dims.experts} gated experts, intermediate {dims.intermediate}, hidden {dims.hidden}" in text
    sizes = manifest.tp_sizes
    served = f"{', '.join(map(str, sizes))}; any expert parallelism"
    assert f"| tensor-parallel sizes | {served} |" in text and f"Tensor-parallel sizes: {served}." in text
    for check in manifest.verified:
        assert f"{check['check']}: {check['result']} (" in text
        assert f"experts {check['experts']}" in text
    assert "nvfp4-prep restore" in text
    assert f"vllm serve <this repository> --tensor-parallel-size {sizes[-1]}\n" in text
    assert "# SGLang does not serve this checkpoint" in text  # the sample's hidden size is not a multiple of 128
    assert "The package is not on PyPI. In a clone of it" in text and "\npip install --no-deps ." in text
    assert "not recorded here: the smoke test" in text and "nvfp4-prep verify prepared --smoke" in text
    assert "auto_map" not in text and "trust-remote-code" not in text
    assert yaml.safe_load(text.split("---")[1])["tags"]


@pytest.mark.parametrize(("intermediate", "size"), [(2048, 8), (768, 4), (96, 1)], ids=["up to 32", "up to 12", "one"])
def test_the_commands_use_the_gpus_of_one_host(manifest: Manifest, intermediate: int, size: int) -> None:
    """Not the largest size that the file serves, which may be 12 or 32: what one tries first."""
    text = card_of(manifest, layout=LayoutName.CUTEDSL, hidden=256, intermediate=intermediate)
    assert f"\nvllm serve <this repository> --tensor-parallel-size {size}\n" in text
    assert f" --tp {size}" in text


def test_code_of_the_checkpoint_is_named_and_not_trusted(manifest: Manifest) -> None:
    config = b'{"model_type": "x", "auto_map": {"AutoConfig": "configuration_x.X"}}'
    text = make_model_card(replace(manifest, texts={**manifest.texts, "config.json": config})).decode()
    assert "`config.json` names Python code of this repository (`auto_map`)." in text
    commands = [line for line in text.splitlines() if line.startswith(("vllm serve", "python -m"))]
    assert commands and not any("trust" in line for line in commands)


def test_the_batched_layout_is_served_with_its_all_to_all(manifest: Manifest) -> None:
    """Without it vLLM refuses the file, and so does SGLang (below)."""
    batched = replace(manifest, options=ConvertOptions(layout=LayoutName.CUTEDSL_BATCHED))
    text = make_model_card(batched).decode()
    assert "--enable-expert-parallel --all2all-backend deepep_low_latency\n" in text


def card_of(
    manifest: Manifest, *, format_: str = "modelopt", layout: LayoutName, hidden: int, intermediate: int
) -> str:
    """The card of layers with other sizes."""
    layers = []
    for layer in manifest.layers:
        dims = replace(layer.source.dims, hidden=hidden, intermediate=intermediate)
        made = MoeLayout.trtllm(gated=True) if layout is LayoutName.TRTLLM else MoeLayout.cutedsl(gated=True)
        if layout is LayoutName.CUTEDSL_BATCHED:
            made = MoeLayout.cutedsl_batched()
        layers.append(replace(layer, source=replace(layer.source, dims=dims, format=format_), layout=made))
    return make_model_card(replace(manifest, layers=tuple(layers), options=ConvertOptions(layout=layout))).decode()


def sglang_options(card: str) -> str:
    """The options of the card's command for SGLang; nothing if there is none."""
    begin = "python -m sglang.launch_server --model-path <this repository> "
    found = (line.removeprefix(begin) for line in card.splitlines() if line.startswith(begin))
    return next(found, "")


@pytest.mark.parametrize(
    ("layout", "format_", "hidden", "intermediate", "options"),
    [
        (LayoutName.CUTEDSL, "modelopt", 256, 256, "--tp 4"),
        (LayoutName.TRTLLM, "modelopt", 384, 96, "--tp 1"),  # SGLang pads I as the file does
        (LayoutName.CUTEDSL, "modelopt", 384, 96, "--tp 1 --moe-runner-backend flashinfer_trtllm"),
        (LayoutName.CUTEDSL, "modelopt", 192, 256, ""),
        (LayoutName.TRTLLM, "modelopt", 192, 256, ""),
        (LayoutName.CUTEDSL_BATCHED, "modelopt", 256, 256, "--tp 2 --moe-a2a-backend deepep"),
        (LayoutName.CUTEDSL_BATCHED, "compressed-tensors", 256, 256, ""),
        (LayoutName.TRTLLM, "compressed-tensors", 256, 256, "--tp 2"),  # its share is a multiple of 128
        (LayoutName.CUTEDSL, "compressed-tensors", 256, 192, ""),
    ],
)
def test_sglang_is_named_where_it_serves_the_file(
    manifest: Manifest, layout: LayoutName, format_: str, hidden: int, intermediate: int, options: str
) -> None:
    card = card_of(manifest, format_=format_, layout=layout, hidden=hidden, intermediate=intermediate)
    assert sglang_options(card) == options


@pytest.mark.parametrize("policy", [GateUpPolicy.RECONCILE, GateUpPolicy.VLLM])
def test_differing_scales_are_told(tmp_path: Path, policy: GateUpPolicy) -> None:
    write_sample(tmp_path / "source", SampleModel(differing=1.0))
    made = convert(tmp_path / "source", tmp_path / "out", ConvertOptions(gate_up_scales=policy)).manifest
    text = (tmp_path / "out" / "README.md").read_text()
    differing = sum(layer.gate_up.differing for layer in made.layers)
    assert differing > 0
    assert f"In {differing} experts the gate and up projections have different global scales" in text
    assert f"Policy `{policy.value}`" in text
    assert ("block scales had to be rounded" in text) == (policy is GateUpPolicy.RECONCILE)
    assert ("gate's is used for both" in text) == (policy is GateUpPolicy.VLLM)


def test_agreeing_scales_are_not_mentioned(tmp_path: Path) -> None:
    write_sample(tmp_path / "source", SampleModel())
    convert(tmp_path / "source", tmp_path / "out")
    assert "Gate and up scales" not in (tmp_path / "out" / "README.md").read_text()


def test_a_directory_name_that_is_no_text(manifest: Manifest) -> None:
    assert b"# s?, prepared for" in make_model_card(replace(manifest, source="s\udcff"))


def test_it_is_the_same_every_time(manifest: Manifest) -> None:
    again = Manifest.from_bytes(manifest.to_bytes())
    assert make_model_card(again) == make_model_card(manifest)


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        (
            LayoutName.CUTEDSL,
            "the kernel `FLASHINFER_CUTEDSL`. A B200 server without flags runs `FLASHINFER_TRTLLM` with the original"
            " checkpoint. To stay on that kernel, add `--moe-backend flashinfer_trtllm` (vLLM) or"
            " `--moe-runner-backend flashinfer_trtllm` (SGLang): the weights",
        ),
        (
            LayoutName.TRTLLM,
            "the kernel `FLASHINFER_TRTLLM`. A B200 server without flags runs the same kernel with the original"
            " checkpoint.\n",
        ),
    ],
)
def test_the_kernel_is_named_beside_the_one_of_a_server_without_flags(
    manifest: Manifest, layout: LayoutName, said: str
) -> None:
    text = card_of(manifest, layout=layout, hidden=256, intermediate=128)
    assert f"\nThis file is for {said}" in text


def test_flags_are_those_of_servers_that_take_the_file(manifest: Manifest) -> None:
    text = card_of(manifest, layout=LayoutName.CUTEDSL, hidden=336, intermediate=128)
    assert "add `--moe-backend flashinfer_trtllm`: the weights" in text
    assert "--moe-runner-backend" not in text
    batched = card_of(manifest, layout=LayoutName.CUTEDSL_BATCHED, hidden=256, intermediate=128)
    assert "without flags" not in batched
