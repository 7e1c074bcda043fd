"""Wheel and sdist, used outside the tree: typed, and importable without a GPU and without what is optional."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest

import nvfp4_prep
from support.paths import ROOT

pytestmark = pytest.mark.slow

needs_build = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("build", "hatchling")), reason="needs build and hatchling"
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist of this tree and the wheel made from that sdist."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(command, check=True, capture_output=True, env=environment)
    return out


@pytest.fixture(scope="module")
def python(built: Path) -> Path:
    """The interpreter of a throwaway environment that has the wheel; third-party packages come from the one that runs
    the tests, behind it."""
    folder = built / "venv"
    venv.create(folder, with_pip=False)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    wheel = next(built.glob("*.whl"))
    install = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "-q", "--no-deps"]
    command = [*install, "--no-index", str(wheel)]
    subprocess.run(command, check=True, capture_output=True)
    (site / "behind.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin" / "python"


def run(python: Path, script: str, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([python, "-c", script], cwd=cwd, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_build
def test_wheel_has_both_packages_and_nothing_else(built: Path) -> None:
    names = zipfile.ZipFile(next(built.glob("*.whl"))).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"nvfp4_prep", "nvfp4_prep_kernels", f"nvfp4_prep-{nvfp4_prep.__version__}.dist-info"}
    for package in ("nvfp4_prep", "nvfp4_prep_kernels"):
        assert f"{package}/py.typed" in names
    modules = {
        path.relative_to(root).as_posix()
        for root in (ROOT / "converter", ROOT / "kernels")
        for path in root.rglob("*.py")
    }
    assert {name for name in names if name.endswith(".py")} == modules
    pages = {path.name for path in (ROOT / "converter" / "nvfp4_prep" / "report").glob("*.j2")}
    assert pages and {f"nvfp4_prep/report/{name}" for name in pages} <= {*names}
    assert any(name.endswith("licenses/LICENSE") for name in names)


@needs_build
def test_metadata(built: Path) -> None:
    wheel = zipfile.ZipFile(next(built.glob("*.whl")))
    folder = f"nvfp4_prep-{nvfp4_prep.__version__}.dist-info"
    metadata = HeaderParser().parsestr(wheel.read(f"{folder}/METADATA").decode())
    assert metadata["Version"] == nvfp4_prep.__version__
    assert "CuteDSL and TRTLLM-gen" in metadata["Summary"]
    assert metadata["License-Expression"] == "Apache-2.0"
    needed = {line.split(">")[0] for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line}
    assert needed == {"click", "flashinfer-python", "huggingface-hub", "safetensors", "torch", "tqdm"}
    assert set(metadata.get_all("Provides-Extra", [])) >= {"dev", "ray", "sglang", "vllm"}
    points = wheel.read(f"{folder}/entry_points.txt").decode()
    assert "nvfp4-prep = nvfp4_prep.cli:main" in points
    assert "[vllm.general_plugins]" in points
    assert "[sglang.srt.plugins]" in points


@needs_build
def test_sdist_is_complete(built: Path) -> None:
    """Tests, documentation and the way to run them."""
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    for name in (
        "Makefile",
        ".ci/run",
        "docs/layout.md",
        "tests/kernels/test_layout.py",
        "examples/demo.py",
        "examples/notebook.ipynb",
        "docs/site/zensical.toml",
        "tests/data/prepared/0.1.0/nvfp4_prep.json",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
    ):
        assert name in names


@needs_build
def test_installed_wheel_works_outside_the_tree(python: Path, tmp_path: Path) -> None:
    script = """
import sys
import nvfp4_prep, nvfp4_prep_kernels
assert "venv" in nvfp4_prep.__file__ and "venv" in nvfp4_prep_kernels.__file__, nvfp4_prep.__file__
nvfp4_prep.write_sample("source", nvfp4_prep.SampleModel(layers=2, experts=2))
nvfp4_prep.convert("source", "out")
print(nvfp4_prep.verify("out", source="source").ok, nvfp4_prep.__version__)
"""
    assert run(python, script, tmp_path).split() == ["True", nvfp4_prep.__version__]


@needs_build
def test_commands_of_an_installed_wheel(python: Path, tmp_path: Path) -> None:
    """The program that pip puts beside the interpreter: sample, convert with its smoke test and report, verify."""
    program = python.parent / "nvfp4-prep"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for words in (
        ["--version"],
        ["sample", "source", "--layers", "2", "--experts", "2"],
        ["convert", "source", "out", "--quiet"],
        ["verify", "out", "--source", "source", "--smoke", "--report", "page.html"],
    ):
        done = subprocess.run(
            [program, *words], cwd=tmp_path, capture_output=True, text=True, env=environment, check=False
        )
        assert done.returncode == 0, done.stderr
        if words == ["--version"]:
            assert nvfp4_prep.__version__ in done.stdout
    assert "</html>" in (tmp_path / "page.html").read_text()  # the wheel has the page's template


@needs_build
def test_import_needs_nothing_that_is_optional(python: Path, tmp_path: Path) -> None:
    """All modules import without FlashInfer, vLLM, SGLang, Triton and Ray; the package itself even without torch."""
    script = """
import importlib, pkgutil, sys
class Forbid:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in FORBIDDEN:
            raise ModuleNotFoundError(name)
FORBIDDEN = {"torch", "flashinfer", "vllm", "sglang", "triton", "ray", "huggingface_hub", "safetensors"}
sys.meta_path.insert(0, Forbid())
import nvfp4_prep, nvfp4_prep.cli
assert nvfp4_prep.__version__ and "convert" in dir(nvfp4_prep)
FORBIDDEN -= {"torch", "huggingface_hub", "safetensors"}
for package in (nvfp4_prep, importlib.import_module("nvfp4_prep_kernels")):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if module.name.startswith(("nvfp4_prep.vllm.", "nvfp4_prep.sglang.")) or "triton" in module.name:
            continue
        importlib.import_module(module.name)
print("imported")
"""
    assert run(python, script, tmp_path).strip() == "imported"


def test_version_comes_from_one_place() -> None:
    tree = ast.parse((ROOT / "converter" / "nvfp4_prep" / "_version.py").read_text())
    assigned = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__version__"
    ]
    assert assigned == [nvfp4_prep.__version__]
    head = next(line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## "))
    assert head.split()[1] == nvfp4_prep.__version__


def test_the_cpu_recipe_names_what_is_required_and_numpy() -> None:
    """FlashInfer is left out there, and with it goes numpy, without which torch warns in every command."""
    required = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    wanted = {line.split(">")[0] for line in required} - {"torch", "flashinfer-python"} | {"numpy"}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (recipe,) = re.findall(r"^pip install torch .*\npip install ([^#\n]*)", readme, re.MULTILINE)
    assert {*recipe.split()} == wanted
