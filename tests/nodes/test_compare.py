"""The compare grid: which picture is where, whose title is beside it, what happens to sizes that differ."""

import pytest
import torch
from concept_atelier.nodes.compare import AtelierCompareGrid
from concept_atelier.nodes.native.grids import labelled_grid, size_note, wrapped
from concept_atelier.nodes.native.pictures import INK, PAPER
from PIL import ImageFont

SIZE = 64
COLORS = ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1))


def batch(*colors: tuple[int, int, int], height: int = SIZE, width: int = SIZE) -> torch.Tensor:
    """Pictures of one colour each."""
    return torch.stack([torch.tensor(color).float().expand(height, width, 3) for color in colors])


def grid(rows, row_titles="", column_titles="", caption="", size=SIZE) -> torch.Tensor:
    """(h, w, 3): what the node gives for {number: batch}."""
    pictures = {f"picture{number}": pictures for number, pictures in rows.items()}
    return AtelierCompareGrid.execute(pictures, row_titles, column_titles, caption, size)[0][0]


def box(image: torch.Tensor, color: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of the places of exactly this colour."""
    found = (image == torch.tensor(color).float()).all(dim=-1).nonzero()
    assert len(found), f"no {color} in the grid"
    (top, left), (bottom, right) = found.amin(dim=0).tolist(), found.amax(dim=0).tolist()
    return left, top, right + 1, bottom + 1


def inked(image: torch.Tensor) -> torch.Tensor:
    """Where letters are, (h, w), on paper without pictures."""
    return image.sum(dim=-1) > (sum(PAPER) + sum(INK)) / 2 / 255


def test_rows_are_batches_and_columns_their_pictures():
    image = grid({0: batch(*COLORS[:3]), 1: batch(*COLORS[3:])})
    boxes = [box(image, color) for color in COLORS]
    assert all((right - left, bottom - top) == (SIZE, SIZE) for left, top, right, bottom in boxes)
    for upper, lower in zip(boxes[:3], boxes[3:]):
        assert upper[0] == lower[0] and upper[3] < lower[1]
    for row in (boxes[:3], boxes[3:]):
        assert row[0][2] < row[1][0] and row[1][2] < row[2][0] and len({b[1] for b in row}) == 1


def test_pictures_are_not_changed_at_their_own_size():
    pictures = torch.randint(0, 256, (1, SIZE, SIZE, 3), generator=torch.Generator().manual_seed(0)).float() / 255
    image = grid({0: pictures})
    assert any(
        torch.equal(image[top : top + SIZE, left : left + SIZE], pictures[0]) for top in range(12) for left in range(12)
    )


def test_rows_come_in_the_order_of_sockets_with_their_own_titles():
    """Ten comes after two, and the title of a socket that is not connected goes to no other row."""
    image = grid({10: batch(COLORS[0]), 2: batch(COLORS[1])})
    assert box(image, COLORS[1])[1] < box(image, COLORS[0])[1]
    titles = "\n" * 10 + "ten"
    image = grid({10: batch(COLORS[0]), 2: batch(COLORS[1])}, row_titles=titles)
    left, top, _, bottom = box(image, COLORS[0])
    beside = inked(image[:, :left])
    assert beside[top:bottom].any() and not beside[: top - 1].any() and not beside[bottom:].any()


def test_titles_are_beside_their_rows_and_above_their_columns():
    image = grid({0: batch(*COLORS[:2]), 1: batch(*COLORS[3:5])}, "\nsecond", "\nright")
    left, _, _, first_bottom = box(image, COLORS[0])
    _, second_top, _, second_bottom = box(image, COLORS[3])
    right_left, top, right_right, _ = box(image, COLORS[1])
    beside, above = inked(image[:, :left]), inked(image[:top])
    assert beside[second_top:second_bottom].any() and not beside[:first_bottom].any()
    assert above[:, right_left:right_right].any() and not above[:, :right_left].any()


def test_without_titles_there_is_no_room_for_them():
    bare, titled = grid({0: batch(COLORS[0])}), grid({0: batch(COLORS[0])}, "row", "column", "caption")
    assert bare.shape == (SIZE + 16, SIZE + 16, 3)
    assert titled.shape[0] > bare.shape[0] and titled.shape[1] > bare.shape[1]


def test_long_texts_wrap_and_stay_inside():
    long = "a photograph of one thing beside another thing"
    image = grid({0: batch(*COLORS[:2])}, long, f"{long}\n{long}", f"{long} {long}")
    left, top, _, bottom = box(image, COLORS[0])
    assert left < SIZE + 24  # a title takes at most three quarters of a picture
    lines = inked(image).any(dim=1)
    assert count_runs(lines[:top]) >= 4 and count_runs(lines[bottom:]) >= 4
    edge = torch.cat([image[0], image[-1], image[:, 0], image[:, -1]])
    assert torch.equal(edge, (torch.tensor(PAPER) / 255).expand_as(edge))


def count_runs(marks: torch.Tensor) -> int:
    """Number of stretches of True."""
    return int((marks[1:] & ~marks[:-1]).sum() + marks[0])


def test_wrapping_breaks_between_words_and_words_that_are_too_long():
    font = ImageFont.load_default(12)
    width = font.getlength("a red ball")
    lines = wrapped("a red ball on a red ball\n\nextraordinarily", font, width)
    assert lines[:4] == ["a red ball", "on a red", "ball", ""]
    assert "".join(lines[4:]) == "extraordinarily" and len(lines) > 5
    assert all(font.getlength(line) <= width for line in lines)
    assert wrapped("", font, width) == []


def test_pictures_of_other_sizes_are_fitted_whole_and_that_is_said():
    rows = {0: batch(COLORS[0]), 1: batch(COLORS[1], height=2 * SIZE, width=SIZE), 2: batch(COLORS[2], height=16)}
    image = grid(rows)
    sizes = [(right - left, bottom - top) for left, top, right, bottom in (box(image, color) for color in COLORS[:3])]
    assert sizes == [(SIZE, SIZE), (SIZE // 2, SIZE), (SIZE, 16)]
    assert inked(image[box(image, COLORS[2])[3] + 32 :]).any()
    note = "Pictures of 64 x 64 and 64 x 128 and 64 x 16 pixels, each fitted to 64."
    assert size_note(list(rows.values()), SIZE) == note
    assert size_note([batch(COLORS[0])] * 2, 256) == ""


def test_rows_may_have_different_numbers_of_pictures_and_that_is_said():
    rows = {0: batch(COLORS[0]), 1: batch(*COLORS[1:4])}
    image = grid(rows)
    assert box(image, COLORS[0])[0] == box(image, COLORS[1])[0]
    assert size_note(list(rows.values()), SIZE) == "Rows of 1 and 3 pictures."


def test_what_is_transparent_becomes_white():
    image = grid({0: torch.zeros(1, SIZE, SIZE, 4)})
    left, top, right, bottom = box(image, (1, 1, 1))
    assert (right - left, bottom - top) == (SIZE, SIZE)


def test_letters_grow_with_pictures():
    heights = []
    for size in (128, 512):
        image = grid({0: batch(COLORS[0])}, caption="H", size=size)
        below = inked(image[box(image, COLORS[0])[3] :])
        heights.append(int(below.any(dim=1).sum()))
    assert heights[1] > 2 * heights[0] > 8


@pytest.mark.parametrize("pictures", [{}, {"picture0": torch.zeros(0, 8, 8, 3)}])
def test_nothing_to_compare_is_named(pictures):
    with pytest.raises(ValueError, match="no picture to compare: connect at least one batch"):
        AtelierCompareGrid.execute(pictures, "", "", "", SIZE)


def test_the_grid_is_shown_on_the_node():
    out = AtelierCompareGrid.execute({"picture0": batch(COLORS[0])}, "", "", "", SIZE)
    assert AtelierCompareGrid.GET_SCHEMA().is_output_node
    assert len(out.ui.as_dict()["images"]) == 1
    assert torch.equal(out[0], labelled_grid({0: batch(COLORS[0])}, [], [], "", SIZE))
