"""Messages -> rendered text, by a Jinja template as transformers runs it; pictures and videos counted and repeated."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

IMAGE, VIDEO = "<image>", "<video>"  # how a message's text says where a picture or a video stands
PADS = {"image": "<|image_pad|>", "video": "<|video_pad|>"}  # what stands there in rendered text; LLaVA: IMAGE, VIDEO
AROUND = ("<|vision_start|>", "<|vision_end|>")
OPEN, CLOSE = "\ufdd0", "\ufdd1"  # Unicode noncharacters: they enclose what a generation block rendered
OURS = "\ufdd0-\ufdef"  # all noncharacters of that block; `chat_mask` writes others of them
PLACES = re.compile(f"({re.escape(IMAGE)}|{re.escape(VIDEO)})")
SHOWN = 60  # characters shown on either side of a fault

Span = tuple[int, int]


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
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template is no Jinja template: {error}") from error


@lru_cache(maxsize=64)
def any_of(tokens: tuple[str, ...]) -> re.Pattern[str]:
    """A pattern that finds any of these strings, the longest first."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)")


def shown(text: str, start: int, end: int | None = None) -> str:
    """A text's part from start to end and what stands around it, shortened, for a message."""
    end = start if end is None else end
    left, right = max(start - SHOWN, 0), min(end + SHOWN, len(text))
    part = text[left:right]
    if len(part) > 4 * SHOWN:
        part = f"{part[: 2 * SHOWN]} [...] {part[-2 * SHOWN :]}"
    return f"{'...' if left else ''}{part}{'...' if right < len(text) else ''}"


class Renderer:
    """One tokenizer's template and special tokens, looked up once for a batch."""

    def __init__(self, tokenizer: Any, template: str = ""):
        found = template or tokenizer.chat_template
        if isinstance(found, Mapping):  # several by name; transformers takes this one where there are no tools
            found = found.get("default")
        if not isinstance(found, str) or not found:
            raise ValueError(
                f"the tokenizer's chat_template is {type(found).__name__}, expected one Jinja template; name one by "
                "Chat.template"
            )
        self.template = _compiled(found)
        self.marked = re.search(r"\{%-?\s*generation\s*-?%\}", found) is not None
        now = datetime.now()  # one date for all that is rendered here, also where midnight passes
        self.variables = dict(tokenizer.special_tokens_map) | {"tools": None, "documents": None}
        self.variables["strftime_now"] = lambda form: now.strftime(form)
        added = {token.content: token.special for token in tokenizer.added_tokens_decoder.values()}
        special = tuple(token for token, is_special in added.items() if is_special)
        self.bos, self.eos = tokenizer.bos_token, tokenizer.eos_token
        llava = IMAGE in added and PADS["image"] not in added
        self.pads = {"image": IMAGE, "video": VIDEO} if llava else PADS
        self.pad_ids = {kind: tokenizer.convert_tokens_to_ids(pad) for kind, pad in self.pads.items() if pad in added}
        media = {*self.pads.values(), *AROUND}
        self.special = special
        self.ends = tuple(token for token in special if token not in media)  # what may end a turn
        self.end = any_of(self.ends)
        literal = any_of(tuple(token for token in special if token not in (IMAGE, VIDEO))).pattern
        self.literal = re.compile(f"{literal}|[{OURS}]")
        # Most texts hold no character that such a token begins with; to look for one character is much cheaper.
        self.may_be_literal = re.compile(f"[{''.join(re.escape(token[0]) for token in special if token)}{OURS}]")
        self.pad = any_of(tuple(self.pads.values()))

    def messages(self, messages: Sequence[Any], count: int) -> tuple[list[dict[str, Any]], list[str]]:
        """Messages as templates expect them, each placeholder a part of its own, and the placeholders' kinds in order.

        count: how many pictures and videos there are
        """
        kinds: list[str] = []
        result: list[dict[str, Any]] = []
        for number, message in enumerate(messages):
            known = isinstance(message, Mapping)
            role, content = (message.get(k) if known else getattr(message, k, None) for k in ("role", "content"))
            if not isinstance(role, str) or not isinstance(content, str):
                raise ValueError(f"message {number} has the role {role!r} and the content {content!r}, expected texts")
            literal = self._literal(content) or self._literal(role)
            if literal:
                raise ValueError(
                    f"message {number} ({role}) holds {literal.group()!r} as text, which would become a control token; "
                    "write it differently or leave the conversation out: "
                    f"{shown(literal.string, literal.start(), literal.end())!r}"
                )
            if IMAGE in content or VIDEO in content:
                parts: list[dict[str, str]] = []
                for piece in PLACES.split(content):
                    if piece in (IMAGE, VIDEO):
                        kinds.append("image" if piece == IMAGE else "video")
                        parts.append({"type": kinds[-1]})
                    elif piece:
                        parts.append({"type": "text", "text": piece})
                content = parts
            result.append({"role": role, "content": content})
        if len(kinds) != count:
            videos = kinds.count("video")
            found = f"{len(kinds) - videos} {IMAGE}" + (f" and {videos} {VIDEO}" if videos else "")
            given = f"{count} pictures" + (" and videos" if videos else "")
            raise ValueError(f"{found} placeholders but {given}; each picture needs one placeholder")
        absent = sorted({self.pads[kind] for kind in kinds if kind not in self.pad_ids})
        if absent:
            raise ValueError(
                f"the tokenizer has no token {', '.join(absent)}, which would stand for a picture; give a model's "
                "tokenizer that sees, or add the template qwen2_vl or llava"
            )
        return result, kinds

    def _literal(self, text: str) -> re.Match[str] | None:
        begin = self.may_be_literal.search(text)
        return self.literal.search(text, begin.start()) if begin else None

    def render(self, messages: Sequence[dict[str, Any]], prompt: bool = False) -> str:
        """The text of messages; with prompt, what then makes the assistant speak."""
        try:
            return self.template.render(messages=messages, add_generation_prompt=prompt, **self.variables)
        except Exception as error:  # Jinja's own, and any that a template's expressions raise
            parts = [k for k, message in enumerate(messages) if not isinstance(message["content"], str)]
            hint = ""
            if parts and not isinstance(error, jinja2.TemplateError):
                hint = f"; message {parts[0]} holds a picture or video, and the template seems to take text alone"
            raise ValueError(f"the chat template refuses the conversation: {error}{hint}") from error

    def expand(
        self, text: str, spans: Sequence[Span], kinds: Sequence[str], counts: Sequence[int], messages: Sequence[Any]
    ) -> tuple[str, list[Span]]:
        """The text with each placeholder repeated for its picture or video, and the spans moved accordingly."""
        wrong = [count for count in counts if count < 1]
        if wrong:
            raise ValueError(f"image token counts are {list(counts)}, expected at least 1 each")
        found = list(self.pad.finditer(text))
        expected = [self.pads[kind] for kind in kinds]
        if [match.group() for match in found] != expected:
            self._refuse_places([match.group() for match in found], expected, messages, text)
        if not found:
            return text, list(spans)
        pieces, ends, grown, at = [], [], [], 0
        for match, count in zip(found, counts, strict=True):
            pieces += [text[at : match.start()], match.group() * count]
            at = match.end()
            ends.append(at)
            grown.append((count - 1) * len(match.group()))

        def moved(place: int) -> int:
            return place + sum(growth for end, growth in zip(ends, grown, strict=True) if end <= place)

        return "".join((*pieces, text[at:])), [(moved(start), moved(end)) for start, end in spans]

    def _refuse_places(self, found: list[str], expected: list[str], messages: Sequence[Any], text: str) -> None:
        if sorted(found) == sorted(expected):
            raise ValueError(f"the chat template renders {found} where the messages hold {expected}, in another order")
        told = "".join(
            f"; message {number} ({message['role']}) holds one"
            for number, message in enumerate(messages)
            if message["role"] != "user" and not isinstance(message["content"], str)
        )
        videos = expected.count(self.pads["video"])
        pictures = f"{len(expected) - videos} pictures" + (f" and {videos} videos" if videos else "")
        written = " and ".join(
            f"{found.count(pad)} {pad}" for kind, pad in self.pads.items() if kind == "image" or videos or pad in found
        )
        raise ValueError(
            f"the chat template rendered {written} for {pictures}; it must write one for each "
            f"part{told}: {shown(text, 0, 2 * SHOWN)!r}"
        )


def texts_of(message: Mapping[str, Any]) -> list[str]:
    """The texts of a message, its pictures left out."""
    content: str | Iterable[Mapping[str, str]] = message["content"]
    return [content] if isinstance(content, str) else [part["text"] for part in content if "text" in part]
