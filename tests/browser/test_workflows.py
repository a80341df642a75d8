"""The shipped workflows as an artist meets them: opened from the template browser, run, watched, stopped."""

import json

import pytest

pytest.importorskip("playwright", reason="The Python package playwright is not installed: make test installs it")
import prompts
from comfy_server import PACK, PACK_NAME
from frontend import CHROMIUM

if CHROMIUM is None:
    pytest.skip("No chromium was found: install it (Debian: apt-get install chromium)", allow_module_level=True)

WORKFLOWS = sorted(path.stem for path in (PACK / "workflows").glob("*.json"))
PANEL = ".concept-atelier-panel"
DRAWINGS = ("classic", "Nodes 2.0")
TRAINING = ("AtelierTrain", "AtelierTrainNullText")


def types_of(prompt):
    return {i: node["class_type"] for i, node in prompt.items()}


# Every workflow in one of the two ways of drawing, by turns: both for each would take twenty minutes.
@pytest.mark.parametrize(
    ("page", "name"),
    [(DRAWINGS[number % len(DRAWINGS)], name) for number, name in enumerate(WORKFLOWS)],
    indirect=["page"],
)
def test_opens_runs_and_shows_its_progress(page, usual_errors, tmp_path, name):
    page.open_template(PACK_NAME, name)
    shipped = json.loads((PACK / "workflows" / f"{name}.json").read_text(encoding="utf-8"))
    assert sorted(page.node_types()) == sorted(node["type"] for node in shipped["nodes"])
    assert page.unknown_types() == []
    assert page.prompt() == prompts.shipped(name)
    page.screenshot(str(tmp_path / f"{name}_opened.png"))

    page.set_widgets(prompts.SMALL)
    assert page.prompt() == prompts.small(prompts.shipped(name))
    # Another one each time: a run that is done, by another workflow even, would return at once.
    page.set_widgets({kind: {"seed": 1000 * (1 + WORKFLOWS.index(name))} for kind in TRAINING})
    page.listen()
    page.queue()
    assert page.wait_for_end(900) == "success"
    page.page.wait_for_timeout(500)
    page.screenshot(str(tmp_path / f"{name}_run.png"))
    trained = {i for i, kind in types_of(prompts.shipped(name)).items() if kind in TRAINING}
    for kind in ("concept-atelier.train", "progress", "b_preview_with_metadata"):
        assert trained <= {str(event["node"]) for event in page.events(kind)}, kind
    panels = page.page.locator(PANEL)
    assert panels.count() == len(trained)
    for text in panels.all_inner_texts():
        assert "step 6 / 6" in text
    for button in page.page.get_by_role("button", name="Stop and keep").all():
        assert button.is_disabled()
    assert [error for error in page.errors if error not in usual_errors] == []


@pytest.mark.parametrize("page", DRAWINGS, indirect=True)
def test_stop_and_keep_ends_the_training_and_goes_on(page):
    page.load(json.loads((PACK / "workflows" / "adi_toy.json").read_text(encoding="utf-8")))
    page.set_widgets(prompts.SMALL)
    page.set_widgets({"AtelierTrain": {"steps": 100_000, "sample_every": 0, "seed": 100 + len(page.drawing)}})
    page.listen()
    page.queue()
    for _ in range(list(types_of(page.prompt()).values()).count("AtelierTrain")):
        button = page.page.locator(f"{PANEL} button:enabled")
        button.wait_for(state="attached", timeout=300_000)  # what is out of view is hidden
        assert page.page.locator(f"{PANEL} button", has_text="Stopping").count() == 0  # of a node that is done
        page.page.route("**/concept-atelier/stop", lambda route: route.abort(), times=1)
        button.dispatch_event("click")  # which ComfyUI does not hear of
        button.wait_for(state="attached", timeout=60_000)
        button.dispatch_event("click")
        page.page.locator(f"{PANEL} button:enabled").wait_for(state="detached", timeout=60_000)
    assert page.wait_for_end(900) == "success"
    assert all(" / 100000" in text for text in page.page.locator(PANEL).all_inner_texts())
