"""Parts of a conversion whose source is on the Hub: each downloads what it needs, and the joined bytes are the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from nvfp4_prep import convert, convert_part, join_parts
from nvfp4_prep.hub import open_source
from nvfp4_prep.output.layer_selection import LayerSelection, part_folder
from support.checkpoint_files import file_digests
from support.hub_server import LoopbackHub
from support.hub_support import make_checkpoint

SOURCE = "alice/small-moe"
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the client's own


@pytest.mark.slow
def test_parts_from_the_hub(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.store.publish(SOURCE, make_checkpoint())
    whole, out = tmp_path / "whole", tmp_path / "out"
    convert(open_source(SOURCE, target=whole), whole)
    for share in ("1/2", "2/2"):
        folder = part_folder(out, LayerSelection.parse(share))
        part = convert_part(open_source(SOURCE, target=folder), out, share)
        assert part.layers
        assert not [path for path in folder.rglob("*.safetensors") if "source" in path.parts[-2]]
    join_parts(open_source(SOURCE, target=out), out)
    assert file_digests(out) == file_digests(whole)
