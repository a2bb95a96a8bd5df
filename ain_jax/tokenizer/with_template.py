"""A tokenizer folder with one of our chat templates, for a base that has none, or another one.

The special tokens that the base lacks take the ids behind its own, which in most published models are spare rows of
the padded tables; every old id stays, and so do the ids of every text that spells none of the new tokens out:

    Qwen2.5, chatml    151,665 ids in 151,936 rows; nothing is missing
    SmolLM2, llama3     49,152 ids in  49,152 rows; 3 new ids, 49,152 to 49,154: the tables grow to 49,216 rows
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ain_jax.tokenizer import chat, extend, folder, templates
from ain_jax.tokenizer.base import Base, open_base
from ain_jax.tokenizer.grow import grown_data


@dataclass(frozen=True)
class Templated:
    """What `with_template` wrote, and what the model's config has to say for it."""

    folder: Path
    special_tokens: Mapping[str, int]  # those that the base lacked, and their ids
    end_of_turn: str  # the tokenizer's eos_token from now on
    stop_token_ids: tuple[int, ...]  # the ids at which generation stops: the end of a turn, then the base's own end
    size: int  # number of ids
    rows: int  # how many rows the model's tables must have: its own where they suffice


def missing(base: Base, template: templates.NamedTemplate) -> tuple[str, ...]:
    """The special tokens of a template that a base lacks; ValueError where it has one as a common piece."""
    common = [token for token in template.special_tokens if token in base.ids and token not in base.special]
    if common:
        raise ValueError(
            f"{base.path} has {', '.join(common)} as common pieces, and the template {template.name} needs them as "
            "special tokens; name another template"
        )
    return tuple(token for token in template.special_tokens if token not in base.ids)


def end_token(base: Base, template: templates.NamedTemplate) -> str:
    """What ends a turn: the template's own token, or the base's end token; ValueError where there is neither."""
    end = template.end_of_turn or base.named.get("eos_token")
    if not end:
        raise ValueError(
            f"{base.path} names no eos_token, with which the template {template.name} ends a turn; name a template "
            "with a token of its own, such as chatml"
        )
    return end


def with_template(
    tokenizer_folder: str | Path, name: str, out_folder: str | Path, rows: int, multiple: int = 64
) -> Templated:
    """Writes the folder with the template of that name, in one piece; what is new in it.

    rows      of the model's embedding, its padding included
    multiple  which the rows are padded to where they do not suffice
    """
    template, out = templates.named(name), Path(out_folder)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} already exists and is not overwritten; remove it or give another folder")
    base = open_base(tokenizer_folder)
    if base.size > rows:
        raise ValueError(f"{base.path} has {base.size} ids, and the model {rows} rows: it is another model's tokenizer")
    new, end = missing(base, template), end_token(base, template)
    files = folder.contents(
        grown_data(base, new, (), ()),
        base.config,
        template.text,
        extend.named(base, end, base.named.get("pad_token")),
        new,
        extend.grown_model(base, new, ()),
    )
    folder.write(out, files)
    tokenizer = chat.load_tokenizer(out)
    stops = [end, base.named.get("eos_token") or end]
    size = base.size + len(new)
    return Templated(
        folder=out,
        special_tokens={token: base.size + place for place, token in enumerate(new)},
        end_of_turn=end,
        stop_token_ids=tuple(dict.fromkeys(tokenizer.convert_tokens_to_ids(stops))),
        size=size,
        rows=rows if size <= rows else extend.padded_vocab(size, multiple),
    )
