"""ComfyUI's real frontend in a headless chromium, as an artist would use it."""

from __future__ import annotations

import shutil
from contextlib import contextmanager
from typing import Any

from playwright.sync_api import ConsoleMessage, Page, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
READY = "() => window.app?.graph && window.app.extensionManager && window.LiteGraph?.registered_node_types?.KSampler"


class Frontend:
    """One page of the frontend of the ComfyUI at `url`. `errors`: what the console reported as errors, in order."""

    def __init__(self, page: Page, url: str) -> None:
        self.page, self.url, self.errors = page, url, []
        page.on("console", self._on_console)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.set_default_timeout(120_000)  # a busy machine is no error
        page.goto(url)
        page.wait_for_function(READY, timeout=300_000)

    def _on_console(self, message: ConsoleMessage) -> None:
        place = message.location.get("url", "")
        outside = message.text.startswith("Failed to load") and not place.startswith(self.url)  # it asks for news
        if message.type == "error" and not outside:
            self.errors.append(f"{message.text} [{place}]".replace(self.url, ""))

    def draw_nodes_as(self, drawing: str) -> None:
        """Draw nodes on the canvas ("classic") or as elements of the page ("Nodes 2.0")."""
        self.drawing = drawing
        self.page.evaluate(
            "on => window.app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)", drawing == "Nodes 2.0"
        )
        self.page.wait_for_timeout(500)

    def load(self, workflow: dict[str, Any]) -> None:
        """Open a workflow in UI form."""
        self.page.evaluate("workflow => window.app.loadGraphData(workflow)", workflow)

    def open_template(self, pack: str, name: str) -> None:
        """Open a workflow of a pack from the template browser, with two clicks."""
        self.page.evaluate("() => { window.app.extensionManager.command.execute('Comfy.BrowseTemplates'); }")
        # Events, not the mouse: that would wait for animations to end, which on a busy machine they do not.
        self.page.get_by_role("dialog").get_by_text(pack, exact=True).dispatch_event("click")
        self.page.get_by_test_id(f"template-workflow-{name}").dispatch_event("click")
        # The graph that was open before has nodes, too: only the name of the open workflow tells that this one is here.
        self.page.wait_for_function(
            "name => window.app.extensionManager.workflow.activeWorkflow?.path.includes(name) "
            "&& window.app.graph.nodes.some((node) => node.type.startsWith('Atelier')) "
            "&& !document.querySelector('.p-dialog')",
            arg=name,
        )
        self.page.wait_for_timeout(500)

    def set_widgets(self, values: dict[str, dict[str, Any]]) -> None:
        """Set widgets by node type and name, as {"KSampler": {"steps": 3}}; those a node lacks are left out."""
        self.page.evaluate(
            """(values) => {
                for (const node of window.app.graph.nodes)
                    for (const [name, value] of Object.entries(values[node.type] ?? {})) {
                        const widget = node.widgets?.find((widget) => widget.name === name);
                        if (!widget) continue;
                        widget.value = value;
                        widget.callback?.(value);
                    }
            }""",
            values,
        )

    def prompt(self) -> dict[str, Any]:
        """The API form of what is open, without titles."""
        nodes = self.page.evaluate("async () => (await window.app.graphToPrompt()).output")
        return {i: {key: node[key] for key in ("class_type", "inputs")} for i, node in nodes.items()}

    def node_types(self) -> list[str]:
        """The types of the nodes of the graph that is open."""
        return self.page.evaluate("() => window.app.graph.nodes.map(node => node.type)")

    def unknown_types(self) -> list[str]:
        """Those of them that the frontend has no definition of: they are drawn red."""
        known = set(self.page.evaluate("() => Object.keys(window.LiteGraph.registered_node_types)"))
        return [node_type for node_type in self.node_types() if node_type not in known]

    def listen(self) -> None:
        """Start noting the events of the server, for `events`."""
        self.page.evaluate(
            """() => {
                window.heard = [];
                for (const kind of ['execution_success', 'execution_error', 'execution_interrupted', 'progress',
                                    'b_preview_with_metadata', 'concept-atelier.train'])
                    window.app.api.addEventListener(kind, (event) => window.heard.push({
                        kind,
                        node: event.detail?.node ?? event.detail?.nodeId ?? null,
                        text: event.detail?.exception_message ?? '',
                    }));
            }"""
        )

    def events(self, kind: str) -> list[dict[str, Any]]:
        """The events of one kind since `listen`."""
        return self.page.evaluate("kind => window.heard.filter(event => event.kind === kind)", kind)

    def queue(self) -> None:
        """Press Run."""
        self.page.evaluate("() => window.app.queuePrompt(0)")

    def wait_for_end(self, seconds: float) -> str:
        """Wait until the prompt ended; returns "success", "interrupted" or the sentence of the error."""
        ended = "window.heard.find(event => event.kind.startsWith('execution_'))"
        self.page.wait_for_function(f"() => {ended}", timeout=1000 * seconds)
        end = self.page.evaluate(f"() => {ended}")
        return end["text"] if end["kind"] == "execution_error" else end["kind"].removeprefix("execution_")

    def screenshot(self, path: str) -> None:
        """Save what is seen, the whole graph in view."""
        self.page.evaluate(
            """() => {
                window.app.canvas.min_font_size_for_lod = 0; // draw words however small
                window.app.extensionManager.command.execute('Comfy.Canvas.FitView');
            }"""
        )
        self.page.wait_for_timeout(800)
        self.page.screenshot(path=path)


@contextmanager
def frontend(url: str):
    """A Frontend in a browser of its own."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1440, "height": 900})
        yield Frontend(page, url)
        browser.close()
