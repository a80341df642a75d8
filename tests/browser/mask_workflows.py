"""Masks by text, on photos: what a prompt names, found by GroundingDINO and cut out by Segment Anything."""

from __future__ import annotations

from comfy_server import SD_PICTURE
from workflow_builder import LOOK, PICTURES, Workflow
from workflow_parts import files_to_get, load_segmenters, mask_by_text


def mask_subject_sd() -> Workflow:
    """The mask of one thing in a photo: a text, a box, a mask."""
    w = Workflow()
    with w.group("1  A picture, and what to mask in it", PICTURES):
        w.note(
            files_to_get("*Load GroundingDINO* and *Load SAM*")
            + "2. Choose a picture.\n3. Say in *Detect by Text* what to mask: `a dog`.\n4. Press Run.\n\n- "
            "*threshold*: lower when nothing is found.\n- *max_detections*: more than 1 masks several things at once.",
            290,
        )
        picture = w.node("LoadImage", "Your picture", room=240, image=SD_PICTURE)
        w.column()
        segmenters = load_segmenters(w)
    with w.group("2  A box around it, and its mask", LOOK):
        w.note(
            "Each node says what it found and how sure it is. Where the mask takes too much or too little, write "
            "points into *SAM Mask*, one a line as `x, y`:\n\n- *positive_coords*: inside of what to mask.\n- "
            "*negative_coords*: outside of it.\n\nThat takes no time: *SAM Encode* does not run again.\n\nInstead of "
            "*Detect by Text*: any other boxes, or none at all and a point alone.",
            270,
        )
        detected, masks = mask_by_text(w, segmenters, picture["IMAGE"], "a person")
        w.column()
        boxes = w.node("DrawBBoxes", image=picture["IMAGE"], bboxes=detected["bboxes"])
        w.node("PreviewImage", "The box", node_size=(360, 340), images=boxes["out_image"])
        w.node("MaskPreview", "The mask", node_size=(360, 340), mask=masks["masks"])
    return w
