"""The fixture of all Hub tests: a loopback Hub, and the real client of this process pointed at it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest

from support.hub_server import LoopbackHub, loopback_hub


def pytest_report_header() -> str:
    """Which client was tested."""
    return f"huggingface_hub {version('huggingface_hub')}"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """A running Hub; client and cache of this process use it, with a valid token, pieces of 64 KiB and short waits."""
    from huggingface_hub import close_session, constants

    with loopback_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf-cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 16)
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 2)
        monkeypatch.setenv("HF_TOKEN", "hf_valid")
        quick = SimpleNamespace(
            sleep=lambda seconds: time.sleep(min(seconds, 0.01)), monotonic=time.monotonic, time=time.time
        )
        monkeypatch.setattr("huggingface_hub.file_download.time", quick)
        monkeypatch.setattr("huggingface_hub.utils._http.time", quick)
        yield hub
        close_session()
    assert hub.errors == [], "the loopback Hub itself failed"
    assert hub.leaked_tokens == [], "the token travelled to the storage host"
