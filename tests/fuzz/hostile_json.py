"""Random damage to JSON documents: values of every type, names that lead elsewhere, and text that is hardly JSON."""

from __future__ import annotations

import copy
import json
import math
from random import Random
from typing import Any


class Raw(str):
    """Text that goes into the document as it stands, without quotes."""


VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 2**31, 2**53 + 1, 2**63, 2**64, -(2**63), 10**30, 0.5, -0.0, 1e308, math.nan,
    math.inf, -math.inf, "", " ", "x", "0", "-1", "NVFP4", "modelopt", "x" * 5000, "\x1b]52;c;aGk=\x07", "\u202e",
    "a\nb", "\x00", "\ud800", "é" * 70, [], {}, [[]], [{}], [None], [1, 2], ["x"], {"x": 1}, {"": ""}, {"x": {}},
    [0] * 3000, Raw("1e999"), Raw("9" * 5000), Raw("-"), Raw("1" * 400 + ".0"), Raw('"\\udfff"'), Raw('{"a":1,"a":2}'),
    Raw("[" * 90 + "]" * 90), Raw("[" * 190 + "]" * 190), Raw("[" * 1200 + "]" * 1200),
    Raw('{"a":' * 3000 + "0" + "}" * 3000), Raw("[" * 200_000), Raw("[" + "[]," * 40_000 + "[]]"),
)  # fmt: skip
"""What any value may be replaced by."""
NAMES = (
    "../neighbour/config.json", "../../neighbour/new", "{case}/neighbour/model.safetensors", "{case}/elsewhere/new",
    "/dev/zero", "/dev/stdin", "/proc/self/mem", "..", ".", "", "/", "a/../../neighbour/x", "a/b", "a//b", "a\\b",
    ".nvfp4_prep/journal.jsonl", ".nvfp4_prep", "config.json", "nvfp4_prep.json", "README.md",
    "model.safetensors.index.json", "a\x00b", "\x1b[31mred", "a\nb", "\ud800", "x" * 300, "~/x", "modeling_x.py",
    "tokenizer.json",    "CON", "-rf", "é",
    "model.layers.1.mlp.experts.0.gate_proj.weight", "model.layers.999999999999.mlp.experts.0.gate_proj.weight",
)  # fmt: skip
"""What names of files and tensors may be replaced by; ``{case}`` is the folder of the case."""


def _node(chance: Random, document: Any) -> tuple[Any, Any] | None:
    """Choose a place: a container and a key or number in it. Large lists are no likelier than small objects."""
    container, key = None, None
    while isinstance(document, (dict, list)) and document:
        if container is not None and chance.random() < 0.25:
            break
        container = document
        key = chance.choice(list(document)) if isinstance(document, dict) else chance.randrange(len(document))
        document = container[key]
    return None if container is None else (container, key)


def _name(chance: Random, case: str) -> str:
    return chance.choice(NAMES).replace("{case}", case)


def _near(chance: Random, value: Any) -> Any:
    """A value that is nearly the right one."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return chance.choice((value + 1, value - 1, value * 2, -value, float(value), str(value), value + 2**32))
    if isinstance(value, float):
        return chance.choice((-value, value * 1e30, math.nan, str(value)))
    if isinstance(value, str) and value:
        cut = chance.randrange(len(value))
        return chance.choice((value[:cut], value + "x", value.upper(), value[:cut] + "\x1b" + value[cut:], [value]))
    if isinstance(value, list):
        return chance.choice((value * 2, value[1:], value[::-1], value[:1], dict(enumerate(map(str, value)))))
    return [value]


def _edit(chance: Random, document: Any, case: str) -> None:
    place = _node(chance, document)
    if place is None:
        return
    container, key = place
    kind = chance.randrange(7)
    if kind <= 1:
        container[key] = chance.choice(VALUES)
    elif kind == 2:
        container[key] = _near(chance, container[key])
    elif kind == 3:
        container[key] = _name(chance, case)
    elif kind == 4:
        del container[key]
    elif isinstance(container, dict):
        moved = copy.deepcopy(container[key]) if kind == 5 else container.pop(key)
        container[_name(chance, case)] = moved
    else:
        container.append(copy.deepcopy(container[key]))


def to_bytes(document: Any) -> bytes:
    """Return the document as text, raw values as they stand."""
    raws: list[str] = []

    def hold(value: Any) -> Any:
        if isinstance(value, Raw):
            raws.append(str(value))
            return f"<raw {len(raws) - 1}>"
        if isinstance(value, dict):
            return {str(key): hold(item) for key, item in value.items()}
        return [hold(item) for item in value] if isinstance(value, list) else value

    text = json.dumps(hold(document), indent=1)
    for number, raw in enumerate(raws):
        text = text.replace(f'"<raw {number}>"', raw)
    return text.encode("utf-8", "surrogatepass")


def damaged_json(chance: Random, raw: bytes, case: str) -> bytes:
    """Return a JSON document with one to three random edits."""
    document = json.loads(raw)
    if chance.random() < 0.04:
        return to_bytes(chance.choice(VALUES))
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        _edit(chance, document, case)
    return to_bytes(document)
