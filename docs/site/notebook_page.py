"""A notebook as a page: its cells in order, with the outputs that it holds."""

from __future__ import annotations

import json
from typing import Any


def notebook_as_markdown(text: str) -> str:
    """Return the Markdown of a notebook (nbformat 4). HTML and SVG outputs stay what they are."""
    parts = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
        else:
            parts.append(f"```python\n{source}\n```")
            parts.extend(_output(output) for output in cell["outputs"])
    return "\n\n".join(parts) + "\n"


def _output(output: dict[str, Any]) -> str:
    if output["output_type"] == "stream":
        return f"```text\n{''.join(output['text']).rstrip()}\n```"
    data = output["data"]
    for kind in ("text/html", "image/svg+xml"):
        if kind in data:
            html = "".join(data[kind]).strip().replace("\n\n", "\n")
            return f'<div class="notebook-output">\n{html}\n</div>'
    return f"```text\n{''.join(data['text/plain']).rstrip()}\n```"
