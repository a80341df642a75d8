"""The toy model's CLIP tokenizer: byte pairs learned from the world's own words, so that each word is one piece."""

import json
import string
from pathlib import Path

import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from .vocabulary import (
    ACCESSORIES,
    ACTIONS,
    BACKGROUNDS,
    COLORS,
    HELD_OUT_ACTIONS,
    HELD_OUT_OBJECTS,
    HELD_OUT_SUBJECTS,
    OBJECTS,
    SIDES,
    SUBJECTS,
)

TOKENS = 24
START, END = "<|startoftext|>", "<|endoftext|>"
# Words of the grammar that are in no list, and words that people start a new concept from. What is held out of
# training exists as (untrained) tokens, too.
_OTHER_WORDS = (
    "a an with the on in at poses arm arms leg legs and up high out low down bent apart together wide "
    "action pose person someone figure animal character thing object something photo picture of doing style"
)


def world_words() -> list[str]:
    """Every word of the world, once."""
    lists = (
        ACCESSORIES,
        SUBJECTS,
        HELD_OUT_SUBJECTS,
        COLORS,
        ACTIONS,
        HELD_OUT_ACTIONS,
        BACKGROUNDS,
        OBJECTS,
        HELD_OUT_OBJECTS,
    )
    phrases = [_OTHER_WORDS, *SIDES, *(phrase for names in lists for phrase in names)]
    return sorted(set(" ".join(phrases).split()))


def build_tokenizer_files(folder: Path) -> None:
    """Learn the byte pairs and write vocab.json and merges.txt."""
    characters = string.ascii_lowercase + string.digits + string.punctuation
    learner = Tokenizer(models.BPE(unk_token=END, end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        min_frequency=1,
        end_of_word_suffix="</w>",
        initial_alphabet=list(characters),
        show_progress=False,
    )
    learner.train_from_iterator(world_words(), trainer)
    learned = json.loads(learner.to_str())["model"]
    pieces = sorted(learned["vocab"], key=learned["vocab"].get)
    # Any other prompt falls apart into single characters, each of which must exist inside and at the end of a word.
    pieces += [f"{c}</w>" for c in characters if f"{c}</w>" not in learned["vocab"]]
    pieces += [START, END]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in learned["merges"]]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")


def load_tokenizer(folder: Path) -> transformers.CLIPTokenizer:
    """The CLIP tokenizer, from the two files alone, padded to 24 tokens with the end token."""
    special = {"unk_token": END, "bos_token": START, "eos_token": END, "pad_token": END}
    if int(transformers.__version__.split(".")[0]) < 5:
        files = {"vocab_file": str(folder / "vocab.json"), "merges_file": str(folder / "merges.txt")}
        return transformers.CLIPTokenizer(**files, **special, model_max_length=TOKENS)
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    merges = [tuple(line.split()) for line in lines if line]
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=merges, **special, model_max_length=TOKENS)
