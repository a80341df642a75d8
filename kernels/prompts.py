"""Prompts with <name> placeholders for learned concepts."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

PLACEHOLDER = re.compile(r"<([A-Za-z0-9_.\-]+)>")
BLANK = "{}"


@dataclass(frozen=True)
class Placeholder:
    """The place of a concept's vectors inside a prompt."""

    name: str


@dataclass(frozen=True)
class Prompt:
    """A prompt cut into plain text and placeholders, in order. The text keeps its spaces."""

    parts: tuple[str | Placeholder, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the placeholders, each once, in order of appearance."""
        return tuple(dict.fromkeys(p.name for p in self.parts if isinstance(p, Placeholder)))

    @property
    def text(self) -> str:
        """The prompt as written, placeholders as <name>."""
        return "".join(p if isinstance(p, str) else f"<{p.name}>" for p in self.parts)


def parse_prompt(text: str, names: Collection[str]) -> Prompt:
    """Find the placeholders of `text`.

    names: the concepts at hand. Raises ValueError for a placeholder that is none of them, naming those there are.
    """
    parts: list[str | Placeholder] = []
    end = 0
    for match in PLACEHOLDER.finditer(text):
        name = match.group(1)
        if name not in names:
            known = ", ".join(f"<{n}>" for n in names) or "none is connected"
            raise ValueError(f"The prompt asks for <{name}>, but no concept of that name is connected ({known}).")
        parts += [text[end : match.start()], Placeholder(name)]
        end = match.end()
    parts.append(text[end:])
    return Prompt(tuple(p for p in parts if p != ""))


def fill_blank(caption: str, name: str) -> Prompt:
    """A training caption with the concept's placeholder at its blank "{}".

    Raises ValueError when the caption has no blank, or more than one.
    """
    if caption.count(BLANK) != 1:
        raise ValueError(
            f'The caption "{caption}" needs exactly one blank {BLANK} where the identifier goes, '
            f'for example "a man {BLANK} on grass"; it has {caption.count(BLANK)}.'
        )
    before, after = caption.split(BLANK)
    return Prompt(tuple(p for p in (before, Placeholder(name), after) if p != ""))
