"""Progress on terminals, in logs and in loads: what is shown, escaped, and that a failing stream ends nothing."""

from __future__ import annotations

import io
import sys
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from tqdm import tqdm

from nvfp4_prep._util import progress as module
from nvfp4_prep._util.progress import BarProgress, LogProgress, NoProgress, Progress, RateLog, choose_progress
from nvfp4_prep._util.text import format_duration
from nvfp4_prep.pipeline.jobs import FileJob, progress_labels

HOSTILE = "x\x1b[2J\u202e\r\nerror: forged"


class FullDisk(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(progress: Progress) -> None:
    progress.start(HOSTILE, 100, 10)
    progress.advance(40, HOSTILE)
    progress.advance(50, HOSTILE)
    progress.close()
    progress.close()


@pytest.mark.parametrize("make", [BarProgress, lambda stream: LogProgress(stream, 0.0)])
def test_titles_and_labels_are_escaped(make: Callable[[io.StringIO], Progress]) -> None:
    stream = io.StringIO()
    run(make(stream))
    text = stream.getvalue()
    assert "x\\x1b[2J" in text
    assert "\x1b[2J" not in text and "\u202e" not in text
    assert not any(line.startswith("error: forged") for line in text.replace("\r", "\n").splitlines())


@pytest.mark.parametrize("make", [BarProgress, lambda stream: LogProgress(stream, 0.0)])
def test_a_stream_that_fails_ends_nothing(make: Callable[[io.StringIO], Progress]) -> None:
    run(make(FullDisk()))


@pytest.mark.parametrize(
    ("quiet", "stream", "kind"),
    [(True, Terminal(), NoProgress), (False, Terminal(), BarProgress), (False, io.StringIO(), LogProgress)],
)
def test_choice_fits_the_stream(
    monkeypatch: pytest.MonkeyPatch, quiet: bool, stream: io.StringIO, kind: type[Progress]
) -> None:
    monkeypatch.setattr(sys, "stderr", stream)
    assert type(choose_progress(quiet=quiet)) is kind


def test_a_notebook_has_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Shell:
        config = {"IPKernelApp": {}}  # noqa: RUF012

    class IPython:
        get_ipython = staticmethod(Shell)

    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setitem(sys.modules, "IPython", IPython)
    assert isinstance(choose_progress(quiet=False), BarProgress)


def test_rate_of_a_log_leaves_out_what_was_done_before(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    progress = LogProgress(stream, 30.0)
    progress.start("convert", 40_000_000_000, 10_000_000_000)
    now[0] += 10
    progress.advance(5_000_000_000, "early")
    now[0] += 20
    progress.advance(10_000_000_000, "layer 2")
    line = stream.getvalue().splitlines()[-1]
    assert "early" not in stream.getvalue()
    assert line == "convert: 25.00 GB of 40.00 GB (62 %), 0.50 GB/s, 0:30 left, layer 2"


def test_rate_log_counts_from_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    log = RateLog(said.append, every_s=0.0)
    threads = [threading.Thread(target=lambda: [log(10**8) for _ in range(10)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(said) == 40
    assert max(said, key=lambda text: float(text.split()[0])).startswith("4.0 GB of prepared experts loaded, ")


def test_a_stream_that_fails_leaves_no_lock_behind() -> None:
    """tqdm's lock belongs to the whole process: bars of other threads must still start."""

    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError("terminal is gone")

        def flush(self) -> None:
            raise OSError("terminal is gone")

    progress = BarProgress(Closed())
    progress.start("convert", 100)
    for _ in range(3):
        progress.advance(1, "file")
        time.sleep(0.11)
    progress.close()
    started = threading.Event()

    def other_bar() -> None:
        with tqdm(total=1, file=io.StringIO()) as bar:
            bar.update(1)
        started.set()

    threading.Thread(target=other_bar, daemon=True).start()
    assert started.wait(5)


def test_a_bar_has_room_for_the_layer_at_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tqdm.std._screen_shape_wrapper", lambda: lambda stream: (80, 24))
    stream = Terminal()
    progress = BarProgress(stream)
    progress.start("convert", 600_000_000_000)
    for label in ("layer 60/60", "model-00006-of-00006.safetensors"):
        progress.advance(1_000_000_000, label)
        progress._bar.refresh()
    progress.close()
    lines = [line.strip() for line in stream.getvalue().split("\r") if line.strip()]
    assert all(len(line) <= 80 for line in lines), lines
    assert any("layer 60/60]" in line for line in lines), lines
    assert any("model-0…" in line and line.endswith("safetensors]") for line in lines), lines


def test_experts_of_layers_are_counted_and_other_files_named() -> None:
    names = ["experts-layer-00007.safetensors", "model-00001-of-00001.safetensors", "experts-layer-00003.safetensors"]
    jobs = [FileJob(name, 1, b"", lambda: ()) for name in names]
    assert list(progress_labels(jobs).values()) == ["layer 2/2", "model-00001-of-00001.safetensors", "layer 1/2"]


@pytest.mark.parametrize(("notebook", "kind"), [(True, BarProgress), (False, NoProgress)])
def test_python_shows_a_bar_by_default_in_a_notebook_alone(
    monkeypatch: pytest.MonkeyPatch, notebook: bool, kind: type[Progress]
) -> None:
    monkeypatch.setattr(module, "_in_notebook", lambda: notebook)
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert isinstance(module.default_progress(), kind)


@pytest.mark.parametrize(
    "stand_in",
    [
        SimpleNamespace(),
        SimpleNamespace(get_ipython=object),
        SimpleNamespace(get_ipython=lambda: SimpleNamespace(config=7)),
    ],
    ids=["empty", "no config", "another config"],
)
def test_a_stand_in_for_ipython_is_not_a_notebook(stand_in: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages' tests put empty modules there; a conversion must not fail for want of a bar."""
    monkeypatch.setitem(sys.modules, "IPython", stand_in)  # type: ignore[arg-type]
    assert isinstance(module.default_progress(), NoProgress)


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.04, "0.0 s"), (1.26, "1.3 s"), (9.96, "0:10"), (83.4, "1:23"), (3723.0, "1:02:03")]
)
def test_durations_that_are_short_keep_their_figures(seconds: float, shown: str) -> None:
    assert format_duration(seconds) == shown
