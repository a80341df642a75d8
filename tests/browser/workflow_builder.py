"""What a shipped workflow is written with: groups of columns of nodes, which build_workflows.py lays out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

PICTURES, LEARN, PAINT, LOOK = "#3f789e", "#b58b2a", "#3f8f5f", "#8a5f9e"


class Link(NamedTuple):
    """An output of a node, to be connected to an input."""

    node: int
    output: str


@dataclass
class Node:
    """One node of a workflow: its place in the list, and what the frontend needs to make it."""

    index: int
    spec: dict[str, Any]

    def __getitem__(self, output: str) -> Link:
        return Link(self.index, output)


@dataclass
class Workflow:
    """Groups of columns of nodes, in the order in which they are added.

    thumbnail: rows of the picture beside the workflow, each title with the title of the node that shows the row's
    pictures, or of several; without any, the titles of the groups are shown.
    """

    thumbnail: dict[str, str | tuple[str, ...]] = field(default_factory=dict)
    nodes: list[dict[str, Any]] = field(default_factory=list)
    groups: list[dict[str, Any]] = field(default_factory=list)

    @contextmanager
    def group(self, title: str, color: str) -> Iterator[None]:
        """The nodes added inside lie in one frame."""
        self.groups.append({"title": title, "color": color, "columns": [[]]})
        yield

    def column(self) -> None:
        """Go on one column further right."""
        self.groups[-1]["columns"].append([])

    def node(
        self,
        type: str,
        title: str = "",
        node_size: tuple[int, int] | None = None,
        properties: dict[str, Any] | None = None,
        room: int = 0,
        **inputs: Any,
    ) -> Node:
        """Add a node under the last one. inputs: by name, a Link or the value of a widget.

        room: pixels to leave free below it, for the pictures it will show.
        """
        inputs = {name.replace("__", "."): value for name, value in inputs.items()}
        links = {name: value for name, value in inputs.items() if isinstance(value, Link)}
        widgets = {name: value for name, value in inputs.items() if not isinstance(value, Link)}
        node = Node(len(self.nodes), {"type": type, "title": title, "size": node_size, "room": room})
        node.spec |= {"properties": properties or {}, "links": links, "widgets": widgets}
        self.nodes.append(node.spec)
        self.groups[-1]["columns"][-1].append(node.index)
        return node

    def note(self, text: str, height: int) -> None:
        """Add a note in Markdown."""
        self.nodes.append(
            {
                "type": "MarkdownNote",
                "title": "What to change",
                "size": (340, height),
                "room": 0,
                "properties": {},
                "links": {},
                "widgets": {"": text},
            }
        )
        self.groups[-1]["columns"][-1].append(len(self.nodes) - 1)
