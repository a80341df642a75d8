"""Prompts with concepts become contexts: METHODS.md 8 (2, 5) with an encoder whose output says what went in."""

from collections.abc import Mapping

import pytest
import torch
from concept_atelier.kernels.backbone import Layer, TextContext, TextEncoding
from concept_atelier.kernels.conditioning import encode_prompt
from concept_atelier.kernels.layouts import Layout
from concept_atelier.kernels.prompts import Placeholder, Prompt, fill_blank, parse_prompt

LAYERS = [Layer("input", 1, 0), Layer("middle", 0, 0), Layer("output", 0, 0)]


class CountingEncoder:
    """hidden[n] = [sum of the first placeholder's vector, sum of the second's]; counts variants."""

    def __init__(self) -> None:
        self.variants = 0

    def __call__(self, prompt: Prompt, vectors: Mapping[str, Mapping[str, torch.Tensor]]) -> TextEncoding:
        sums = [vectors[name]["l"].sum(dim=(1, 2)) for name in prompt.names]
        hidden = torch.stack(sums, dim=-1)[:, None] if sums else torch.zeros(1, 1, 1)
        self.variants = len(hidden)
        return TextEncoding(hidden, hidden[:, 0], dict.fromkeys(prompt.names, (1,)), (1,))


def encode(text: str, read_at: tuple[int, ...] | None = None, **layouts: Layout):
    bound = {name: layout.bind(LAYERS) for name, layout in layouts.items()}
    # Slot s of every concept holds the number s, so contexts can be read off.
    vectors = {name: {"l": torch.arange(b.slots).float()[:, None, None]} for name, b in bound.items()}
    encoder = CountingEncoder()
    prompt = parse_prompt(text, list(layouts))
    return encode_prompt(encoder, LAYERS, prompt, vectors, bound, 1000, read_at), encoder


def slots_read(context: TextContext) -> list[tuple[list[float], list[float]]]:
    return [tuple(side[0, 0].tolist() for side in context.sources(layer)) for layer in range(len(LAYERS))]


def test_one_token_is_one_encoding_for_all_layers():
    staged, encoder = encode("a <cat>", cat=Layout())
    assert encoder.variants == 1 and len(staged.contexts) == 1
    assert slots_read(staged.at(500)) == [([0.0], [0.0])] * 3


def test_two_concepts_with_different_layouts_combine():
    staged, encoder = encode("<cat> and <hat>", cat=Layout("layer"), hat=Layout(split_kv=True))
    assert encoder.variants == 6
    assert slots_read(staged.at(0)) == [([layer, 0.0], [layer, 1.0]) for layer in (0.0, 1.0, 2.0)]


def test_stages_change_with_the_timestep_and_share_tables():
    staged, encoder = encode("<cat>", cat=Layout("layer", stages=4))
    assert staged.starts == (0, 250, 500, 750) and encoder.variants == 12
    for t, first in ((0, 0), (249, 0), (250, 3), (999, 9)):
        assert slots_read(staged.at(t)) == [([first + i], [first + i]) for i in (0.0, 1.0, 2.0)]
    assert len({c.key for c in staged.contexts}) == 1


def test_layouts_with_different_stages_change_where_either_does():
    staged, _ = encode("<cat> <hat>", cat=Layout(stages=2), hat=Layout(stages=3))
    assert staged.starts == (0, 334, 500, 667)
    assert [slots_read(staged.at(t))[0][0] for t in (0, 400, 600, 999)] == [[0, 0], [0, 1], [1, 1], [1, 2]]


def test_only_stages_that_are_read_are_encoded():
    whole, _ = encode("<cat> <hat>", cat=Layout(stages=2), hat=Layout("layer", stages=3))
    part, encoder = encode("<cat> <hat>", (420, 640, 499), cat=Layout(stages=2), hat=Layout("layer", stages=3))
    assert part.starts == (334, 500) and encoder.variants == 6
    for t in (420, 499, 640):
        assert slots_read(part.at(t)) == slots_read(whole.at(t))


def test_a_pooled_embedding_takes_part_of_all_stages():
    """SDXL's, of tower g."""
    bound = Layout(stages=4).bind(LAYERS)
    vectors = {"cat": {tower: torch.arange(4.0)[:, None, None] for tower in ("l", "g")}}
    prompt = parse_prompt("<cat>", ["cat"])
    staged = encode_prompt(CountingEncoder(), LAYERS, prompt, vectors, {"cat": bound}, 1000, read_at=[999])
    assert staged.at(999).pooled.tolist() == [[1.5]]


def test_the_pooled_embedding_is_the_mean_over_variants():
    staged, _ = encode("<cat>", cat=Layout("layer"))
    assert staged.at(0).pooled.tolist() == [[1.0]]


def test_contexts_batch_only_with_equal_tables():
    per_layer, _ = encode("<cat>", cat=Layout("layer"))
    plain, _ = encode("<cat>", cat=Layout())
    both = TextContext.cat([per_layer.at(0), per_layer.at(0)])
    assert both.rows.shape[1] == 2 and both.repeat(2).rows.shape[1] == 4
    with pytest.raises(ValueError, match="different layer tables"):
        TextContext.cat([per_layer.at(0), plain.at(0)])


def test_contexts_batch_only_with_equal_numbers_of_tokens():
    short, long = (TextContext.plain(torch.zeros(1, length, 2), LAYERS) for length in (77, 154))
    with pytest.raises(ValueError, match=r"more than 75 tokens cannot share a batch .* set batch_size to 1"):
        TextContext.cat([short, long])


def test_prompts_are_cut_at_placeholders():
    prompt = parse_prompt("a <cat>, and <my-hat> (on:1.2) <cat>", ["cat", "my-hat"])
    assert prompt.names == ("cat", "my-hat")
    assert prompt.text == "a <cat>, and <my-hat> (on:1.2) <cat>"
    assert prompt.parts[1] == Placeholder("cat")


def test_an_unknown_placeholder_names_those_there_are():
    with pytest.raises(ValueError, match=r"<dog>.*\(<cat>, <hat>\)"):
        parse_prompt("a <dog>", ["cat", "hat"])
    with pytest.raises(ValueError, match="none is connected"):
        parse_prompt("a <dog>", [])


@pytest.mark.parametrize("caption", ["a man sits", "a {} man {}"])
def test_a_caption_has_exactly_one_blank(caption):
    with pytest.raises(ValueError, match="exactly one blank"):
        fill_blank(caption, "act")
    assert fill_blank("a man {} here", "act").text == "a man <act> here"
