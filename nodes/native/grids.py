"""Pictures in a labelled grid, to be compared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .pictures import INK, PAPER, opaque, to_pil, to_tensor

PADDING = 8  # pixels around texts and between pictures
LETTERS_A_PICTURE = 16  # a letter is so much smaller than the side of a picture
SMALLEST_LETTER = 12
TITLE_WIDTH = 0.75  # of a picture; longer row titles wrap


def wrapped(text: str, font: ImageFont.FreeTypeFont, width: float) -> list[str]:
    """The lines of `text`, none wider than `width` pixels; a word wider than that is broken. [] for no text."""
    lines: list[str] = []
    for paragraph in text.splitlines():
        line = ""
        for word in paragraph.split():
            if line and font.getlength(f"{line} {word}") > width:
                lines.append(line)
                line = ""
            line = f"{line} {word}".lstrip()
            while font.getlength(line) > width and len(line) > 1:
                end = max((n for n in range(1, len(line)) if font.getlength(line[:n]) <= width), default=1)
                lines.append(line[:end])
                line = line[end:]
        lines.append(line)
    return lines


def size_note(batches: Sequence[Tensor], size: int) -> str:
    """What is to be said of batches (B, H, W, C) that differ in size or number of pictures; else nothing."""
    notes = []
    sizes = dict.fromkeys(f"{batch.shape[2]} x {batch.shape[1]}" for batch in batches)
    if len(sizes) > 1:
        notes.append(f"Pictures of {' and '.join(sizes)} pixels, each fitted to {size}.")
    counts = dict.fromkeys(str(len(batch)) for batch in batches)
    if len(counts) > 1:
        notes.append(f"Rows of {' and '.join(counts)} pictures.")
    return " ".join(notes)


def fitted(picture: Tensor, size: int) -> Image.Image:
    """(H, W, 3) scaled so that its longer side has `size` pixels."""
    image = to_pil(picture)
    scale = size / max(image.size)
    # Small pictures stay crisp when enlarged, large ones smooth when made smaller.
    kind = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), kind)


def labelled_grid(
    rows: Mapping[int, Tensor], row_titles: Sequence[str], column_titles: Sequence[str], caption: str, size: int
) -> Tensor:
    """One IMAGE (1, h, w, 3): a row for each batch, a column for each of its pictures.

    rows: {number: (B, H, W, C)} of any sizes and counts; the number says which of row_titles belongs to it, titles
    that are missing stay blank. caption: written under the grid. size: pixels of a picture's longer side.
    Raises ValueError when there is no picture in any row.
    """
    pictures = {number: [fitted(picture, size) for picture in opaque(batch)] for number, batch in rows.items()}
    everything = [picture for row in pictures.values() for picture in row]
    if not everything:
        raise ValueError("There is no picture to compare: connect at least one batch of pictures.")
    font = ImageFont.load_default(max(SMALLEST_LETTER, size // LETTERS_A_PICTURE))
    line_height = sum(font.getmetrics()) + 2
    cell_width, cell_height = max(p.width for p in everything), max(p.height for p in everything)
    columns = max(map(len, pictures.values()))
    left = {n: wrapped(title_of(row_titles, n), font, TITLE_WIDTH * size) for n in rows}
    above = [wrapped(title_of(column_titles, n), font, cell_width) for n in range(columns)]

    title_width = max((math.ceil(font.getlength(line)) for lines in left.values() for line in lines), default=0)
    x_of = [
        PADDING + (title_width + 2 * PADDING if title_width else 0) + column * (cell_width + PADDING)
        for column in range(columns)
    ]
    top = PADDING + max(map(len, above)) * line_height
    row_height = max(cell_height, max(map(len, left.values())) * line_height)
    bottom = top + len(rows) * (row_height + PADDING)
    width = x_of[-1] + cell_width + PADDING
    note = size_note([batch for batch in rows.values() if len(batch)], size)
    below = wrapped(f"{caption.strip()}\n{note}".strip(), font, width - 2 * PADDING)
    sheet = Image.new("RGB", (width, bottom + (len(below) * line_height + PADDING if below else 0)), PAPER)
    draw = ImageDraw.Draw(sheet)

    def write(x: float, y: float, lines: Sequence[str], anchor: str) -> None:
        for number, line in enumerate(lines):
            draw.text((x, y + number * line_height), line, INK, font, anchor)

    for x, lines in zip(x_of, above, strict=True):
        write(x + cell_width / 2, top - len(lines) * line_height, lines, "ma")
    for row, (number, images) in enumerate(pictures.items()):
        middle = top + row * (row_height + PADDING) + row_height / 2
        write(x_of[0] - 2 * PADDING, middle - len(left[number]) * line_height / 2, left[number], "ra")
        for x, image in zip(x_of, images):
            sheet.paste(image, (x + (cell_width - image.width) // 2, round(middle - image.height / 2)))
    write(PADDING, bottom, below, "la")
    return to_tensor(sheet)


def title_of(titles: Sequence[str], number: int) -> str:
    """The title of a row or column, "" where there are fewer."""
    return titles[number] if number < len(titles) else ""
