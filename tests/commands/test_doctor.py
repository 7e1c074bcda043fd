"""What doctor says of a machine, and the completion scripts."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from nvfp4_prep._util import installed
from nvfp4_prep._version import __version__
from nvfp4_prep.cli import cli
from nvfp4_prep.commands import doctor
from nvfp4_prep.commands.doctor import Diagnosis, diagnose, measure_disk
from nvfp4_prep.errors import UsageError
from nvfp4_prep.vllm.versions import TESTED


def ability(found: Diagnosis, name: str) -> doctor.Ability:
    return next(item for item in found.abilities if name in item.name)


@pytest.fixture
def serving_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that has everything."""
    versions = {"vllm": f"{TESTED[0]}.0"}
    monkeypatch.setattr(installed, "_version", lambda name: versions.get(name, "1"))
    monkeypatch.setattr(doctor, "_cards", lambda: (("B200, compute capability 10.0, 192 GB",), ""))
    point = EntryPoint("nvfp4_prep", "nvfp4_prep.vllm:register", doctor.PLUGIN_GROUP)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [point])
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)


def test_this_machine() -> None:
    found = diagnose()
    assert found.ok
    assert found.versions["nvfp4-prep"] == __version__
    assert found.versions["torch"] == importlib.metadata.version("torch")
    assert len(found.cards) == torch.cuda.device_count()
    assert ability(found, "smoke").works
    if not torch.cuda.is_available():
        assert "no CUDA GPU" in ability(found, "smoke").reason
        assert not ability(found, "serving").works


def test_machine_that_serves(serving_machine: None) -> None:
    assert ability(diagnose(), "serving").works
    assert ability(diagnose(), "plugin").works


def test_plugin_left_out_by_the_allow_list(serving_machine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "other,another")
    assert "leaves nvfp4_prep out" in ability(diagnose(), "plugin").reason
    assert not ability(diagnose(), "serving").works
    monkeypatch.setenv("VLLM_PLUGINS", "")  # vLLM allows nothing then
    assert not ability(diagnose(), "plugin").works
    monkeypatch.setenv("VLLM_PLUGINS", "other,nvfp4_prep")
    assert ability(diagnose(), "serving").works


def test_untested_vllm_and_wrong_card(serving_machine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, "_version", lambda name: "0.1.0")
    assert "0.1.0" in ability(diagnose(), "serving").reason
    monkeypatch.setattr(doctor, "_cards", lambda: (("H200, compute capability 9.0, 141 GB",), ""))
    assert "10.x" in ability(diagnose(), "serving").reason


def test_no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_cards", lambda: ((), "torch cannot be imported (no such module)"))
    found = diagnose()
    assert not found.ok
    assert "torch cannot be imported" in ability(found, "convert").reason
    result = CliRunner().invoke(cli, ["doctor", "--json"])
    assert result.exit_code == 1
    assert json.loads(result.stdout)["ok"] is False


def test_disk_is_measured_and_left_clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_DISK_NBYTES", 32 * 2**20)
    found = measure_disk(tmp_path)
    assert 0 < found.write_gb_per_s < 100
    assert found.read_gb_per_s is None or found.read_gb_per_s > 0
    assert found.locks
    assert list(tmp_path.iterdir()) == []
    text = CliRunner().invoke(cli, ["doctor", str(tmp_path)]).stdout
    assert "GB/s with fsync" in text


def test_disk_without_room_or_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="No such file"):
        measure_disk(tmp_path / "nowhere")
    monkeypatch.setattr(doctor, "_DISK_NBYTES", 10**18)
    with pytest.raises(UsageError, match="too little"):
        measure_disk(tmp_path)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str) -> None:
    result = CliRunner().invoke(cli, ["completion", shell])
    assert result.exit_code == 0
    assert f"_NVFP4_PREP_COMPLETE={shell}_complete" in result.stdout


@pytest.mark.slow
def test_completion_in_a_real_bash(tmp_path: Path) -> None:
    """The script, sourced, completes commands and options."""
    program = tmp_path / "nvfp4-prep"
    program.write_text(f"#!{sys.executable}\nfrom nvfp4_prep.cli import main\nmain()\n")
    program.chmod(0o755)
    script = CliRunner().invoke(cli, ["completion", "bash"]).stdout
    commands = """
COMP_WORDS=(nvfp4-prep con); COMP_CWORD=1; _nvfp4_prep_completion nvfp4-prep; echo "${COMPREPLY[@]}"
COMPREPLY=(); COMP_WORDS=(nvfp4-prep convert --gate-up-s); COMP_CWORD=2; _nvfp4_prep_completion nvfp4-prep
echo "${COMPREPLY[@]}"
"""
    roots = [str(Path(doctor.__file__).parents[2]), str(Path(doctor.__file__).parents[3] / "kernels")]
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([*roots, os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(
        ["bash", "--norc", "-c", script + commands], capture_output=True, text=True, env=environment, check=False
    )
    assert done.stdout.split() == ["convert", "--gate-up-scales"], done.stderr


def test_sglang_beside_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"sglang": "0.5.23"}
    monkeypatch.setattr(installed, "_version", lambda name: versions.get(name, ""))
    monkeypatch.setattr(doctor, "_cards", lambda: (("B200, compute capability 10.0, 192 GB",), ""))
    monkeypatch.delenv("SGLANG_PLUGINS", raising=False)
    point = EntryPoint("nvfp4_prep", "nvfp4_prep.sglang:register", doctor.SGLANG_PLUGIN_GROUP)
    ours = {doctor.SGLANG_PLUGIN_GROUP: [point]}
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: ours.get(group, []))
    assert ability(diagnose(), "SGLang plugin").works
    assert ability(diagnose(), "serving with SGLang").works
    assert not ability(diagnose(), "serving with vLLM").works
    versions["sglang"] = "0.5.22"
    assert "0.5.22" in ability(diagnose(), "serving with SGLang").reason
    monkeypatch.setenv("SGLANG_PLUGINS", "other")
    assert "leaves nvfp4_prep out" in ability(diagnose(), "SGLang plugin").reason
    for allowed in ("", "other, nvfp4_prep"):  # SGLang takes an empty one for none, and strips names
        monkeypatch.setenv("SGLANG_PLUGINS", allowed)
        assert ability(diagnose(), "SGLang plugin").works
