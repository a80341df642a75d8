"""What ComfyUI serves of the pack: its nodes, workflows, help pages, translations and scripts."""

import json

import pytest
from comfy_server import PACK, PACK_NAME

WORKFLOWS = sorted(path.stem for path in (PACK / "workflows").glob("*.json"))
PAGES = sorted(path.stem for path in (PACK / "web" / "docs").glob("*.md"))


def test_the_pack_loads_without_a_warning(server):
    lines = [line for line in server.log.read_text().splitlines() if PACK_NAME in line]
    assert lines
    assert not [line for line in lines if "IMPORT FAILED" in line or "WARNING" in line or "ERROR" in line]


def test_every_node_with_a_help_page_is_offered_with_tooltips(server):
    offered = {name: info for name, info in server.get("/object_info").items() if name.startswith("Atelier")}
    assert sorted(offered) == PAGES
    for name, info in offered.items():
        assert info["python_module"] == f"custom_nodes.{PACK_NAME}"
        assert all(info["output_tooltips"]), name
        for kind in ("required", "optional"):
            for key, (_, options) in info["input"].get(kind, {}).items():
                assert options.get("tooltip"), f"{name}.{key}"


def test_workflows_are_offered_as_templates_with_pictures(server):
    assert sorted(server.get("/workflow_templates")[PACK_NAME]) == WORKFLOWS
    for name in WORKFLOWS:
        status, text = server.fetch(f"/api/workflow_templates/{PACK_NAME}/{name}.json")
        assert status == 200
        assert json.loads(text)["version"] == 0.4
        jpeg = (PACK / "workflows" / f"{name}.jpg").read_bytes()
        assert jpeg[:2] == b"\xff\xd8"


@pytest.mark.parametrize("page", PAGES)
def test_help_pages_are_served(server, page):
    assert server.fetch(f"/extensions/{PACK_NAME}/docs/{page}.md") == (
        200,
        (PACK / "web" / "docs" / f"{page}.md").read_text(encoding="utf-8"),
    )


def test_translations_are_served(server):
    served = server.get("/i18n")
    for folder in (PACK / "locales").iterdir():
        assert served[folder.name]["nodeDefs"]["AtelierTrain"]["display_name"], folder.name


def test_scripts_are_served(server):
    scripts = [f"/extensions/{PACK_NAME}/js/{path.name}" for path in (PACK / "web" / "js").glob("*.js")]
    assert scripts
    assert set(scripts) <= set(server.get("/extensions"))


def test_workflows_use_core_nodes_and_ours_alone(server):
    known = server.get("/object_info")
    for name in WORKFLOWS:
        workflow = json.loads((PACK / "workflows" / f"{name}.json").read_text(encoding="utf-8"))
        for entry in workflow["nodes"]:
            if entry["type"] in ("MarkdownNote", "Note"):
                continue
            assert entry["type"] in known, f"{name}: {entry['type']}"
            module = known[entry["type"]]["python_module"]
            assert module == f"custom_nodes.{PACK_NAME}" or not module.startswith("custom_nodes."), entry["type"]
            if entry["type"].startswith("Atelier"):
                assert entry["properties"]["cnr_id"] == PACK_NAME
