"""The Docker and Kubernetes examples: their packages are the project's, their command lines the parser's."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from nvfp4_prep import __version__, errors
from nvfp4_prep.cli import cli
from support.command_line import COMMANDS
from support.paths import ROOT

DOCKER = ROOT / "examples" / "docker"
MANIFESTS = sorted((ROOT / "examples" / "kubernetes").glob("*.yaml"))
IMAGE = f"nvfp4-prep:{__version__}"


def parse(arguments: list[str]) -> None:
    """Raise click.UsageError for a command line that ``nvfp4-prep`` would not take."""
    name, *rest = arguments
    COMMANDS[name].make_context(name, rest, parent=click.Context(cli))


def pod(manifest: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = manifest["spec"]["template"]["spec"]
    return spec


def containers(path: Path) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    for manifest in yaml.safe_load_all(path.read_text(encoding="utf-8")):
        spec = pod(manifest)
        for container in [*spec.get("initContainers", []), *spec["containers"]]:
            yield spec, container


def docker_lines() -> list[str]:
    text = (DOCKER / "README.md").read_text(encoding="utf-8")
    return [line.split("  #")[0] for line in re.findall(r"^docker .*$", text, re.MULTILINE)]


def test_the_parser_refuses_what_it_does_not_know() -> None:
    for wrong in (["convert", "a", "b", "--nope"], ["convert", "a"], ["verify", "a", "--threads", "many"]):
        with pytest.raises(click.UsageError):
            parse(wrong)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_command_lines_of_manifests_are_accepted(path: Path) -> None:
    commands = [container["args"] for _, container in containers(path) if container["image"] == IMAGE]
    assert commands
    for arguments in commands:
        assert all(isinstance(argument, str) for argument in arguments)  # Kubernetes refuses numbers
        parse(arguments)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_paths_and_volumes_of_manifests_exist(path: Path) -> None:
    for spec, container in containers(path):
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert set(mounts) <= {volume["name"] for volume in spec["volumes"]}
        for argument in container["args"]:
            if argument.startswith("/"):
                assert any(argument.startswith(f"{place}/") for place in mounts.values()), argument


def test_the_server_reads_what_was_converted() -> None:
    (path,) = (path for path in MANIFESTS if "init" in path.name)
    by_name = {container["name"]: container["args"] for _, container in containers(path)}
    assert by_name["convert"][2] == by_name["verify"][1] == by_name["vllm"][0]


def test_the_job_gives_up_on_errors_that_stay() -> None:
    (path,) = (path for path in MANIFESTS if "job" in path.name)
    (manifest,) = yaml.safe_load_all(path.read_text(encoding="utf-8"))
    (rule,) = manifest["spec"]["podFailurePolicy"]["rules"]
    assert set(rule["onExitCodes"]["values"]) < set(errors.EXIT_CODES) - {0}
    again = {kind.exit_code for kind in (errors.NoSpaceError, errors.BusyError, errors.HubError)}
    assert not again & set(rule["onExitCodes"]["values"])
    assert rule["onExitCodes"]["containerName"] in [container["name"] for container in pod(manifest)["containers"]]
    assert pod(manifest)["restartPolicy"] == "Never"  # podFailurePolicy demands it


def test_the_converter_image_has_the_required_packages() -> None:
    required = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    text = (DOCKER / "converter.Dockerfile").read_text(encoding="utf-8")
    installed = set(re.findall(r'"([a-z-]+>=[0-9.]+)"', text))
    assert installed == {package for package in required if not package.startswith("flashinfer")}
    assert re.search(r"^RUN pip install [^\n]* numpy ", text, re.MULTILINE)  # torch warns without it
    assert text.index("whl/cpu") < text.index("torch>=") < text.index("safetensors")
    assert 'ENTRYPOINT ["nvfp4-prep"]' in text


def test_docker_command_lines() -> None:
    built, run = set(), set()
    for line in docker_lines():
        words = shlex.split(line)
        if words[1] == "build":
            assert (ROOT / words[words.index("-f") + 1]).is_file()
            built.add(words[words.index("-t") + 1])
        elif IMAGE in words:
            run.add(IMAGE)
            parse(words[words.index(IMAGE) + 1 :])
    assert IMAGE in built and IMAGE in run
    used = {container["image"] for path in MANIFESTS for _, container in containers(path)}
    assert used == built


def test_images_get_what_the_build_needs_and_no_environments() -> None:
    """``COPY . /src`` takes everything that .dockerignore does not name; an environment has gigabytes."""
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    ignored = {line.strip("/") for line in lines if line and not line.startswith("#")}
    for line in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines():
        name = line.strip("/")
        assert any(fnmatch(name, pattern.removeprefix("**/")) for pattern in ignored) or name == "*.egg-info", name
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    needed = {"pyproject.toml", "README.md", "LICENSE", *(package.split("/")[0] for package in wheel)}
    assert not [name for name in needed if any(fnmatch(name, pattern) for pattern in ignored)]
