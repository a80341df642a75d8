"""Prompts with placeholders against ComfyUI's own tokenizer and text encoders."""

import pytest
import tiny_models
import torch
from concept_atelier.kernels.prompts import parse_prompt
from concept_atelier.nodes.apply import AtelierTextEncode
from concept_atelier.nodes.layout_guidance import AtelierLayoutGuidance
from concept_atelier.nodes.native.attention_maps import find_words
from concept_atelier.nodes.native.text import describe_clip, encode_text, prompt_words, token_vectors
from safetensors.torch import save_file

FAMILIES = ("sd1", "sd2", "sdxl")
LONG = "a red house, a green tree " * 25  # 175 tokens: three chunks


@pytest.fixture(params=FAMILIES)
def clip(request, tiny):
    return tiny(request.param).clip


def stock(clip, text):
    return clip.encode_from_tokens(clip.tokenize(text), return_pooled=True)


def some_vectors(clip, variants=1, tokens=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    towers = describe_clip(clip).towers
    return {tower: torch.randn(variants, tokens, width, generator=generator) for tower, width in towers.items()}


@pytest.mark.parametrize(
    "text", ["", "a photo of a cat", "(snow:1.3), ((ice)) and \\(this\\) (cold:0.6)", "a cat BREAK a dog", LONG]
)
@pytest.mark.parametrize("skip", [None, -2])
def test_without_placeholders_it_is_the_stock_encoding_bit_for_bit(clip, text, skip):
    clip = clip.clone()
    clip.clip_layer(skip)
    encoding = encode_text(clip, parse_prompt(text, []), {})
    hidden, pooled = stock(clip, text)
    assert torch.equal(encoding.hidden, hidden) and torch.equal(encoding.pooled, pooled)
    assert not encoding.positions and not encoding.hidden.requires_grad


def test_clip_skip_is_respected(tiny):
    clip = tiny("sd1").clip.clone()
    clip.clip_layer(-2)
    prompt, vectors = parse_prompt("a <cat>", ["cat"]), {"cat": some_vectors(clip)}
    skipped = encode_text(clip, prompt, vectors).hidden
    assert not torch.allclose(skipped, encode_text(tiny("sd1").clip, prompt, vectors).hidden)


@pytest.mark.parametrize(
    "template",
    [
        "a photo of {}",
        "{}",
        "a photo of {}, in snow",
        "(a {}:1.3) on grass",
        "{} and {}, ({}:0.7)",
        LONG + "{}. " + LONG,
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_placeholder_behaves_as_the_stock_embedding_of_its_vectors(tmp_path, family, template):
    clip = tiny_models.build_clip(family, embedding_directory=str(tmp_path))
    vectors = some_vectors(clip)
    save_file({f"clip_{tower}": v[0].contiguous() for tower, v in vectors.items()}, tmp_path / "learned.safetensors")
    encoding = encode_text(clip, parse_prompt(template.replace("{}", "<cat>"), ["cat"]), {"cat": vectors})
    hidden, pooled = stock(clip, template.replace("{}", "embedding:learned "))
    assert torch.equal(encoding.hidden, hidden) and torch.equal(encoding.pooled, pooled)


def test_embedding_files_and_placeholders_share_a_prompt(tmp_path):
    clip = tiny_models.build_clip("sd1", embedding_directory=str(tmp_path))
    save_file({"clip_l": torch.ones(3, 64)}, tmp_path / "file.safetensors")
    encoding = encode_text(
        clip, parse_prompt("embedding:file and <cat>, snow", ["cat"]), {"cat": {"l": torch.ones(1, 3, 64)}}
    )
    assert torch.equal(encoding.hidden, stock(clip, "embedding:file and embedding:file , snow")[0])
    assert encoding.positions == {"cat": (5, 6, 7)}


@pytest.mark.parametrize("template", ["a photo of a {}", "a {}, in (snow:1.2)", "a {}'s hat", "({}:1.4) on grass"])
def test_the_vectors_of_a_word_put_back_give_the_word(clip, template):
    word = token_vectors(clip, "cat")
    assert {tower: tuple(v.shape) for tower, v in word.items()} == {
        tower: (1, width) for tower, width in describe_clip(clip).towers.items()
    }
    back = {"x": {tower: v[None] for tower, v in word.items()}}
    encoding = encode_text(clip, parse_prompt(template.replace("{}", "<x>"), ["x"]), back)
    hidden, pooled = stock(clip, template.replace("{}", "cat"))
    assert torch.equal(encoding.hidden, hidden) and torch.equal(encoding.pooled, pooled)


def test_token_vectors_counts_the_pieces_of_a_word(clip):
    assert all(len(v) > 1 for v in token_vectors(clip, "zxqvkw").values())
    assert all(len(v) == 0 for v in token_vectors(clip, "").values())
    assert all(len(v) == 3 for v in token_vectors(clip, "(cat)").values())  # a word, not prompt syntax


def test_variants_in_one_batch_equal_single_ones(clip):
    prompt = parse_prompt(LONG + "(<cat>:1.3) meets <dog> " + LONG, ["cat", "dog"])
    both = {"cat": some_vectors(clip, 3), "dog": some_vectors(clip, 3, tokens=1, seed=1)}
    together = encode_text(clip, prompt, both)
    for n in range(3):
        alone = encode_text(clip, prompt, {k: {t: v[n : n + 1] for t, v in vs.items()} for k, vs in both.items()})
        assert torch.allclose(together.hidden[n : n + 1], alone.hidden, atol=1e-5)
        assert torch.allclose(together.pooled[n : n + 1], alone.pooled, atol=1e-5)


def test_positions_are_where_the_vectors_act(clip):
    prompt = parse_prompt("a " * 74 + "red <cat> and <dog> and <cat>" + ", blue" * 40, ["cat", "dog"])
    vectors = {"cat": some_vectors(clip), "dog": some_vectors(clip, tokens=1, seed=1)}
    encoding = encode_text(clip, prompt, vectors)
    changed = encode_text(clip, prompt, {**vectors, "cat": some_vectors(clip, seed=2)})
    cat, dog = encoding.positions["cat"], encoding.positions["dog"]
    assert cat[0] > 77 and cat[1] == cat[0] + 1 and len(cat) == 4 and len(dog) == 1
    assert cat[1] < dog[0] < cat[2]
    differs = (encoding.hidden != changed.hidden).any(-1)[0]
    assert not differs[: cat[0]].any() and differs[cat[0] : 154].all() and not differs[154:].any()


@pytest.mark.parametrize("text", ["", "a cat", LONG, "red " * 75, "red " * 74 + "xylophonist"])
def test_words_are_what_is_neither_start_nor_end_nor_padding(clip, text):
    chunks = next(iter(clip.tokenize(text).values()))
    tokens = [token for chunk in chunks for token, _ in chunk]
    encoding = encode_text(clip, parse_prompt(text, []), {})
    assert encoding.words == tuple(at for at, token in enumerate(tokens) if token not in (0, 49406, 49407))
    assert encoding.length == (encoding.words[-1] + 2 if text else 2)


def test_vectors_of_placeholders_and_files_are_words(tmp_path):
    clip = tiny_models.build_clip("sd1", embedding_directory=str(tmp_path))
    save_file({"clip_l": torch.ones(3, 64)}, tmp_path / "file.safetensors")
    prompt = parse_prompt("embedding:file and <cat>!", ["cat"])
    assert encode_text(clip, prompt, {"cat": {"l": torch.ones(1, 2, 64)}}).words == tuple(range(1, 8))


def test_words_of_any_script_are_read_as_they_are_written(tiny):
    model, clip, _ = tiny("sd1")
    prompt = "A Caf\u00c9 with a \u732b, \u043a\u043e\u0442 and cr\u00e8me-br\u00fbl\u00e9e \U0001f431"
    words = prompt_words(clip, parse_prompt(prompt, []), {})
    assert [word for at, word in enumerate(words) if word and word != words[at - 1]] == [
        "a", "caf\u00e9", "with", "a", "\u732b", ",", "\u043a\u043e\u0442", "and", "cr\u00e8me", "-",
        "br\u00fbl\u00e9e", "\U0001f431",
    ]  # fmt: skip
    positive = AtelierTextEncode.execute(clip, prompt, {})[0]
    assert find_words(positive, "CAF\u00c9 \u732b") == {"caf\u00e9", "\u732b"}  # Attention Maps
    settings = {"strength": 30.0, "steps": 2, "iterations": 2, "threshold": 0.0, "power": "1 (paper)"}
    AtelierLayoutGuidance.execute(
        model, positive, "\u732b, cr\u00e8me-br\u00fbl\u00e9e", 512, 512, largest_move=0.0, **settings
    )
    with pytest.raises(ValueError, match="does not have th\u00e9: choose among its words"):
        AtelierLayoutGuidance.execute(model, positive, "a, th\u00e9", 512, 512, largest_move=0.0, **settings)


def test_two_adjacent_placeholders(clip):
    vectors = {"cat": some_vectors(clip), "dog": some_vectors(clip, tokens=1, seed=1)}
    apart = encode_text(clip, parse_prompt("a <cat> <dog>", ["cat", "dog"]), vectors)
    joined = encode_text(clip, parse_prompt("a <cat><dog>", ["cat", "dog"]), vectors)
    assert apart.positions == joined.positions == {"cat": (2, 3), "dog": (4,)}
    assert torch.equal(apart.hidden, joined.hidden)


def test_the_clip_is_left_as_it_was(tiny):
    clip = tiny("sd1").clip
    before = stock(clip, "a photo of embedding:<cat>")[0]
    encode_text(clip, parse_prompt("a <cat>", ["cat"]), {"cat": some_vectors(clip)})
    assert torch.equal(stock(clip, "a photo of embedding:<cat>")[0], before)
    assert clip.tokenizer.clip_l.embedding_directory is None


def test_describe_clip(tiny):
    assert [describe_clip(tiny(family).clip) for family in FAMILIES] == [
        ("sd1", {"l": 64}),
        ("sd2", {"h": 64}),
        ("sdxl", {"l": 24, "g": 40}),
    ]


def test_other_text_encoders_are_refused(tiny):
    refiner = tiny("sdxl").clip.clone()
    refiner.cond_stage_model = torch.nn.Module()
    with pytest.raises(ValueError, match="connect the CLIP of such a checkpoint"):
        describe_clip(refiner)


def test_a_family_may_name_itself():
    clip = tiny_models.build_clip("sd1")
    clip.cond_stage_model.__class__ = type("Toy", (type(clip.cond_stage_model),), {"atelier_family": "toy"})
    assert describe_clip(clip) == ("toy", {"l": 64})


def test_vectors_that_do_not_fit_are_refused(tiny):
    clip, prompt = tiny("sd1").clip, parse_prompt("a <cat>", ["cat"])
    with pytest.raises(ValueError, match=r"<cat> have widths \{'l': 768\}, but this sd1 CLIP has \{'l': 64\}"):
        encode_text(clip, prompt, {"cat": {"l": torch.ones(1, 1, 768)}})
    with pytest.raises(ValueError, match="no vectors were given"):
        encode_text(clip, prompt, {})
    two = parse_prompt("a <cat> <dog>", ["cat", "dog"])
    with pytest.raises(ValueError, match="same number of variants"):
        encode_text(clip, two, {"cat": {"l": torch.ones(1, 1, 64)}, "dog": {"l": torch.ones(2, 1, 64)}})
