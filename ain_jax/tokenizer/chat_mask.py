"""Which characters of a rendered conversation are learnt.

A template with generation markers says so itself. For the others the conversation is rendered once more, with marks
around the words of each message that no template looks at (Unicode noncharacters and no blanks, so that `trim` and
its like work as before). Where that text without its marks is the real one, the marks prove where the words stand:

    real     <|im_start|>user\\nhi<|im_end|>\\n<|im_start|>assistant\\nyes<|im_end|>\\n
    marked   <|im_start|>user\\n(0hi)0<|im_end|>\\n<|im_start|>assistant\\n(1yes)1<|im_end|>\\n
    learnt                                                               yes<|im_end|>

An answer begins behind the prompt that the template writes for it when the model is used (`add_generation_prompt`),
and ends behind the special token that the template also writes where the conversation ends there. Neither is a guess:
both are rendered, once for each different text that stands between two messages.
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn

from ain_jax.tokenizer.chat_marks import THOUGHT, generated, mark, rendered_elsewhere, unmark
from ain_jax.tokenizer.chat_render import OPEN, Renderer, Span, shown, texts_of

ASSISTANT = "assistant"
Messages = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class _Places:
    """Where the words of the marked messages begin and end in the rendered text, by number of the message."""

    begins: dict[int, int]
    ends: dict[int, int]
    outer: bool  # whether the marks stand around the blanks at the edges too

    @cached_property
    def in_order(self) -> list[tuple[int, int]]:
        """(place, message) of each end."""
        return sorted((place, number) for number, place in self.ends.items())

    @cached_property
    def all_places(self) -> list[int]:
        return sorted((*self.begins.values(), *self.ends.values()))

    def before(self, number: int) -> int | None:
        """Which earlier message's words end last before those of this one."""
        at = bisect_right(self.in_order, (self.begins[number], number))
        return next((earlier for _, earlier in reversed(self.in_order[:at]) if earlier < number), None)

    def behind(self, number: int, length: int) -> int:
        """Where the next mark behind a message's words stands, or the end of the text."""
        at = bisect_right(self.all_places, self.ends[number])
        return self.all_places[at] if at < len(self.all_places) else length


class Masks:
    """Finds what is learnt in conversations of one template; remembers what the template writes between messages."""

    def __init__(self, renderer: Renderer, learn: Sequence[str], last: bool):
        self.renderer, self.learn, self.last = renderer, learn, last
        self.prompts: dict[tuple[str, bool], int] = {}  # length of the prompt in a text between messages
        self.closings: dict[tuple[str, str, bool], int] = {}  # and of what ends a turn

    def spans(self, messages: Messages) -> tuple[str, list[Span]]:
        """The rendered conversation and the spans of its characters to learn from, each with its end of turn."""
        learnt = [number for number, message in enumerate(messages) if message["role"] in self.learn]
        if not learnt:
            roles = [message["role"] for message in messages]
            raise ValueError(f"no {' or '.join(self.learn)} turn among the roles {roles}, so there is nothing to learn")
        learnt = learnt[-1:] if self.last else learnt
        said = [number for number in learnt if messages[number]["role"] == ASSISTANT]
        text, blocks = generated(self.renderer.render(messages))
        marked = bool(said) and self.renderer.marked
        answers: list[Span] = self._of_template(messages, text, blocks, said[-1]) if marked else []
        by_number = self._by_marks(messages, text, [n for n in learnt if not (marked and n in said)])
        answers += [span for number, span in by_number.items() if number in said]
        for start, end in answers:
            if not text[start:end].rstrip().endswith(self.renderer.ends):
                raise ValueError(
                    f"the assistant's turn at characters {start}-{end} ends in {text[start:end][-20:]!r} and the "
                    "end-of-turn token is not learnt, so the model would never stop; put that token inside the "
                    f"template's generation block, or name another template: {shown(text, start, end)!r}"
                )
        if said:
            self._refuse_lost_thoughts(messages, text, said[-1])
        return text, sorted({*answers, *by_number.values()})

    def _of_template(self, messages: Messages, text: str, blocks: list[Span], final: int) -> list[Span]:
        """The spans between the template's own markers; of the answer `final` alone where only the last is learnt."""
        filled: list[Span] = []
        for start, end in blocks:
            if filled and filled[-1][1] == start:  # one turn in two blocks, its words and its end
                filled[-1] = (filled[-1][0], end)
            elif end > start:
                filled.append((start, end))
        if self.last and len(filled) != sum(message["role"] == ASSISTANT for message in messages):
            places = self._marked(messages, text, range(final))
            if places is None:
                self._refuse_unmarked(text)
            before = max((end for number, end in places.ends.items() if number < final), default=0)
            filled = [span for span in filled if span[0] >= before]
        elif self.last:
            filled = filled[-1:]
        if not filled:
            raise ValueError(
                "the chat template leaves no token to learn from; put {% generation %} around what is said: "
                f"{shown(text, 0, len(text))!r}"
            )
        self._refuse_left_out(messages, text)
        return filled

    def _by_marks(self, messages: Messages, text: str, learnt: Sequence[int]) -> dict[int, Span]:
        """The span of each of these messages."""
        if not learnt:
            return {}
        places = self._marked(messages, text, learnt)
        if places is None:
            if any(messages[number]["role"] != ASSISTANT for number in learnt):
                self._refuse_unmarked(text)
            return self._by_prefixes(messages, text, learnt)
        spans = {}
        for number in learnt:
            if number not in places.begins or number not in places.ends:
                if any(part.strip() for part in texts_of(messages[number])):
                    self._refuse_message(messages, text, number)
                raise ValueError(
                    f"message {number} ({messages[number]['role']}) has no words, and where it stands in the rendered "
                    f"text cannot be told; leave it out: {shown(text, 0, len(text))!r}"
                )
            said = messages[number]["role"] == ASSISTANT
            start = self._start(messages, text, number, places) if said else places.begins[number]
            spans[number] = (start, self._end(messages, text, number, places))
        return spans

    def _marked(self, messages: Messages, text: str, learnt: Iterable[int]) -> _Places | None:
        """Where in `text` the words of messages stand, proved by rendering them with marks; None where that fails.

        Three tries: all messages with the blanks at their edges, all without these, and only those that are learnt.
        """
        everyone, tried = range(len(messages)), []
        for numbers, outer in ((everyone, True), (everyone, False), (list(learnt), False)):
            with_marks = [mark(m, k, outer) if k in numbers else m for k, m in enumerate(messages)]
            if with_marks in tried:
                continue
            tried.append(with_marks)
            try:
                plain, begins, ends = unmark(self.renderer.render(with_marks))
            except ValueError:
                continue
            if plain != text:
                continue
            for number in numbers:
                there = number in begins and number in ends
                if not there and any(part.strip() for part in texts_of(messages[number])):
                    self._refuse_message(messages, text, number)
            if len(numbers) < len(messages):
                self._refuse_left_out(messages, text)
            return _Places(begins, ends, outer)
        return None

    def _refuse_unmarked(self, text: str) -> NoReturn:
        raise ValueError(
            "the chat template has no generation markers for what is to be learnt, and it changes the words in a way "
            "that leaves no trace of where they stand; put {% generation %} around the assistant's part: "
            f"{shown(text, 0, len(text))!r}"
        )

    def _start(self, messages: Messages, text: str, number: int, places: _Places) -> int:
        """Where an answer begins: behind the prompt that the template writes for it."""
        earlier, words = places.before(number), places.begins[number]
        anchor = 0 if earlier is None else places.ends[earlier]
        between = text[anchor:words]
        key = (between, earlier is None)
        if key not in self.prompts:
            prompt = self._tail(messages[:number], earlier, places.outer, prompt=True)
            if prompt is None and between.endswith(self._usual_prompt() or OPEN):
                prompt = between
            met = 0 if prompt is None else _common(prompt, between)
            # A prompt may say more than a conversation repeats ("<think>\n"), but nothing else may stand there.
            if prompt is None or (met < len(prompt) and between[met:].strip()):
                raise ValueError(
                    f"the chat template has no generation markers, and its prompt for message {number} is no beginning "
                    f"of what it renders there ({prompt!r}, {between!r}); put {{% generation %}} around the "
                    f"assistant's part: {shown(text, anchor, words)!r}"
                )
            self.prompts[key] = met
        return anchor + self.prompts[key]

    def _end(self, messages: Messages, text: str, number: int, places: _Places) -> int:
        """Where a turn ends: behind the special token that closes it, or with its words where there is none."""
        words, final = places.ends[number], number + 1 == len(messages)
        behind = text[words : places.behind(number, len(text))]
        key = (messages[number]["role"], behind, final)
        if key not in self.closings:
            alone = behind if final else self._tail(messages[: number + 1], number, places.outer, prompt=False)
            closing = behind[: _common(alone or "", behind)]
            match, eos = self.renderer.end.search(closing), self.renderer.eos
            length = match.end() if match else 0
            if match and eos and match.group() != eos and closing.startswith(eos, length):
                length += len(eos)
            self.closings[key] = length
        return words + self.closings[key]

    def _tail(self, messages: Messages, number: int | None, outer: bool, prompt: bool) -> str | None:
        """What is rendered behind the words of the message `number`; None where it cannot be told."""
        for edges in dict.fromkeys((outer, False)):  # as the last, a message may lose blanks that it keeps elsewhere
            with_marks = [mark(message, k, edges) if k == number else message for k, message in enumerate(messages)]
            try:
                plain, _, ends = unmark(self.renderer.render(with_marks, prompt))
                if plain != generated(self.renderer.render(messages, prompt))[0]:
                    continue
            except ValueError:
                continue
            if number is None:
                return plain
            if number in ends:
                last = texts_of(messages[number])[-1]
                blanks = last[len(last.rstrip()) :] if outer and not edges else ""
                return plain[ends[number] :].removeprefix(blanks)
        return None

    def _usual_prompt(self) -> str:
        """The prompt behind a user's words, where the template adds one."""
        probe = [{"role": "user", "content": "a"}]
        try:
            without, whole = (generated(self.renderer.render(probe, prompt))[0] for prompt in (False, True))
        except ValueError:
            return ""
        return whole[len(without) :] if whole.startswith(without) else ""

    def _by_prefixes(self, messages: Messages, text: str, learnt: Sequence[int]) -> dict[int, Span]:
        """What each answer adds to the prompt before it, where the whole begins with either."""
        spans = {}
        for number in learnt:
            before, _ = generated(self.renderer.render(messages[:number], prompt=True))
            after, _ = generated(self.renderer.render(messages[: number + 1]))
            if not after.startswith(before) or not text.startswith(after):
                raise ValueError(
                    "the chat template has no generation markers, and what it renders around message "
                    f"{number} is no beginning of the whole; put {{% generation %}} around the assistant's part: "
                    f"{shown(text, 0, len(text))!r}"
                )
            spans[number] = (len(before), max(len(after.rstrip()), len(before)))
        self._refuse_left_out(messages, text)
        return spans

    def _refuse_left_out(self, messages: Messages, text: str) -> None:
        """Refuse a template that leaves out a message."""
        for number, message in enumerate(messages):
            words = [part.rpartition(THOUGHT)[2].strip() for part in texts_of(message)]
            if not all(part in text for part in words) and not rendered_elsewhere(self.renderer, messages, number):
                self._refuse_message(messages, text, number)

    def _refuse_message(self, messages: Messages, text: str, number: int) -> NoReturn:
        content = " ".join(texts_of(messages[number]))
        raise ValueError(
            f"the chat template leaves out message {number} ({messages[number]['role']}), or a part of it: "
            f"{shown(content, 0, len(content))!r} is not in {shown(text, 0, len(text))!r}; take it out of the record "
            "or name another template"
        )

    def _refuse_lost_thoughts(self, messages: Messages, text: str, number: int) -> None:
        """Refuse a template that leaves out the thoughts of the very last answer: nobody would learn to think."""
        content = messages[number]["content"]
        if number + 1 < len(messages) or not isinstance(content, str) or THOUGHT not in content:
            return
        thought = content.rpartition(THOUGHT)[0].rpartition("<think>")[2].strip()
        if thought and thought not in text:
            raise ValueError(
                f"the chat template leaves out the thoughts of message {number} (assistant): {thought[:60]!r} is not "
                f"in {shown(text, 0, len(text))!r}; take the thoughts out of the record or name another template"
            )


def _common(one: str, other: str) -> int:
    """How many characters two texts have in common at their beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))
