"""Concepts as files: saved with the workflow that made them, loaded by name, and as stock embeddings where they can."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import folder_paths
from comfy.cli_args import args
from comfy_api.latest import io, ui

from ..kernels.concept import load_concept, save_concept
from .native.output_files import SUFFIX, check_file_name, file_status, free_name, register_folder
from .types import Concept

FOLDER = "concept_atelier"  # the key of the concept files in ComfyUI's model folders


def register_folders() -> None:
    """Let ComfyUI look for concepts, and for stock embeddings, in the folders that AtelierSaveConcept writes."""
    register_folder(FOLDER)
    folder_paths.add_model_folder_path("embeddings", str(Path(folder_paths.get_output_directory()) / "embeddings"))


register_folders()


class AtelierSaveConcept(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AtelierSaveConcept",
            display_name="Save Concept",
            category="Concept Atelier/Files",
            description="Saves a learned concept to output/concept_atelier, with the workflow that made it. A concept "
            "of one token is also saved as a stock embedding, for embedding:name in any prompt node.",
            search_aliases=["save embedding", "save token", "export concept"],
            inputs=[
                Concept.Input("concept", tooltip="The concept to save, from Train Concept or Load Concept."),
                io.String.Input(
                    "file_name",
                    default="",
                    tooltip="Name of the file, without ending; folders with /. Empty: the concept's own name.",
                ),
                io.Boolean.Input(
                    "overwrite",
                    default=False,
                    tooltip="On: replace a file of this name. Off: keep it and add a number to the new one.",
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, concept, file_name: str, overwrite: bool) -> io.NodeOutput:
        name = file_name.strip().removesuffix(SUFFIX) or concept.name
        check_file_name(name)
        keys = [FOLDER, "embeddings"] if concept.is_stock_embedding else [FOLDER]
        name = name if overwrite else free_name(name, keys)
        paths = [Path(folder_paths.get_output_directory(), key, name + SUFFIX) for key in keys]
        # A stock embedding changes no weights: they would only be there twice.
        for path, saved in zip(paths, (concept, replace(concept, weights={}))):
            save_concept(path, saved, cls.workflow_metadata())
        lines = [f"Saved to {paths[0]}", f"Write <{concept.name}> in 'Text Encode with Concepts'."]
        if concept.is_stock_embedding:
            without = ", without the weights that were learned with it" if concept.weights else ""
            lines.append(f"Or write embedding:{name} in any prompt node: it is also in {paths[1]}{without}")
        return io.NodeOutput(ui=ui.PreviewText("\n".join(lines)))

    @classmethod
    def workflow_metadata(cls) -> dict[str, str]:
        """The prompt and workflow of this run, as core nodes write them, unless ComfyUI was told not to."""
        if args.disable_metadata:
            return {}
        values = {"prompt": cls.hidden.prompt, **(cls.hidden.extra_pnginfo or {})}
        return {key: json.dumps(value) for key, value in values.items() if value is not None}


class AtelierLoadConcept(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AtelierLoadConcept",
            display_name="Load Concept",
            category="Concept Atelier/Files",
            description="Loads a concept saved by Save Concept, from output/concept_atelier or models/concept_atelier.",
            search_aliases=["load embedding", "load token", "import concept"],
            inputs=[
                io.Combo.Input(
                    "file_name",
                    options=folder_paths.get_filename_list(FOLDER),
                    tooltip="A file in output/concept_atelier or models/concept_atelier.",
                ),
            ],
            outputs=[
                Concept.Output(
                    display_name="concept",
                    tooltip="For Text Encode with Concepts, Apply Concepts or Save Concept.",
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, file_name: str) -> tuple[int, int]:
        return file_status(file_name and folder_paths.get_full_path_or_raise(FOLDER, file_name))

    @classmethod
    def execute(cls, file_name: str) -> io.NodeOutput:
        return io.NodeOutput(load_concept(Path(folder_paths.get_full_path_or_raise(FOLDER, file_name))))


NODES = [AtelierSaveConcept, AtelierLoadConcept]
