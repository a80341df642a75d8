"""Subject replacement: which columns are fixed to which, and what fixing them does to attention."""

import pytest
import torch
from concept_atelier.benchmarks.replacement import outside, swaps
from concept_atelier.kernels.replacement import Columns, attention, fix_columns, match_columns
from concept_atelier.toyworld.render import render

T = 12


def tokens(*words, tail=()):
    """T tokens: start, words (a word of several pieces as "word*3"), end and padding, rows at the tail."""
    pieces = [piece for word in words for piece in [word.split("*")[0]] * int((word + "*1").split("*")[1])]
    return ["", *pieces, *[""] * (T - 1 - len(pieces) - len(tail)), *tail]


def test_equal_prompts_are_fixed_in_every_column():
    prompt = tokens("a", "cat", "on", "grass")
    assert match_columns(prompt, prompt) == Columns(tuple(range(T)), tuple(range(T)), ())


def test_the_word_that_differs_is_free():
    columns = match_columns(tokens("a", "cat", "on", "grass"), tokens("a", "dog", "on", "grass"))
    others = tuple(at for at in range(T) if at != 2)
    assert columns == Columns(others, others, ("dog",))


def test_a_subject_of_more_tokens_shifts_what_follows():
    columns = match_columns(tokens("a", "cat", "on", "grass"), tokens("a", "<it>*3", "on", "grass"))
    fixed = dict(zip(columns.fixed, columns.source))
    assert columns.subject == ("<it>",)
    assert not {2, 3, 4} & set(fixed)
    assert (fixed[0], fixed[1], fixed[5], fixed[6]) == (0, 1, 3, 4)
    assert fixed[7] == 5  # the end of the text
    assert [fixed[at] for at in range(8, T)] == list(range(8, T))  # padding, at its own position


def test_a_subject_of_fewer_tokens_leaves_padding_without_counterpart_free():
    columns = match_columns(tokens("a", "<it>*3", "on", "grass"), tokens("a", "cat", "on", "grass"))
    fixed = dict(zip(columns.fixed, columns.source))
    assert (fixed[3], fixed[4], fixed[5]) == (5, 6, 7)
    assert 2 not in fixed and 6 not in fixed and 7 not in fixed  # cat, and padding where the source has a word, an end
    assert columns.subject == ("cat",)


def test_every_source_column_is_used_at_most_once():
    for source in (("a", "cat"), ("a", "<it>*4"), ("the", "the", "the"), ()):
        for target in (("a", "cat"), ("a", "very", "big", "cat"), ("the", "the"), ("cat", "a")):
            columns = match_columns(tokens(*source), tokens(*target))
            assert len(set(columns.source)) == len(columns.source)


def test_rows_at_the_tail_are_free():
    columns = match_columns(tokens("a", "cat"), tokens("a", "dog", tail=["<it>"] * 3))
    fixed = dict(zip(columns.fixed, columns.source))
    assert set(range(T)) - set(fixed) == {2, T - 3, T - 2, T - 1}
    assert columns.subject == ("dog", "<it>")
    assert fixed[3] == 3


def test_a_subject_named_by_hand_is_free_and_other_words_are_fixed_one_by_one():
    source, target = tokens("a", "cat", "on", "grass"), tokens("a", "dog", "on", "snow")
    assert match_columns(source, target).subject == ("dog", "snow")
    columns = match_columns(source, target, ["dog"])
    assert columns.subject == ("dog",) and 4 in columns.fixed
    same = match_columns(source, source, ["cat"])
    assert same.subject == ("cat",) and 2 not in same.fixed


def test_a_subject_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="does not have horse: choose the subject among its words a, dog"):
        match_columns(tokens("a", "cat"), tokens("a", "dog"), ["horse"])


def test_prompts_of_different_length_are_refused():
    with pytest.raises(ValueError, match="takes 12 tokens and the target prompt 24"):
        match_columns(tokens("a"), tokens("a") * 2)


# Attention


@pytest.fixture
def runs():
    """q, k, v of the new run and the maps of the source run: 2 heads of 4 channels, 9 places, T tokens."""
    generator = torch.Generator().manual_seed(0)
    q, q_source = torch.randn(2, 1, 2, 9, 4, generator=generator) * 2
    k, k_source, v = torch.randn(3, 1, 2, T, 4, generator=generator) * 2
    return q, k, v, attention(q_source, k_source, T)


def by_hand(q, k, v, a_source, columns):
    """A with its columns replaced one after another, and A V."""
    a = (q @ k.transpose(-1, -2) / 2).softmax(-1)
    for fixed, source in zip(columns.fixed, columns.source):
        a[..., fixed] = a_source[..., source].float()
    return a, a @ v


def test_fixed_columns_are_those_of_the_source(runs):
    q, k, v, a_source = runs
    columns = Columns((0, 1, 4), (0, 2, 3), ("dog",))
    a, expected = by_hand(*runs, columns)
    out = fix_columns(
        torch.nn.functional.scaled_dot_product_attention(q, k, v), attention(q, k, T), a_source, v, columns
    )
    torch.testing.assert_close(out, expected, rtol=0, atol=5e-3)  # the maps are rounded to half precision
    assert (a.sum(-1) - 1).abs().max() > 0.05


def test_renormalised_rows_sum_to_one(runs):
    q, k, v, a_source = runs
    columns = Columns((0, 1, 4), (0, 2, 3), ("dog",))
    a, expected = by_hand(*runs, columns)
    stock = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    out = fix_columns(stock, attention(q, k, T), a_source, v, columns, renormalise=True)
    torch.testing.assert_close(out, expected / a.sum(-1, keepdim=True), rtol=0, atol=5e-3)


@pytest.mark.parametrize("renormalise", [False, True])
def test_the_same_maps_change_not_a_bit(runs, renormalise):
    q, k, v, _ = runs
    out = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))  # of any attention function
    every = tuple(range(T))
    a = attention(q, k, T)
    assert torch.equal(fix_columns(out, a, a, v, Columns(every, every, ()), renormalise), out)
    a_source = runs[3]
    assert torch.equal(fix_columns(out, a, a_source, v, Columns((), (), ("all",)), renormalise), out)


def test_nothing_left_of_a_row_stays_finite(runs):
    q, k, v, a_source = runs
    every = tuple(range(T))
    out = fix_columns(
        torch.zeros_like(q), attention(q, k, T), torch.zeros_like(a_source), v, Columns(every, every, ()), True
    )
    assert out.isfinite().all()


def test_copies_of_a_prompt_count_as_one(runs):
    q, k, _, _ = runs
    torch.testing.assert_close(attention(q, torch.cat([k, k], dim=-2), T), attention(q, k, T), rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_half_and_near(runs, dtype):
    q, k, v, a_source = runs
    columns = Columns((0, 1, 4), (0, 2, 3), ("dog",))
    expected = by_hand(*runs, columns)[1]
    half = [x.to(dtype) for x in (q, k, v)]
    stock = torch.nn.functional.scaled_dot_product_attention(*half)
    out = fix_columns(stock, attention(*half[:2], T), a_source, half[2], columns)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=0.06)


# The benchmark's pictures


@pytest.mark.parametrize("subject", [None, "pig"])
def test_pictures_of_a_swap_differ_only_where_the_figures_are(subject):
    for old, new in swaps(4, subject):
        assert old.subject != new.subject == (subject or new.subject)
        around = outside(old, new)
        assert 0.3 < around.float().mean() < 0.95
        differs = torch.tensor(render(old) != render(new)).any(-1)
        assert differs.any() and not (differs & around).any()
