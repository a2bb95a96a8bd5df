"""A model's folder, and questions to it in words: about some pictures, or the same one about every picture of a folder.

python -m ain_jax.generate --model FOLDER --image page.png "اقرأ النص"
python -m ain_jax.generate --model FOLDER --folder lines "اقرأ النص" > answers.jsonl

{"image": "lines/001.png", "text": "السلام عليكم"}
{"image": "lines/002.png", "fault": "lines/002.png: picture of 0 bytes; expected an encoded file such as PNG or JPEG"}
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ain_jax.data.formats import open_picture
from ain_jax.generate import Prompt, Speaker, generate, placeholder_counts, prompt_faults, prompt_with_images
from ain_jax.models.config import ModelConfig
from ain_jax.tokenizer.chat import encode_prompt, load_tokenizer
from ain_jax.weights.load import load_folder, load_image_settings

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm")  # names that may be pictures


@dataclasses.dataclass(frozen=True)
class Answering:
    """A model that answers, and how: `sampling` is what `generate` takes by name, stop strings beside it."""

    params: Any
    config: ModelConfig
    tokenizer: Any
    settings: Any  # how pictures are cut to patches; None where it sees none
    max_new_tokens: int = 128
    stop: Sequence[str] = ()
    dtype: Any = jnp.float32  # of activations
    sampling: dict[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path, dtype: Any = None, **how: Any) -> "Answering":
        """The model of a folder as ain_jax or transformers saves it. ValueError: it is none.

        `dtype` is that of parameters and activations; without one parameters stay as the files have them.
        """
        params, config = load_folder(folder, dtype)
        settings = load_image_settings(folder, config) if config.vision is not None else None
        params = jax.tree.map(jnp.asarray, params)  # on the device, once for all calls
        return cls(params, config, load_tokenizer(folder), settings, dtype=dtype or jnp.float32, **how)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids that end an answer: the model's, and special tokens among the stop strings, which no text shows."""
        special = {token.content: id for id, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        named = [special[stop] for stop in self.stop if stop in special]
        return tuple(dict.fromkeys([*self.config.stop_ids, *named]))

    def prompt(self, said: str | Sequence[dict[str, str]], pictures: Sequence[Any] = ()) -> Prompt:
        """What is decoded from: a question, with its pictures (PIL or encoded) before it, or the turns of a
        conversation in which "<image>" says where they stand. A model without a chat template goes on from the question
        itself.
        """
        if pictures and self.settings is None:
            raise ValueError(
                f"the model is a {self.config.family} without an image encoder: it can be shown no picture"
            )
        prompt = prompt_with_images([], pictures, self.settings) if pictures else Prompt([])
        counts = placeholder_counts(prompt, self.settings.merge_size) if pictures else []
        if isinstance(said, str) and not pictures and not self.tokenizer.chat_template:
            return Prompt(self.tokenizer(said)["input_ids"])
        asked = [{"role": "user", "content": "<image>" * len(counts) + said}] if isinstance(said, str) else said
        return dataclasses.replace(prompt, tokens_L=encode_prompt(self.tokenizer, asked, counts))

    def answers(
        self,
        prompts: Sequence[Prompt],
        rows: int = 64,
        tell: Callable[[int, str], None] | None = None,
        before: int = 0,
    ) -> list[str]:
        """The answer to each; `tell(prompt, text)` is given what is new of it as it comes.

        `before` prompts were answered by other calls: what is drawn by chance is drawn otherwise behind them.
        """
        speaker = Speaker(self.tokenizer, self.stop, tell)
        watch = speaker if tell or self.stop else None
        stops = self.stop_ids
        how = {**self.sampling, "seed": self.sampling.get("seed", 0) + before, "dtype": self.dtype}
        found = generate(self.params, self.config, prompts, self.max_new_tokens, stops, rows=rows, watch=watch, **how)
        return [speaker.finish(number, ids) for number, ids in enumerate(found)]

    def of_folder(self, text: str, folder: Path, rows: int = 8) -> Iterator[dict[str, str]]:
        """The answer about each picture below a folder, in the order of their names, `rows` at a time.

        What cannot be read as a picture comes with its fault, and the others go on.
        """
        paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURES)
        if not paths:
            raise ValueError(f"{folder} holds no picture; expected files that end in {', '.join(PICTURES)}")
        if self.settings is None:
            self.prompt(text, [b""])  # refuses
        for start in range(0, len(paths), rows):
            prompts: dict[Path, Prompt] = {}
            faults: dict[Path, str] = {}
            for path in paths[start : start + rows]:
                try:
                    prompt = self.prompt(text, [open_picture(path.read_bytes(), str(path))])
                except (ValueError, OSError) as error:
                    faults[path] = str(error)
                    continue
                if wrong := prompt_faults(prompt, self.config, self.max_new_tokens):
                    faults[path] = f"{path}: the prompt with this picture " + "; ".join(wrong)
                else:
                    prompts[path] = prompt
            said = self.answers(list(prompts.values()), rows, before=start) if prompts else ()
            answers = dict(zip(prompts, said, strict=True))
            for path in paths[start : start + rows]:
                told = {"text": answers[path]} if path in answers else {"fault": faults[path]}
                yield {"image": str(path), **told}
