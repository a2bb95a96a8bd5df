"""Conversations -> token ids and the mask of ids to learn from.

The whole conversation is rendered once by the tokenizer's own Jinja template, as transformers does when the model is
served, and tokenised once: tokenising turn by turn gives other ids where a piece could span a seam. What is learnt is
known as spans of characters (`chat_mask`), and mapped to tokens.

    rendered   <|im_start|>user\\nhi<|im_end|>\\n<|im_start|>assistant\\nyes<|im_end|>\\n
    learn       0           0   0 0  0         0 0            0       0   1   1          0
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ain_jax.tokenizer import templates
from ain_jax.tokenizer.chat_marks import generated
from ain_jax.tokenizer.chat_mask import Masks
from ain_jax.tokenizer.chat_render import Renderer, Span, shown
from ain_jax.tokenizer.chat_tokens import encode, encode_spans

CHATML_TEMPLATE = templates.named("chatml").text
PROBES = ("Hello world", " leading", "two  blanks", "line\nline\t1", "مرحبا بالعالم", "é 日本 🙂", "")
ROLES = ("system", "user", "assistant")

Encoded = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Chat:
    """How conversations are written, and which of their words are learnt.

    Of answers that are compared or judged (pairs, verdicts) it is always the assistant's last turn alone.
    """

    template: str = ""  # "" is the tokenizer's own; or one of ours by name: chatml, llama2, llama3, gemma ...
    learn: tuple[str, ...] = ("assistant",)  # the roles whose words are learnt, each with the end of its turn
    turns: Literal["all", "last"] = "all"  # of these roles' turns
    # Tokens learnt wherever they stand, in anyone's turn, each one token of the vocabulary. Pangea's loader does so
    # with ("<|im_start|>", "<|im_end|>", "\n"), by which the marks of users' turns are learnt too.
    also_learn: tuple[str, ...] = ()

    def __post_init__(self):
        faults = []
        if self.template:
            try:
                templates.named(self.template)
            except ValueError as error:
                faults.append(f"template: {error}")
        if isinstance(self.learn, str) or not self.learn:
            faults.append(f"learn = {self.learn!r}: expected one or more roles, as in ('assistant',)")
        else:
            for role in self.learn:
                near = get_close_matches(str(role), ROLES, n=1, cutoff=0.3)
                if role not in ROLES:
                    hint = f", perhaps {near[0]!r}" if near else ""
                    faults.append(
                        f"learn = {self.learn!r}: no role {role!r}, expected some of {', '.join(ROLES)}{hint}"
                    )
            if len(set(self.learn)) < len(self.learn):
                faults.append(f"learn = {self.learn!r}: a role is named twice")
        if isinstance(self.also_learn, str) or not all(self.also_learn):
            faults.append(f"also_learn = {self.also_learn!r}: expected tokens, as in ('<|im_end|>',), or ()")
        if self.turns not in ("all", "last"):
            faults.append(f"turns = {self.turns!r}: expected 'all' or 'last'")
        if faults:
            raise ValueError("Chat: " + "; ".join(faults))


def load_tokenizer(folder: str | Path) -> Any:
    """The folder's AutoTokenizer, once it is found to cut text as the folder's tokenizer.json does.

    transformers may rebuild a tokenizer from the class of its model family, with other ids and no warning.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that torch is not there
    import tokenizers
    from transformers import AutoTokenizer

    folder = Path(folder)
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(f"{folder} has no tokenizer.json; give the folder that the tokenizer extension wrote")
    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    of_processor = folder / "chat_template.json"  # where older folders of models that see keep it
    if tokenizer.chat_template is None and of_processor.is_file():
        tokenizer.chat_template = json.loads(of_processor.read_text(encoding="utf-8")).get("chat_template")
    written = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    if len(tokenizer) != written.get_vocab_size():
        raise ValueError(f"{folder}: AutoTokenizer has {len(tokenizer)} ids, tokenizer.json {written.get_vocab_size()}")
    special = {token.content for token in written.get_added_tokens_decoder().values()}
    special |= set(tokenizer.all_special_tokens)
    for text in (*PROBES, *(f"{token} a {token}" for token in sorted(special))):
        ours = written.encode(text, add_special_tokens=False).ids
        theirs = tokenizer.encode(text, add_special_tokens=False)
        if ours != theirs:
            raise ValueError(
                f"{folder}: AutoTokenizer ({type(tokenizer).__name__}) cuts {text!r} into {theirs}, tokenizer.json "
                f"into {ours}. In tokenizer_config.json tokenizer_class must be PreTrainedTokenizerFast; where it is, "
                "transformers takes the class of the model's family for any tokenizer: such a model can only be "
                "written with its family's own kind of tokenizer"
            )
    return tokenizer


def encode_chats(
    tokenizer: Any, chats: Sequence[tuple[Sequence[Any], Sequence[int]]], settings: Chat = Chat()
) -> list[Encoded]:
    """(ids int32, learn bool) of each (messages, counts); all their faults in one ValueError.

    counts: how many tokens each picture and each video takes, in the order in which "<image>" and "<video>" stand.
    The ids are those of transformers' `apply_chat_template`, and so is the mask where the template has generation
    markers; only the places of pictures and videos are never learnt, since no model says them.
    """
    renderer, faults = _renderer(tokenizer, settings), {}
    masks = Masks(renderer, settings.learn, settings.turns == "last")
    texts: dict[int, tuple[str, list[Span]]] = {}
    also = _also_learnt(tokenizer, settings)
    for number, (messages, counts) in enumerate(chats):
        try:
            parts, kinds = renderer.messages(messages, len(counts))
            texts[number] = renderer.expand(*masks.spans(parts), kinds, counts, parts)
        except ValueError as error:
            faults[number] = str(error)
    results = []
    for (number, (text, _)), found in zip(texts.items(), encode_spans(tokenizer, list(texts.values())), strict=True):
        try:
            results.append(_finish(tokenizer, renderer, text, *found, chats[number][1], also))
        except ValueError as error:
            faults[number] = str(error)
    if faults and len(chats) == 1:
        raise ValueError(faults[0])
    if faults:
        told = [f"conversation {number}: {faults[number]}" for number in sorted(faults)]
        more = [f"and {len(told) - 20} more"] if len(told) > 20 else []
        raise ValueError("\n".join(told[:20] + more))
    return results


def encode_chat(
    tokenizer: Any, messages: Sequence[Any], image_tokens: Sequence[int] = (), settings: Chat = Chat()
) -> Encoded:
    """One conversation's ids (int32) and the mask of ids to learn from (bool).

    Messages have a role and a content (attributes or keys); "<image>" and "<video>" in a content are a picture and a
    video, which take the next count of `image_tokens` as the model's placeholder (<|image_pad|>, <|video_pad|>, or
    LLaVA's <image>), as transformers' processors write it.
    """
    return encode_chats(tokenizer, [(messages, image_tokens)], settings)[0]


def encode_prompt(
    tokenizer: Any, messages: Sequence[Any], image_tokens: Sequence[int] = (), settings: Chat = Chat()
) -> np.ndarray:
    """The ids (int32) after which the assistant speaks: the turns so far and the generation prompt."""
    renderer = _renderer(tokenizer, settings)
    parts, kinds = renderer.messages(messages, len(image_tokens))
    text, _ = generated(renderer.render(parts, prompt=True))
    text, _ = renderer.expand(text, [], kinds, image_tokens, parts)
    return np.array(encode(tokenizer, [text])[0].ids, np.int32)


def end_of_turn(tokenizer: Any, settings: Chat = Chat()) -> str:
    """The special token that ends an answer in the template: where generation has to stop.

    ValueError for a template that writes none.
    """
    renderer = _renderer(tokenizer, settings)
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    text, spans = Masks(renderer, ("assistant",), True).spans(talk)
    found = renderer.end.findall(text[spans[-1][0] : spans[-1][1]])
    return found[0]


def encode_texts(tokenizer: Any, texts: Sequence[str]) -> list[np.ndarray]:
    """The ids (int32) of plain texts, nothing added; "</s>" in a text is cut like any other text."""
    backend = tokenizer.backend_tokenizer
    before, backend.encode_special_tokens = backend.encode_special_tokens, True
    try:
        return [np.array(encoding.ids, np.int32) for encoding in encode(tokenizer, texts)]
    finally:
        backend.encode_special_tokens = before


def _renderer(tokenizer: Any, settings: Chat) -> Renderer:
    if not settings.template:
        return Renderer(tokenizer)
    template = templates.named(settings.template)
    lacking = template.lacking(tokenizer)
    if lacking:
        raise ValueError(
            f"Chat.template = {settings.template!r} needs the special tokens {', '.join(lacking)}, and the tokenizer "
            "has none of that name: add them with ain_jax.tokenizer.with_template"
        )
    return Renderer(tokenizer, template.text)


def _also_learnt(tokenizer: Any, settings: Chat) -> list[int]:
    """The ids of `also_learn`; ValueError for what is not one token."""
    found = [encode(tokenizer, [text])[0].ids for text in settings.also_learn]
    wrong = [f"{text!r} ({len(ids)})" for text, ids in zip(settings.also_learn, found, strict=True) if len(ids) != 1]
    if wrong:
        raise ValueError(f"Chat.also_learn: expected single tokens, and this tokenizer cuts {', '.join(wrong)}")
    return [ids[0] for ids in found]


def _finish(
    tokenizer: Any,
    renderer: Renderer,
    text: str,
    ids: np.ndarray,
    learn: np.ndarray,
    counts: Sequence[int],
    also: Sequence[int],
) -> Encoded:
    """Ids and mask without the places of pictures, once nothing is found wrong with them."""
    places = np.zeros(len(ids), bool)
    for pad in renderer.pad_ids.values():
        places |= ids == pad
    if places.sum() != sum(counts):
        raise ValueError(
            f"{places.sum()} places for pictures among the ids and {sum(counts)} expected ({list(counts)}): the "
            f"tokenizer does not keep {' and '.join(renderer.pads.values())} whole"
        )
    learn = (learn | np.isin(ids, also)) & ~places
    if not learn.any():
        raise ValueError(
            "the chat template leaves no token to learn from; put {% generation %} around what is said: "
            f"{shown(text, 0, len(text))!r}"
        )
    if tokenizer.bos_token_id is not None and (ids == tokenizer.bos_token_id).sum() > 1:
        _refuse_second_bos(renderer, text)
    return ids, learn


def _refuse_second_bos(renderer: Renderer, text: str) -> None:
    """A beginning token may open a turn anew (Llama-2), right behind the end of one, and stand nowhere else."""
    at = text.find(renderer.bos)
    while (at := text.find(renderer.bos, at + 1)) >= 0:
        before = text[:at].rstrip()
        if before.endswith(renderer.bos) or not before.endswith(renderer.ends):
            raise ValueError(
                f"the conversation holds {text.count(renderer.bos)} beginning tokens {renderer.bos!r}, one of them at "
                f"character {at}, which is neither the beginning nor behind an end of turn: "
                f"{shown(text, at, at + len(renderer.bos))!r}"
            )
