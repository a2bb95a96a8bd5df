"""Chat templates of our own, by name, for a base that has none: templates/NAME.jinja.

Each encloses what the assistant says, its end included, in generation markers, and writes what its family's published
template writes. They differ in where the system's words go (a turn of its own, or before the user's first words), in
blanks at the edges (kept, or trimmed as the family does) and in the token that ends a turn:

    chatml, qwen2_vl                 <|im_end|>; pictures and videos; qwen2_vl adds "You are a helpful assistant."
    llama3                           <|eot_id|>
    gemma                            <end_of_turn>; the assistant is called model
    llama2, mistral                  the tokenizer's own end token behind "[INST] ... [/INST]"
    zephyr, alpaca, plain, llava     the tokenizer's own end token; llava writes <image>
    llava_chatml                     as qwen2_vl with <image> for a picture, as LLaVA-NeXT over Qwen2 is trained
"""

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "templates"
CHATML = ("<|im_start|>", "<|im_end|>")
VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
LLAMA3 = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
GEMMA = ("<start_of_turn>", "<end_of_turn>")
# Name -> the special tokens that the template writes, and which of them ends a turn; "": the tokenizer's own end token.
TABLE: Mapping[str, tuple[tuple[str, ...], str]] = {
    "chatml": (CHATML, "<|im_end|>"),
    "qwen2_vl": (CHATML + VISION, "<|im_end|>"),
    "llama2": ((), ""),
    "llama3": (LLAMA3, "<|eot_id|>"),
    "gemma": (GEMMA, "<end_of_turn>"),
    "mistral": ((), ""),
    "zephyr": ((), ""),
    "alpaca": ((), ""),
    "plain": ((), ""),
    "llava": (("<image>",), ""),
    "llava_chatml": ((*CHATML, "<image>"), "<|im_end|>"),
}


@dataclass(frozen=True)
class NamedTemplate:
    """One of our templates: its Jinja text, the special tokens it needs, and the one of them that ends a turn."""

    name: str
    text: str
    special_tokens: tuple[str, ...]
    end_of_turn: str  # "" where the tokenizer's own end token does it

    def lacking(self, tokenizer: Any) -> tuple[str, ...]:
        """The special tokens that a transformers tokenizer does not have, or not as special ones."""
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        missing = tuple(token for token in self.special_tokens if token not in special)
        return missing if self.end_of_turn or tokenizer.eos_token else (*missing, "eos_token")


@lru_cache(maxsize=len(TABLE))
def named(name: str) -> NamedTemplate:
    """The template of that name; ValueError with the nearest one where there is none."""
    if name not in TABLE:
        near = get_close_matches(str(name), TABLE, n=1, cutoff=0.4)
        raise ValueError(
            f"no chat template {name!r}{f', perhaps {near[0]!r}' if near else ''}: expected one of {', '.join(TABLE)}"
        )
    special_tokens, end = TABLE[name]
    return NamedTemplate(name, (FOLDER / f"{name}.jinja").read_text(encoding="utf-8"), special_tokens, end)
