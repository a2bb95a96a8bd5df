"""Conversations -> token ids and the mask of ids to learn from.

The whole conversation is rendered once by the tokenizer's own Jinja template, as transformers does when the
model is served, and tokenised once: tokenising turn by turn gives other ids where a piece could span a seam.
What the assistant says is known as spans of characters, between the template's generation markers, and mapped
to tokens.

    rendered   <|im_start|>user\\nhi<|im_end|>\\n<|im_start|>assistant\\nyes<|im_end|>\\n
    learn       0           0   0 0  0         0 0            0       0   1   1          0
"""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
import numpy as np

CHATML_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- set body -%}
{%- if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for content in message['content'] -%}
{%- if content['type'] == 'image' or 'image' in content or 'image_url' in content -%}
{{ '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- elif 'text' in content -%}
{{ content['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endset -%}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{ body + '<|im_end|>' }}{%- endgeneration -%}
{%- else -%}
{{ body + '<|im_end|>' }}
{%- endif -%}
{{ '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""
PICTURE = "<image>"  # how a message's text says where a picture stands
IMAGE_PAD = "<|image_pad|>"  # one per picture in the rendered text, then one per merged vision feature; LLaVA: PICTURE
OPEN, CLOSE = "\ufdd0", "\ufdd1"  # Unicode noncharacters: they enclose what a generation block rendered
PROBES = ("Hello world", " leading", "two  blanks", "line\nline\t1", "مرحبا بالعالم", "é 日本 🙂", "")

Encoded = tuple[np.ndarray, np.ndarray]


def load_tokenizer(folder: str | Path) -> Any:
    """The folder's AutoTokenizer, once it is found to cut text as the folder's tokenizer.json does.

    transformers may rebuild a tokenizer from the class of its model family, with other ids and no warning.
    """
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


class _Generation(jinja2.ext.Extension):
    """The template tag that transformers adds to Jinja; the block's text comes out between OPEN and CLOSE."""

    tags = frozenset({"generation"})  # pyright: ignore

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return OPEN + caller() + CLOSE


@lru_cache(maxsize=16)
def _compiled(template: str) -> Any:
    """The template, compiled with the settings, filters and functions that transformers gives it."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


@lru_cache(maxsize=16)
def _any_of(tokens: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted((*tokens, OPEN, CLOSE), key=len, reverse=True))))


class _Chat:
    """One tokenizer's template and special tokens, looked up once for a batch."""

    def __init__(self, tokenizer: Any):
        template = tokenizer.chat_template
        if not isinstance(template, str) or not template:
            raise ValueError(f"the tokenizer's chat_template is {type(template).__name__}, expected one Jinja template")
        self.tokenizer = tokenizer
        self.template = _compiled(template)
        self.marked = re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None
        self.variables = dict(tokenizer.special_tokens_map) | {"tools": None, "documents": None}
        special = {index: token.content for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.special_ids = frozenset(special)
        self.special = _any_of(tuple(special.values()))
        self.literal = _any_of(tuple(token for token in special.values() if token != PICTURE))
        known = {token.content for token in tokenizer.added_tokens_decoder.values()}
        self.place = PICTURE if PICTURE in known and IMAGE_PAD not in known else IMAGE_PAD

    def messages(self, messages: Sequence[Any], pictures: int) -> list[dict[str, Any]]:
        """Messages as templates expect them, with every "<image>" made a picture part; pictures counted."""
        found, result = 0, []
        for number, message in enumerate(messages):
            if isinstance(message, Mapping):
                role, content = message["role"], message["content"]
            else:
                role, content = message.role, message.content
            literal = self.literal.search(content) or self.literal.search(role)
            if literal:
                raise ValueError(
                    f"message {number} ({role}) holds {literal.group()!r} as text, which would become "
                    "a control token; write it differently or leave the conversation out"
                )
            if PICTURE in content:
                texts = content.split(PICTURE)
                found += len(texts) - 1
                parts: list[dict[str, str]] = []
                for text in texts:
                    parts += [{"type": "image"}] + ([{"type": "text", "text": text}] if text else [])
                content = parts[1:]
            result.append({"role": role, "content": content})
        if found != pictures:
            raise ValueError(
                f"{found} {PICTURE} placeholders but {pictures} pictures; each picture needs one placeholder"
            )
        return result

    def render(self, messages: Sequence[dict[str, Any]], prompt: bool = False) -> str:
        try:
            return self.template.render(messages=messages, add_generation_prompt=prompt, **self.variables)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template refuses the conversation: {error}") from error

    def spans(self, messages: Sequence[dict[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
        """The rendered conversation and the spans of its characters that the assistant says."""
        if not any(message["role"] == "assistant" for message in messages):
            roles = [message["role"] for message in messages]
            raise ValueError(f"no assistant turn among the roles {roles}, so there is nothing to learn")
        text, spans = self.render(messages), []
        if not self.marked:
            return text, self._differences(messages, text)
        plain, at = [], 0
        for piece in re.split(f"([{OPEN}{CLOSE}])", text):
            if piece == OPEN:
                spans.append((at, at))
            elif piece == CLOSE:
                spans[-1] = (spans[-1][0], at)
            else:
                plain.append(piece)
                at += len(piece)
        return "".join(plain), spans

    def _differences(self, messages: Sequence[dict[str, Any]], text: str) -> list[tuple[int, int]]:
        """For templates without markers: what each assistant turn adds to the prompt before it."""
        spans = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, after = self.render(messages[:number], prompt=True), self.render(messages[: number + 1])
            if not after.startswith(before) or not text.startswith(after):
                raise ValueError(
                    "the chat template has no generation markers, and what it renders around message "
                    f"{number} is no beginning of the whole; "
                    "put {% generation %} around the assistant's part"
                )
            if self.special.search(after, len(before)):
                after = after.rstrip()  # blanks behind the end of turn
            spans.append((len(before), max(len(after), len(before))))
        return spans

    def expand(
        self, text: str, spans: list[tuple[int, int]], counts: Sequence[int]
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text with each placeholder repeated for its picture, and the spans moved accordingly."""
        pieces = text.split(self.place)
        if len(pieces) - 1 != len(counts):
            raise ValueError(
                f"the chat template rendered {len(pieces) - 1} {self.place} for {len(counts)} pictures; "
                "it must write one for each image part"
            )
        if not counts:
            return text, spans
        wrong = [count for count in counts if count < 1]
        if wrong:
            raise ValueError(f"image token counts are {list(counts)}, expected at least 1 each")
        starts, at = (
            [],
            0,
        )  # where each placeholder ends in the old text, and how much the text has grown there
        for piece, count in zip(pieces, counts, strict=False):
            at += len(piece) + len(self.place)
            starts.append((at, (count - 1) * len(self.place)))

        def moved(place: int) -> int:
            return place + sum(growth for end, growth in starts if end <= place)

        joined = pieces[0] + "".join(
            self.place * count + piece for count, piece in zip(counts, pieces[1:], strict=True)
        )
        return joined, [(moved(start), moved(end)) for start, end in spans]

    def finish(self, encoding: Any, spans: Sequence[tuple[int, int]]) -> Encoded:
        """Ids and mask: a token is learnt if its first character lies in a span."""
        ids = np.array(encoding.ids, np.int32)
        offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        learn = np.zeros(len(ids), bool)
        for start, end in spans:
            inside = (offsets[:, 0] >= start) & (offsets[:, 0] < end) & (offsets[:, 1] > offsets[:, 0])
            learn |= inside
            said = ids[inside].tolist()
            if said and self.special_ids.isdisjoint(said):
                raise ValueError(
                    f"the assistant's turn at characters {start}-{end} ends in id {said[-1]} and the "
                    "end-of-turn token is not learnt, so the model would never stop; put that token inside "
                    "the template's generation block"
                )
        if not learn.any():
            raise ValueError(
                "the chat template leaves no token to learn from; put {% generation %} around what is said"
            )
        bos = self.tokenizer.bos_token_id
        if bos is not None and (ids == bos).sum() > 1:
            raise ValueError(
                f"the conversation holds {(ids == bos).sum()} beginning tokens (id {bos}), expected at most 1"
            )
        return ids, learn


def encode_chats(tokenizer: Any, chats: Sequence[tuple[Sequence[Any], Sequence[int]]]) -> list[Encoded]:
    """(ids int32, learn bool) of each (messages, image token counts); all their faults in one ValueError."""
    chat, faults = _Chat(tokenizer), {}
    texts: dict[int, tuple[str, list[tuple[int, int]]]] = {}
    for number, (messages, counts) in enumerate(chats):
        try:
            texts[number] = chat.expand(*chat.spans(chat.messages(messages, len(counts))), counts)
        except ValueError as error:
            faults[number] = str(error)
    results = []
    encodings = _encode(tokenizer, [text for text, _ in texts.values()])
    for (number, (_, spans)), encoding in zip(texts.items(), encodings, strict=True):
        try:
            results.append(chat.finish(encoding, spans))
        except ValueError as error:
            faults[number] = str(error)
    if faults and len(chats) == 1:
        raise ValueError(faults[0])
    if faults:
        shown = [f"conversation {number}: {faults[number]}" for number in sorted(faults)]
        more = [f"and {len(shown) - 20} more"] if len(shown) > 20 else []
        raise ValueError("\n".join(shown[:20] + more))
    return results


def encode_chat(tokenizer: Any, messages: Sequence[Any], image_tokens: Sequence[int] = ()) -> Encoded:
    """One conversation's ids (int32) and the mask of ids to learn from (bool).

    Messages have a role and a content (attributes or keys); "<image>" in a content is a picture, which takes
    the next count of `image_tokens` as the model's placeholder (<|image_pad|>, or LLaVA's <image>), as transformers'
    processors write it.
    """
    return encode_chats(tokenizer, [(messages, image_tokens)])[0]


def encode_prompt(tokenizer: Any, messages: Sequence[Any], image_tokens: Sequence[int] = ()) -> np.ndarray:
    """The ids (int32) after which the assistant speaks: the turns so far and the generation prompt."""
    chat = _Chat(tokenizer)
    text = chat.render(chat.messages(messages, len(image_tokens)), prompt=True)
    text, _ = chat.expand(re.sub(f"[{OPEN}{CLOSE}]", "", text), [], image_tokens)
    return np.array(_encode(tokenizer, [text])[0].ids, np.int32)


def encode_texts(tokenizer: Any, texts: Sequence[str]) -> list[np.ndarray]:
    """The ids (int32) of plain texts, nothing added; "</s>" in a text is cut like any other text."""
    backend = tokenizer.backend_tokenizer
    before, backend.encode_special_tokens = backend.encode_special_tokens, True
    try:
        return [np.array(encoding.ids, np.int32) for encoding in _encode(tokenizer, texts)]
    finally:
        backend.encode_special_tokens = before


def _encode(tokenizer: Any, texts: Sequence[str]) -> list[Any]:
    backend = tokenizer.backend_tokenizer
    assert backend.truncation is None and backend.padding is None, "the tokenizer truncates or pads"
    return backend.encode_batch(list(texts), add_special_tokens=False) if texts else []
