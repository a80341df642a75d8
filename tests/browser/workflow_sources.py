"""The shipped workflows by name; build_workflows.py has the real frontend lay them out and save them."""

from __future__ import annotations

from collections.abc import Callable

from adi_workflows import adi_sd, adi_toy
from compose_workflows import compose_sd, compose_toy
from gcfg_sd_workflows import gcfg_control_sd
from gcfg_workflows import gcfg_negative_toy, gcfg_rectified_toy, gcfg_subjects_toy, gcfg_two_prompts_toy
from mask_workflows import mask_subject_sd
from nulltext_workflows import nulltext_toy
from photo_workflows import inversion_sd, inversion_toy, replace_sd, replace_toy
from reference_workflows import reference_sd, reference_toy
from subject_workflows import subject_sd, subject_toy
from workflow_builder import Workflow

WORKFLOWS: dict[str, Callable[[], Workflow]] = {
    source.__name__: source
    for source in (
        adi_toy,
        adi_sd,
        gcfg_negative_toy,
        gcfg_two_prompts_toy,
        gcfg_rectified_toy,
        gcfg_subjects_toy,
        gcfg_control_sd,
        nulltext_toy,
        mask_subject_sd,
        subject_toy,
        subject_sd,
        reference_toy,
        reference_sd,
        replace_toy,
        replace_sd,
        inversion_toy,
        inversion_sd,
        compose_toy,
        compose_sd,
    )
}
