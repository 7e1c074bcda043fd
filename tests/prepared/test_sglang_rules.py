"""SGLang's rules about sizes: the model card and the plugin (tests/sglang) go by the same ones."""

from __future__ import annotations

import pytest

from nvfp4_prep.prepared.sglang_rules import takes_hidden, takes_padding, takes_share
from nvfp4_prep_kernels import MoeDims, MoeLayout


@pytest.mark.parametrize(
    ("gated", "hidden", "intermediate", "with_trtllm", "else_"),
    [
        (True, 384, 128, True, True),  # H is padded to 512 and left out again
        (True, 192, 128, False, False),
        (True, 256, 96, True, False),  # I is padded to 128
        (False, 256, 96, True, True),
    ],
)
def test_padding(gated: bool, hidden: int, intermediate: int, with_trtllm: bool, else_: bool) -> None:
    dims = MoeDims(2, intermediate, hidden)
    layout = MoeLayout.named("trtllm", gated=gated)
    assert takes_padding(layout, dims, trtllm=True) is with_trtllm
    assert takes_padding(layout, dims, trtllm=False) is else_


def test_sizes() -> None:
    assert takes_hidden(384) and not takes_hidden(192)
    assert takes_share(256, 2) and not takes_share(256, 4)
