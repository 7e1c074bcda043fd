"""A stranger's card and names: bounded front matter, and a body in which a name makes no Markdown and no HTML."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from nvfp4_prep.checkpoint.filenames import MANIFEST
from nvfp4_prep.prepared.front_matter import MAX_DEPTH, MAX_ITEMS, MAX_NBYTES, read_front_matter
from nvfp4_prep.prepared.manifest import Manifest
from nvfp4_prep.prepared.markdown import MAX_CHARACTERS, code_span, plain_text
from nvfp4_prep.prepared.model_card import front_matter, make_model_card

BOMB = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 11)
)
HOSTILE = "x\n# Injected\n\n<script>alert(1)</script> [a](javascript:1) ![i](http://e/) | `c` *b* _e_ &amp; ~~s~~"


@pytest.fixture
def manifest(sample_prepared: Path) -> Manifest:
    return Manifest.from_bytes((sample_prepared / MANIFEST).read_bytes())


@pytest.mark.parametrize(
    ("text", "note"),
    [
        (BOMB + "tags: *a10\n", "anchors or aliases"),
        ("tags: *nowhere\n", "anchors or aliases"),
        ("tags: &one [x]\n", "anchors or aliases"),
        ("x: " + "[" * 60_000, "nested deeper"),
        ("x:\n  " + "- " * 60_000, "nested deeper"),
        ("x: " + "[" * MAX_DEPTH + "]" * MAX_DEPTH, "nested deeper"),
        ("x: " + "{" * 60_000, "nested deeper"),
        ("x:\n" + "- y\n" * (MAX_ITEMS + 1), "more than 1000 items"),
        ("x: " + "y" * MAX_NBYTES, "larger than"),
        ("x: [" + "1," * (10 << 20) + "]", "larger than"),
    ],
    ids=["bomb", "alias", "anchor", "flow", "block", "braces", "deep", "items", "scalar", "20 MB"],
)
def test_front_matter_beyond_a_bound_is_not_read(manifest: Manifest, text: str, note: str) -> None:
    begin = time.monotonic()
    card = f"---\nlicense: mit\n{text}\n---\n# x\n".encode()
    found = read_front_matter(card)
    assert found.values == {} and found.note is not None and note in found.note
    made = make_model_card(replace(manifest, texts={**manifest.texts, "README.md": card}))
    assert b"The front matter of the source's card was not taken over: it " in made
    assert time.monotonic() - begin < 20


def test_front_matter_at_the_bounds_is_read() -> None:
    deep = "[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1)
    text = f"license: mit\nx: {deep}\ntags:\n" + "- y\n" * MAX_ITEMS + "z: " + "y" * 50_000
    found = read_front_matter(f"---\n{text}\n---\n".encode())
    assert found.note is None and list(found.values) == ["license", "x", "tags", "z"]


def test_a_lack_of_memory_does_not_drop_the_front_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The card would be another one than on a machine with more memory."""

    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("yaml.SafeLoader.compose_node", fail)
    with pytest.raises(MemoryError):
        read_front_matter(b"---\nlicense: mit\n---\n")


def test_a_large_body_is_no_large_front_matter() -> None:
    assert read_front_matter(b"---\nlicense: mit\n---\n" + b"# x\n" * MAX_NBYTES).values == {"license": "mit"}
    assert read_front_matter(b"# x\n" * MAX_NBYTES).note is None


@pytest.mark.parametrize(
    "value", ["!!set {a, b}", "!!binary eHg=", ".nan", ".inf", "!!omap [a: 1]", "{!!binary eHg=: 1}"]
)
def test_values_that_are_no_metadata_are_left_out(value: str) -> None:
    assert read_front_matter(f"---\nlicense: mit\nx: {value}\n---\n".encode()).values == {"license": "mit"}


def test_tags_and_base_models_are_names(manifest: Manifest) -> None:
    card = b"---\ntags: [a, 1, [b], {c: d}, null]\nbase_model: [[x]]\n---\n"
    found = front_matter(replace(manifest, texts={"README.md": card}))
    assert found["tags"][:2] == ["a", "1"] and "[" not in "".join(found["tags"]) and "base_model" not in found


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("nvidia/Kimi-K2.5_NVFP4", "nvidia/Kimi-K2.5_NVFP4"),
        ("a\nb", r"a\\nb"),
        ("<b>&", "&lt;b&gt;&amp;"),
        ("[x](y)|`c`", r"\[x\](y)\|\`c\`"),
        ("# x", r"\# x"),
        ("- x", r"\- x"),
        ("1. x", r"1\. x"),
        ("_x_ a_b", r"\_x\_ a_b"),
        ("\x1b\u202e", r"\\x1b\\u202e"),
        ("x" * 5000, "x" * MAX_CHARACTERS + "…"),
    ],
)
def test_plain_text(text: str, shown: str) -> None:
    assert plain_text(text) == shown


@pytest.mark.parametrize(
    ("text", "shown"), [("a.b", "`a.b`"), ("a`b", "`` a`b ``"), ("a|b\nc", r"`a\|b\nc`"), ("", "`  `")]
)
def test_code_span(text: str, shown: str) -> None:
    assert code_span(text) == shown


@pytest.mark.parametrize("field", ["source", "hub source", "revision", "tool_version", "passed", "verified"])
def test_a_hostile_name_makes_no_structure(manifest: Manifest, field: str) -> None:
    changes: dict[str, dict[str, object]] = {
        "source": {"source": HOSTILE},
        "hub source": {"source": "a/b](javascript:1)\n# Injected", "revision": "0" * 40},
        "revision": {"revision": HOSTILE},
        "tool_version": {"tool_version": HOSTILE},
        "passed": {"passed": {HOSTILE: HOSTILE}},
        "verified": {"verified": ({"check": HOSTILE, "result": HOSTILE, HOSTILE: HOSTILE},) * 1000},
    }
    plain, card = make_model_card(manifest).decode(), make_model_card(replace(manifest, **changes[field])).decode()
    body = card.split("---\n", 2)[2]
    assert "Injected" in body
    assert [line for line in body.splitlines() if re.match(r"\s*#.*Injected", line)] in ([], [body.splitlines()[1]])
    assert sum(line.startswith("#") for line in body.splitlines()) == plain.split("---\n", 2)[2].count("\n#")
    outside_code = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", body.replace("\\`", ""))
    assert "<script" not in outside_code and re.search(r"(?<!\\)\]\(javascript", outside_code) is None
    cells = [re.sub(r"\\\|", "", line).count("|") for line in body.splitlines() if line.startswith("|")]
    assert set(cells) == {3}
    assert len(body) < 200_000
    ModelCard(card)
    assert yaml.safe_load(card.split("---\n")[1])["library_name"] == "vllm"
