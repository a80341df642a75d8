"""Pictures side by side."""

from __future__ import annotations

from comfy_api.latest import io, ui

from .native.grids import labelled_grid

PREFIX = "picture"


class AtelierCompareGrid(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        pictures = io.Image.Input(PREFIX, tooltip="One row: a batch, best painted with the same seeds as the others.")
        return io.Schema(
            node_id="AtelierCompareGrid",
            display_name="Compare Grid",
            category="Concept Atelier/Look",
            description="Puts batches of pictures into one labelled picture: a row for each, a column for each of its "
            "pictures.",
            search_aliases=["xy plot", "grid", "contact sheet", "side by side", "compare images", "image grid"],
            inputs=[
                io.Autogrow.Input(
                    "pictures",
                    template=io.Autogrow.TemplatePrefix(pictures, prefix=PREFIX, min=0, max=20),
                    tooltip="The rows, from top to bottom; another socket appears as you connect one.",
                ),
                io.String.Input(
                    "row_titles",
                    default="",
                    multiline=True,
                    tooltip="One line a row: the first for picture0, the second for picture1, and so on. Long ones "
                    "wrap. English letters only.",
                ),
                io.String.Input(
                    "column_titles",
                    default="",
                    multiline=True,
                    tooltip="One line a column, such as its seed or prompt. Long ones wrap.",
                ),
                io.String.Input(
                    "caption",
                    default="",
                    multiline=True,
                    tooltip="Written under the grid: the prompt, for example.",
                ),
                io.Int.Input(
                    "picture_size",
                    default=256,
                    min=32,
                    max=4096,
                    step=8,
                    tooltip="Pixels of the longer side of each picture in the grid; letters grow with it. Pictures of "
                    "other sizes are fitted, whole.",
                ),
            ],
            outputs=[io.Image.Output(display_name="grid", tooltip="The grid as one picture.")],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, pictures: io.Autogrow.Type, row_titles: str, column_titles: str, caption: str, picture_size: int
    ) -> io.NodeOutput:
        rows = {int(name.removeprefix(PREFIX)): batch for name, batch in pictures.items()}
        grid = labelled_grid(
            dict(sorted(rows.items())), row_titles.splitlines(), column_titles.splitlines(), caption, picture_size
        )
        return io.NodeOutput(grid, ui=ui.PreviewImage(grid, cls=cls))


NODES = [AtelierCompareGrid]
