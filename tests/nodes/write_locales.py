"""Writes locales/en/nodeDefs.json from the nodes' schemas: `make locales`. Translations are written by hand.

tests/nodes/test_schema.py compares the file with `english`, and the keys of every translation with it.
"""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

PACK = Path(__file__).resolve().parents[2]
ENGLISH = PACK / "locales" / "en" / "nodeDefs.json"


def load_nodes() -> list[type]:
    """The node classes, as ComfyUI gets them. ComfyUI must be importable."""
    import concept_atelier

    async def collect() -> list[type]:
        return await (await concept_atelier.comfy_entrypoint()).get_node_list()

    return asyncio.run(collect())


def escaped(text: str | None) -> str | None:
    """`text` for vue-i18n, which the frontend translates with: it takes { } @ $ | for syntax, and fails on "{}"."""
    return text and re.sub(r"[{}@$|]", lambda special: f"{{'{special[0]}'}}", text)


def english(nodes: list[type]) -> dict[str, Any]:
    """The content of nodeDefs.json: every text of the schemas, by node, input and output."""
    definitions = {}
    for schema in (node.GET_SCHEMA() for node in nodes):
        inputs = {given.id: (given.display_name or given.id, given.tooltip) for given in schema.inputs}
        outputs = {str(i): (output.display_name, output.tooltip) for i, output in enumerate(schema.outputs)}
        definitions[schema.node_id] = {
            "display_name": escaped(schema.display_name),
            "description": escaped(schema.description),
            "inputs": {key: {"name": escaped(name), "tooltip": escaped(tip)} for key, (name, tip) in inputs.items()},
            "outputs": {key: {"name": escaped(name), "tooltip": escaped(tip)} for key, (name, tip) in outputs.items()},
        }
    return definitions


def main() -> None:
    import sys

    sys.path.insert(0, str(PACK / "tests"))
    import conftest  # noqa: F401  finds ComfyUI and makes it importable

    ENGLISH.parent.mkdir(parents=True, exist_ok=True)
    ENGLISH.write_text(json.dumps(english(load_nodes()), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
