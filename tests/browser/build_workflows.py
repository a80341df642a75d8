"""Writes workflows/*.json and workflows/api/*.json by building them in the real frontend: `make workflows`.

With --thumbnails it writes workflows/*.jpg instead: what each paints on a real server, or its groups by name where it
needs weights that cannot be bundled. Names of workflows after it: those alone. Needs ComfyUI and chromium.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACK = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(PACK / "tests"), str(PACK / "tests" / "server"), str(PACK / "tests" / "browser")]

from comfy_server import PACK_NAME, SD_FOLDERS, SD_MODELS, SD_PICTURE, ComfyServer  # noqa: E402
from conftest import COMFYUI  # noqa: E402
from frontend import Frontend, frontend  # noqa: E402
from PIL import Image, ImageDraw, ImageFont  # noqa: E402
from workflow_builder import Workflow  # noqa: E402
from workflow_sources import WORKFLOWS  # noqa: E402

FOLDER = PACK / "workflows"
GAP = 30
TITLE = 36  # of a node, above its position
FRAME = 50  # of a group, its own title included
PAPER = (24, 26, 28)  # behind thumbnails

MAKE_NODES = """(specs) => {
    const graph = window.app.graph;
    graph.clear();
    const made = specs.map((spec) => {
        const node = window.LiteGraph.createNode(spec.type);
        if (!node) throw new Error(`No node type ${spec.type}`);
        graph.add(node);
        if (spec.title) node.title = spec.title;
        Object.assign(node.properties, spec.properties);
        for (const [name, value] of Object.entries(spec.widgets)) {
            const widget = node.widgets.find((widget) => widget.name === name) ?? (name === '' && node.widgets[0]);
            if (!widget) throw new Error(`${spec.type} has no widget ${name}`);
            widget.value = value;
            widget.callback?.(value);
        }
        // Seeds stay as they are from run to run: a new seed would train anew.
        for (const widget of node.widgets ?? [])
            if (widget.options?.values?.includes?.('randomize')) widget.value = 'fixed';
        return node;
    });
    specs.forEach((spec, index) => {
        for (const [name, [source, output]] of Object.entries(spec.links)) {
            const from = made[source].findOutputSlot(output);
            const to = made[index].findInputSlot(name);
            if (from < 0) throw new Error(`${specs[source].type} has no output ${output}`);
            if (to < 0) throw new Error(`${spec.type} has no input ${name}: ${made[index].inputs.map((i) => i.name)}`);
            made[source].connect(from, made[index], to);
        }
    });
    return made.map((node, index) => {
        const [width, height] = node.computeSize();
        node.setSize(specs[index].size ?? [Math.max(320, width), height]);
        return [node.size[0], node.size[1]];
    });
}"""
PLACE = """([positions, groups]) => {
    const graph = window.app.graph;
    graph.nodes.forEach((node, index) => { node.pos = positions[index]; });
    for (const { title, color, bounding } of groups) {
        const group = new window.LiteGraph.LGraphGroup(title);
        group.color = color;
        [group.pos, group.size] = [bounding.slice(0, 2), bounding.slice(2)];
        graph.add(group);
    }
    return graph.serialize();
}"""


def place(workflow: Workflow, sizes: list[list[float]]) -> tuple[list[list[float]], list[dict[str, Any]]]:
    """Positions of the nodes and frames of the groups: groups and columns from left to right, nodes downwards."""
    positions, groups, left = [[0.0, 0.0] for _ in sizes], [], 0.0
    for group in workflow.groups:
        x, bottom = left + GAP, 0.0
        for column in filter(None, group["columns"]):
            y = FRAME + TITLE
            for index in column:
                positions[index] = [x, y]
                y += sizes[index][1] + workflow.nodes[index]["room"] + TITLE + GAP
            x += max(sizes[index][0] for index in column) + GAP
            bottom = max(bottom, y - TITLE)
        frame = {"title": group["title"], "color": group["color"], "bounding": [left, 0, x - left, bottom]}
        groups.append(frame)
        left = x + 2 * GAP
    return positions, groups


def build(page: Frontend, workflow: Workflow) -> tuple[dict[str, Any], dict[str, Any]]:
    """The UI form and the API form of a workflow."""
    for spec in workflow.nodes:
        if spec["type"].startswith("Atelier"):
            spec["properties"] |= {"cnr_id": PACK_NAME, "ver": version(PACK_NAME)}
    # ComfyUI's own first workflow, which comes late on a busy machine, would take the place of ours.
    page.page.wait_for_function("() => window.app.graph.nodes.length > 0")
    sizes = page.page.evaluate(MAKE_NODES, workflow.nodes)
    saved = page.page.evaluate(PLACE, place(workflow, sizes))
    saved["extra"] = {}  # the view of this browser, and its version
    saved.pop("id", None)  # random
    return saved, page.prompt()


@contextmanager
def running() -> Iterator[ComfyServer]:
    """A server with our pack alone."""
    with tempfile.TemporaryDirectory() as base:
        server = ComfyServer(COMFYUI, Path(base), {PACK_NAME: PACK})
        # What the workflows on Stable Diffusion name must be there to be shown; it is not loaded.
        for file in SD_MODELS:
            path = server.folder / "models" / file
            path.parent.mkdir(exist_ok=True)
            path.touch()
        for folder in SD_FOLDERS:
            (server.folder / "input" / folder).mkdir()
        Image.new("RGB", (64, 64)).save(server.folder / "input" / SD_PICTURE)
        with server:
            yield server


def write(path: Path, data: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_workflows(names: list[str]) -> None:
    """Write UI forms and API forms."""
    with running() as server:
        for name in names:
            # A page of its own: the frontend would give new nodes the widget values of earlier ones with their ids.
            with frontend(server.url) as page:
                saved, prompt = build(page, WORKFLOWS[name]())
            write(FOLDER / f"{name}.json", saved)
            write(FOLDER / "api" / f"{name}.json", prompt)


def pictures_of(server: ComfyServer, images: list[dict[str, str]]) -> list[Image.Image]:
    """The pictures that an output node listed."""
    return [
        Image.open(server.folder / image["type"] / image["subfolder"] / image["filename"]).convert("RGB")
        for image in images
    ]


def collage(rows: dict[str, list[Image.Image]], columns: int = 6, cell: int = 112) -> Image.Image:
    """Rows of small pictures, each under its title."""
    header = 22
    sheet = Image.new("RGB", (columns * cell, len(rows) * (cell + header)), PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for row, (title, pictures) in enumerate(rows.items()):
        top = row * (cell + header)
        draw.text((6, top + 3), title, font=font, fill=(220, 224, 228))
        for column, picture in enumerate(pictures[:columns]):
            small = picture.resize((cell - 4, cell - 4), Image.Resampling.NEAREST)
            sheet.paste(small, (column * cell + 2, top + header))
    return sheet


def write_thumbnails(names: list[str]) -> None:
    """Write the pictures beside workflows."""
    with running() as server:
        for name in names:
            rows = WORKFLOWS[name]().thumbnail
            picture = painted(server, name, rows) if rows else card(name)
            picture.save(FOLDER / f"{name}.jpg", quality=88)


def painted(server: ComfyServer, name: str, rows: dict[str, str | tuple[str, ...]]) -> Image.Image:
    """What the nodes of the saved workflow of these titles show after a run, row by row."""
    titles = {node.get("title"): str(node["id"]) for node in read(f"{name}.json")["nodes"]}
    outcome = server.run(read(f"api/{name}.json"), timeout=3600)
    if outcome.status != "success":
        raise RuntimeError(f"{name}: {outcome.status}: {outcome.error}")

    def shown(nodes: str | tuple[str, ...]) -> list[Image.Image]:
        of_nodes = (outcome.outputs[titles[node]]["images"] for node in ([nodes] if isinstance(nodes, str) else nodes))
        return pictures_of(server, [image for images in of_nodes for image in images])

    return collage({row: shown(nodes) for row, nodes in rows.items()})


def card(name: str, width: int = 640, height: int = 360) -> Image.Image:
    """The groups of the saved workflow in their order and colours, which is what one sees first when it is open."""
    groups = read(f"{name}.json")["groups"]
    sheet = Image.new("RGB", (width, height), PAPER)
    draw, step = ImageDraw.Draw(sheet), (height - GAP) / len(groups)
    font = ImageFont.load_default(min(26, step * 0.42))
    for row, group in enumerate(groups):
        top, bottom = GAP / 2 + row * step, GAP / 2 + (row + 1) * step - 8
        draw.rounded_rectangle((GAP / 2, top, width - GAP / 2, bottom), 10, fill=group["color"])
        draw.text((GAP, (top + bottom) / 2), group["title"], font=font, fill="white", anchor="lm")
    return sheet


def read(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help="of a workflow; without any, all")
    parser.add_argument("--thumbnails", action="store_true", help="write workflows/*.jpg from the saved workflows")
    arguments = parser.parse_args()
    (write_thumbnails if arguments.thumbnails else write_workflows)(arguments.names or list(WORKFLOWS))
