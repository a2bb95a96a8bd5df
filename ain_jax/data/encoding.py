"""Records -> ids and masks, one batch at a time, and what becomes of a record that no row holds or that is at fault."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ain_jax.data import visuals
from ain_jax.data.formats import IMAGE, VIDEO, Record
from ain_jax.data.packing import Packing
from ain_jax.data.positions import Grid
from ain_jax.data.visuals import PictureSettings
from ain_jax.tokenizer import chat
from ain_jax.tokenizer.chat import Chat


@dataclasses.dataclass(frozen=True)
class Encoder:
    """How records become sequences."""

    tokenizer: Any
    settings: PictureSettings | None
    packing: Packing
    chat: Chat = dataclasses.field(default_factory=Chat)

    @property
    def budgets(self) -> tuple[int, int, int]:
        """Tokens, patches and learnt tokens that an example may have; 0 patches: no such bound here."""
        tokens, patches, targets = self.packing.budgets.tolist()
        return tokens, patches, targets

    @property
    def window(self) -> int:
        """Tokens of the longest stretch of plain text; its first is not learnt."""
        tokens, _, targets = self.budgets
        return min(tokens, targets + 1)


@dataclasses.dataclass(frozen=True)
class Item:
    """One example to be: a sequence, or two of a preference pair or of a judged answer."""

    sequences: Sequence[chat.Encoded]
    grids: Sequence[Grid]

    @property
    def size(self) -> tuple[int, int, int]:
        """Tokens, patches, learnt tokens; nothing stands before the first token, so that it is never learnt."""
        tokens = sum(len(ids) for ids, _ in self.sequences)
        patches = len(self.sequences) * sum(frames * rows * columns for frames, rows, columns in self.grids)
        return tokens, patches, sum(int(learn[1:].sum()) for _, learn in self.sequences)


class Rejects:
    """What was left out or cut, counted, and written as lines of JSON: record, what was done, why."""

    def __init__(self, path: Path, bad_share: float, records: int):
        self.path, self.most_bad = path, bad_share * records
        self.counts = {"bad": 0, "dropped": 0, "split": 0}

    def add(self, record: Record, done: str, why: str) -> None:
        """`done` is "bad" (at fault), "dropped" or "split". Raises ValueError when too many are at fault."""
        self.counts[done] += 1
        line = {"record": record.id, "done": done, "reason": why}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        if self.counts["bad"] > self.most_bad:
            others = self.counts["bad"] - 1
            more = f" ({others} more at fault before it; no more than {int(self.most_bad)} may be)" if others else ""
            raise ValueError(why + more)


def encode_batch(batch: Sequence[Record], encoder: Encoder, rejects: Rejects) -> Iterator[tuple[int, list[Item]]]:
    """(place in the batch, its examples) of each record: plain texts first, then conversations.

    A judged answer comes as one sequence: what is laid beside it is not known yet (`judged.py`).
    """
    texts = [(i, r) for i, r in enumerate(batch) if not r.messages]
    for (i, record), ids in zip(texts, encode_documents(encoder.tokenizer, [r.text for _, r in texts]), strict=True):
        cut = list(windows(ids, encoder.window, encoder.packing.windows))
        if not cut:
            rejects.add(record, "dropped", f"record {record.id}: a text without a single token")
        yield i, [Item([(window, np.ones(len(window), bool))], []) for window in cut]
    chats = [(i, r) for i, r in enumerate(batch) if r.messages]
    items = _encoded([r for _, r in chats], encoder, lambda record, why: rejects.add(record, "bad", why))
    for (i, record), item in zip(chats, items, strict=True):
        if item is not None:
            yield i, kept(record, item, encoder, rejects)


def kept(record: Record, item: Item, encoder: Encoder, rejects: Rejects) -> list[Item]:
    """The example where a row holds it, else what is kept of it."""
    return [item] if fits(item, encoder) else _too_long(record, item, encoder, rejects)


def fits(item: Item, encoder: Encoder) -> bool:
    """Whether a row holds the example."""
    return all(size <= budget or not budget for size, budget in zip(item.size, encoder.budgets, strict=True))


def _too_long(record: Record, item: Item, encoder: Encoder, rejects: Rejects) -> list[Item]:
    """What is kept of a conversation that no row holds: nothing, or its parts."""
    why = f"record {record.id}: {_excess(item, encoder)}"
    if encoder.packing.too_long == "refuse":
        raise ValueError(
            f"{why}: raise Packing's budget, use smaller pictures, or leave the record out: "
            'Packing.too_long = "drop" or "split" (nothing is cut from a conversation unasked)'
        )
    if encoder.packing.too_long == "split":
        parts, fault = split(record, encoder)
        if parts:
            rejects.add(record, "split", f"{why}; cut into {len(parts)} conversations before turns of the user")
            return parts
        why += f"; not cut: {fault}"
    rejects.add(record, "dropped", why)
    return []


def _excess(item: Item, encoder: Encoder) -> str:
    names = ("tokens", "patches", "learnt tokens")
    return " and ".join(
        f"{size} {name}, and a row holds {budget}"
        for size, budget, name in zip(item.size, encoder.budgets, names, strict=True)
        if budget and size > budget
    )


def split(record: Record, encoder: Encoder) -> tuple[list[Item], str]:
    """(conversations that a row holds, "") cut from one that is too long, or ([], why not).

    A cut lies before a turn of the user behind which no picture or video is spoken of any more that stood before it:
    that is, none stands before the cut. The system's message opens each part. What is learnt stays what it was.
    """
    if record.rejected or record.desirable is not None:
        return [], "one answer is judged, with all that stands before it"
    if encoder.chat.turns == "last":
        return [], "the last turn alone is learnt"
    head = record.messages[:1] if record.messages[0].role == "system" else ()
    turns = record.messages[len(head) :]
    begins = [i for i, message in enumerate(turns) if message.role == "user"][1:]
    seen = [IMAGE in m.content or VIDEO in m.content for m in (*head, *turns)]
    cuts = [begin for begin in begins if not any(seen[: len(head) + begin])]
    if not cuts:
        reason = "a picture stands before every turn of the user" if begins else "it has a single turn of the user"
        return [], reason
    ends, parts, begin = [*cuts, len(turns)], [], 0
    while begin < len(turns):
        found = None
        for end in [e for e in ends if e > begin]:
            last = end == len(turns)
            media = {} if last else {"images": (), "videos": ()}
            part = dataclasses.replace(record, messages=(*head, *turns[begin:end]), **media)
            faults: list[str] = []
            (item,) = _encoded([part], encoder, lambda _, why, told=faults: told.append(why))
            if item is None:
                return [], faults[0]
            if not fits(item, encoder):
                break
            found = end, item
        if found is None:
            return [], "one turn with what must stay beside it is longer than a row"
        begin = found[0]
        parts.append(found[1])
    return parts, ""


def _encoded(records: Sequence[Record], encoder: Encoder, fault: Callable[[Record, str], None]) -> list[Item | None]:
    """The example of each conversation; None where one is at fault, which is told."""
    measured: list[tuple[list[Grid], list[int]] | None] = []
    for record in records:
        try:
            measured.append(visuals.measured(record, encoder.settings))
        except ValueError as error:
            fault(record, str(error))
            measured.append(None)
    asked = []  # one for each sequence: record, messages, counts
    for k, (record, found) in enumerate(zip(records, measured, strict=True)):
        if found is not None:
            asked.append((k, (record.messages, found[1])))
            if record.rejected:
                asked.append((k, (_with_rejected(record).messages, found[1])))
    encoded: list[list[chat.Encoded] | None] = [[] for _ in records]
    for last in (False, True):
        # Of answers that are judged or compared the earlier turns are no part, whatever else is learnt from.
        alone = {"learn": ("assistant",), "turns": "last", "also_learn": ()}
        settings = dataclasses.replace(encoder.chat, **alone) if last else encoder.chat
        chosen = [(k, a) for k, a in asked if (bool(records[k].rejected) or records[k].desirable is not None) == last]
        if last and not chosen:
            continue
        try:
            results: Sequence[chat.Encoded | None] = chat.encode_chats(
                encoder.tokenizer, [a for _, a in chosen], settings
            )
        except ValueError:  # again one by one, to know whose it is
            results = [_alone(records[k], a, encoder.tokenizer, settings, fault) for k, a in chosen]
        for (k, _), result in zip(chosen, results, strict=True):
            of_record = encoded[k]
            if result is None or of_record is None:
                encoded[k] = None
            else:
                of_record.append(result)
    return [
        Item(sequences, found[0]) if found is not None and sequences else None
        for found, sequences in zip(measured, encoded, strict=True)
    ]


def _alone(
    record: Record, asked: Any, tokenizer: Any, settings: Chat, fault: Callable[[Record, str], None]
) -> chat.Encoded | None:
    try:
        return chat.encode_chats(tokenizer, [asked], settings)[0]
    except ValueError as error:
        fault(record, f"record {record.id}: {error}")
        return None


def _with_rejected(record: Record) -> Record:
    """The record with the worse answer in place of the better one."""
    worse = dataclasses.replace(record.messages[-1], content=record.rejected)
    return dataclasses.replace(record, messages=(*record.messages[:-1], worse))


def first_token(tokenizer: Any) -> int:
    """The id that opens a document: the beginning token, or the end token where there is none."""
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        raise ValueError("the tokenizer has neither a beginning nor an end token; one of them must open a document")
    return first


def encode_documents(tokenizer: Any, texts: Sequence[str]) -> list[np.ndarray]:
    """The ids of each text, the beginning token first; a text of its own language model has nothing else around it."""
    if not texts:
        return []
    first = first_token(tokenizer)
    return [np.concatenate([[first], ids]).astype(np.int32) for ids in chat.encode_texts(tokenizer, texts)]


def windows(ids: np.ndarray, length: int, how: str = "even") -> Iterator[np.ndarray]:
    """Stretches of at most `length` tokens. Each begins with the last token of the one before, so that every token but
    the very first is predicted once: 1 2 3 4 5 6 7 in windows of 5 is 1 2 3 4 and 4 5 6 7 ("even": of nearly equal
    size), or 1 2 3 4 5 and 5 6 7 ("full").
    """
    step = max(length - 1, 1)
    count = -(-(len(ids) - 1) // step)
    if how == "full":
        yield from (ids[start * step : start * step + length] for start in range(count))
        return
    for part in np.array_split(np.arange(1, len(ids)), count) if count else ():
        yield ids[part[0] - 1 : part[-1] + 1]
