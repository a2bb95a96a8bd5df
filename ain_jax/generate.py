"""Decoding with a key/value cache: batches of uneven prompts of text and pictures.

    python -m ain_jax.generate --model FOLDER --image page.png "اقرأ النص"

The layers are those of training. They ask an `attend` function what to attend to (`models/text.py`): a prompt is read
with packed attention that also hands back each layer's keys and values; each new token then attends to these and writes
its own.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ain_jax.data.formats import open_picture
from ain_jax.data.images import ImageSettings, open_image, preprocess
from ain_jax.data.positions import Grid, feature_count, mrope_positions, patch_positions, visual_tokens
from ain_jax.data.tiles import TileSettings, feature_index, preprocess_tiles, row_features
from ain_jax.launching import machine, processes
from ain_jax.models.attention import attention
from ain_jax.models.config import ClipConfig, ModelConfig, VisionConfig
from ain_jax.models.layers import apart
from ain_jax.models.multimodal import MultimodalModel


@dataclass(frozen=True)
class Prompt:
    """Token ids, the placeholder of each picture or video repeated as often as it has features, and all patches."""

    tokens_L: Any
    patches_PK: np.ndarray | None = None
    grids: tuple[Grid, ...] = ()  # of LLaVA-NeXT: tiles, and the patches of their sides
    # LLaVA-NeXT: for each picture which of its features stands at which placeholder, see `data.tiles.feature_index`.
    features: tuple[np.ndarray, ...] = ()
    seconds: tuple[float, ...] | None = None  # between two patches in time, of each grid; Qwen2.5-VL alone reads them


def prompt_with_images(
    tokens_L: Sequence[int], images: Iterable[Any], settings: ImageSettings | TileSettings
) -> Prompt:
    """The prompt of ids that already hold each picture's placeholders; the pictures (PIL or encoded) cut to patches."""
    images = list(images)
    if not images:
        return Prompt(np.asarray(tokens_L))
    if isinstance(settings, TileSettings):
        opened = [open_image(image) for image in images]
        tiled = [preprocess_tiles(image, settings) for image in opened]
        grids = tuple((len(tiles), settings.side, settings.side) for _, tiles in tiled)
        features = tuple(feature_index(image.height, image.width, settings) for image in opened)
        return Prompt(np.asarray(tokens_L), np.concatenate([patches for patches, _ in tiled]), grids, features)
    cut = [preprocess(image, settings) for image in images]
    return Prompt(np.asarray(tokens_L), np.concatenate([patches for patches, _ in cut]), tuple(grid for _, grid in cut))


def placeholder_counts(prompt: Prompt, merge_size: int) -> list[int]:
    """How many places each picture of a prompt takes among its tokens."""
    return [len(index_M) for index_M in prompt.features] or [feature_count(grid, merge_size) for grid in prompt.grids]


def generate(
    params: dict[str, Any],
    config: ModelConfig,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    stop_ids: Sequence[int] = (),
    *,
    rows: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    dtype: Any = jnp.float32,
    watch: Callable[[int, list[int]], bool] | None = None,
    every: int = 8,
) -> list[list[int]]:
    """The new ids of each prompt, in the order of the prompts and without the stop id that ended them.

    Greedy at temperature 0, else drawn; what a prompt draws depends on `seed` and on its place, not on its neighbours.
    Prompts of like length run together, `rows` at a time, in arrays of a few sizes, so that few shapes are compiled:
    lengths are powers of two, and patches are the power of two that holds every prompt's.

    `watch(prompt, ids)` is told every `every` tokens what a prompt has so far, and ends it by returning True: text is
    streamed, and ended at a string, by such a function (`Speaker`).
    """
    _check(prompts, config, max_new_tokens, stop_ids, temperature, seed)
    if not prompts or max_new_tokens < 1:
        return [[] for _ in prompts]
    unit = 1
    if config.vision is not None:  # whole tiles, or whole features
        seen = config.vision
        unit = seen.tile_patches if isinstance(seen, ClipConfig) else seen.merge_size**2
    most = max(0 if prompt.patches_PK is None else len(prompt.patches_PK) for prompt in prompts)
    patches = unit * _bucket(-(-most // unit))
    lengths = [len(prompt.tokens_L) for prompt in prompts]
    sizes = [0 if prompt.patches_PK is None else patches for prompt in prompts]
    B = min(rows, 1 << (len(prompts) - 1).bit_length())
    # Of one size, so as not to compile again.
    stop_Z = jnp.asarray([*stop_ids] + [-1] * (MOST_STOPS - len(stop_ids)), jnp.int32)
    begin, advance = _compiled(config, max_new_tokens, temperature > 0, jnp.dtype(dtype).name)
    # Once: numpy arrays would be sent anew by each call of the two. What lies on devices, of many hosts even, stays.
    params = jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.Array) else jax.device_put(leaf), params)
    stacks = {name: apart(params["model"][name]) for name, *_ in config.text.stacks()}
    params = params | {"model": params["model"] | stacks}
    waiting: list[tuple[list[int], Any]] = []
    for size in sorted(set(sizes)):
        # By length alone: rows that are left empty cost as much as rows padded to the next length.
        members = sorted((i for i in range(len(prompts)) if sizes[i] == size), key=lengths.__getitem__)
        for start in range(0, len(members), B):
            chosen = members[start : start + B]
            arrays = rows_of([prompts[i] for i in chosen], config, B, _bucket(lengths[chosen[-1]]), size)
            drawing = {
                "place_B": np.array(chosen + [0] * (B - len(chosen)), np.int32),
                "stop_Z": stop_Z,
                "temperature": jnp.float32(temperature),
                "key": jax.random.key(seed),
            }
            texts, state = begin(params, arrays, drawing)
            if watch is None:
                state = advance(params, texts, drawing, state, max_new_tokens)
            else:
                state = _watched(partial(advance, params, texts, drawing), state, chosen, watch, every, max_new_tokens)
            waiting.append((chosen, state))
    results: list[list[int]] = [[] for _ in prompts]
    for chosen, state in waiting:  # fetched after all are dispatched: the device does not wait for the host
        for i, ids in zip(chosen, _said(state), strict=False):
            results[i] = ids
    return results


MOST_STOPS = 8


def _said(state: Any) -> list[list[int]]:
    """The ids of each row so far."""
    new_BT, count_B = processes.fetch((state["new_BT"], state["count_B"]))
    return [new_T[:count].tolist() for new_T, count in zip(new_BT, count_B, strict=True)]


def _watched(advance: Any, state: Any, chosen: Sequence[int], watch: Any, every: int, most: int) -> Any:
    """The state behind the last token, `watch` asked every `every` tokens about each row that goes on."""
    ended = np.zeros(len(state["done_B"]), bool)
    for until in [*range(every, most, every), most]:
        state = advance(state, until)
        for row, (i, ids) in enumerate(zip(chosen, _said(state), strict=False)):
            ended[row] = ended[row] or watch(i, ids)
        done_B = np.asarray(state["done_B"]) | ended
        if done_B[: len(chosen)].all():
            break
        state = state | {"done_B": jnp.asarray(done_B)}
    return state


@lru_cache(maxsize=32)
def _compiled(config: ModelConfig, max_new_tokens: int, sampled: bool, dtype: str):
    settings = (MultimodalModel(config, jnp.dtype(dtype)), max_new_tokens, sampled)
    return jax.jit(partial(_begin, *settings)), jax.jit(partial(_advance, *settings), donate_argnums=(3,))


def _begin(model, T: int, sampled: bool, params, arrays, drawing):
    """(texts, state) behind the prompts: what stays as it is while T tokens are said, and what changes.

    Slots 0 .. L-1 of the cache hold the prompt (shorter prompts leave some unused), slot L + t the t-th new token. At
    step t, token t is said and not read yet, so that nothing is computed behind the last one.
    """
    apply = partial(model.apply, {"params": params})
    kept = ("segments_BL", "positions_3BL", "length_B", "next_position_B")
    segments_BL, positions_3BL, length_B, next_position_B = (arrays[name] for name in kept)
    inputs = {name: array for name, array in arrays.items() if name not in kept}
    B = len(segments_BL)

    def read(q_BLNH, k_BLKH, v_BLKH, _, **rules):
        # Heads before positions, as `attention` multiplies them: else each step would turn the whole cache over.
        kept_BKLH = (jnp.swapaxes(k_BLKH, 1, 2), jnp.swapaxes(v_BLKH, 1, 2))
        return attention(q_BLNH, k_BLKH, v_BLKH, segments_BL, causal=True, **rules), kept_BKLH

    hidden_BLD, cache = apply(apply(**inputs, method="embed"), positions_3BL, read, method="decode")
    hidden_BD = jnp.take_along_axis(hidden_BLD, (length_B - 1)[:, None, None], axis=1)[:, 0]
    token_B = _choose(apply(hidden_BD, method="logits"), jnp.int32(0), sampled, drawing)
    done_B = _stops(token_B, drawing)
    state = {
        "step": jnp.int32(0),
        "token_B": token_B,
        "new_BT": jnp.zeros((B, T), jnp.int32).at[:, 0].set(token_B),
        "count_B": 1 - done_B.astype(jnp.int32),
        "done_B": done_B,
        "cache": jax.tree.map(lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, T), (0, 0)]), cache),
    }
    texts = {"segments_BL": segments_BL, "length_B": length_B, "next_position_B": next_position_B}
    return texts, state


def _choose(logits_BV, step, sampled: bool, drawing):
    if not sampled:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    keys_B = jax.vmap(lambda place: jax.random.fold_in(drawing["key"], place))(drawing["place_B"])
    keys_B = jax.vmap(lambda key: jax.random.fold_in(key, step))(keys_B)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV / drawing["temperature"]).astype(jnp.int32)


def _stops(token_B, drawing):
    return jnp.any(token_B[:, None] == drawing["stop_Z"][None, :], axis=1)


def _advance(model, T: int, sampled: bool, params, texts, drawing, state, until):
    """The state with `until` tokens said in each row, fewer where all rows have ended."""
    apply = partial(model.apply, {"params": params})
    segments_BL, length_B = texts["segments_BL"], texts["length_B"]
    B, L = segments_BL.shape
    prompt_BS = jnp.pad(segments_BL, ((0, 0), (0, T)))
    slots_S = jnp.arange(L + T, dtype=jnp.int32)
    index_BS = jnp.where(slots_S[None] < L, slots_S[None], slots_S[None] - L + length_B[:, None])  # in its own text
    one_B1 = jnp.ones((B, 1), jnp.int32)

    def write(cache, new, slot):
        """The cache of one layer or of all with its positions on the last axis but one."""
        return jax.lax.dynamic_update_slice_in_dim(cache, new, slot, axis=cache.ndim - 2)

    def more(state):
        return (state["step"] + 1 < until) & ~jnp.all(state["done_B"])

    def one(state):
        step, token_B, done_B, cache = (state[name] for name in ("step", "token_B", "done_B", "cache"))
        slot = L + step
        key_segments_BS = jnp.where(((slots_S >= L) & (slots_S <= slot))[None], 1, prompt_BS)

        def attend(q_B1NH, k_B1KH, v_B1KH, memory, window=None, **rules):
            new_BK1H = (jnp.swapaxes(k_B1KH, 1, 2), jnp.swapaxes(v_B1KH, 1, 2))
            k_BSKH, v_BSKH = (
                jnp.swapaxes(write(old, new, slot), 1, 2) for old, new in zip(memory, new_BK1H, strict=True)
            )
            seen_BS = key_segments_BS
            if window is not None:
                seen_BS = jnp.where((length_B + step)[:, None] - index_BS < window, seen_BS, 0)
            return attention(q_B1NH, k_BSKH, v_BSKH, one_B1, seen_BS, causal=False, **rules), new_BK1H

        position_3B1 = jnp.broadcast_to((texts["next_position_B"] + step)[None, :, None], (3, B, 1))
        x_B1D = apply(token_B[:, None], method="embed")
        hidden_B1D, new = apply(x_B1D, position_3B1, attend, cache, method="decode")
        # One write for all layers, in place: the scan over the layers reads the cache and hands back one slot of each.
        cache = jax.tree.map(lambda old, slice_: write(old, slice_, slot), cache, new)
        token_B = _choose(apply(hidden_B1D[:, 0], method="logits"), step + 1, sampled, drawing)
        done_B = done_B | _stops(token_B, drawing)
        new_BT = jax.lax.dynamic_update_slice_in_dim(state["new_BT"], token_B[:, None], step + 1, axis=1)
        count_B = jnp.where(done_B, state["count_B"], step + 2)
        values = (step + 1, token_B, new_BT, count_B, done_B, cache)
        return dict(zip(("step", "token_B", "new_BT", "count_B", "done_B", "cache"), values, strict=True))

    return jax.lax.while_loop(more, one, state)


def rows_of(prompts: Sequence[Prompt], config: ModelConfig, B: int, L: int, P: int) -> dict[str, np.ndarray]:
    """The prompts side by side, each at the left of its row; rows left over hold one token that nobody reads."""
    arrays = {
        "tokens_BL": np.zeros((B, L), np.int32),
        "segments_BL": np.zeros((B, L), np.int32),
        "positions_3BL": np.zeros((3, B, L), np.int32),
        "length_B": np.ones(B, np.int32),
        "next_position_B": np.zeros(B, np.int32),
    }
    if P:
        assert config.vision is not None
        arrays |= {
            "feature_index_BL": np.full((B, L), -1, np.int32),
            "patches_BPK": np.zeros((B, P, config.vision.patch_values), np.float32),
        }
    if P and isinstance(config.vision, VisionConfig):
        arrays |= {
            "patch_positions_BP2": np.zeros((B, P, 2), np.int32),
            "patch_segments_BP": np.zeros((B, P), np.int32),
        }
    for row, prompt in enumerate(prompts):
        tokens_L = np.asarray(prompt.tokens_L, np.int32)
        positions_3L = prompt_positions(prompt, config)
        length = len(tokens_L)
        arrays["tokens_BL"][row, :length] = tokens_L
        arrays["segments_BL"][row, :length] = 1
        arrays["positions_3BL"][:, row, :length] = positions_3L
        arrays["length_B"][row] = length
        arrays["next_position_B"][row] = positions_3L.max() + 1
        if prompt.patches_PK is None:
            continue
        is_image_L = visual_tokens(tokens_L, config.image_token_id, config.video_token_id)
        patches = len(prompt.patches_PK)
        arrays["patches_BPK"][row, :patches] = prompt.patches_PK
        if isinstance(config.vision, VisionConfig):
            merge = config.vision.merge_size
            grid_positions = np.concatenate([patch_positions(grid, merge) for grid in prompt.grids])
            # Patches see their own frame.
            counts = [rows * columns for frames, rows, columns in prompt.grids for _ in range(frames)]
            arrays["feature_index_BL"][row, :length][is_image_L] = np.arange(is_image_L.sum())
            arrays["patch_positions_BP2"][row, :patches] = grid_positions
            arrays["patch_segments_BP"][row, :patches] = np.repeat(np.arange(len(counts)) + 1, counts)
        else:
            index_M = row_features(prompt.features, (int(np.prod(grid)) for grid in prompt.grids), P)
            if len(index_M) != is_image_L.sum():
                raise ValueError(
                    f"{is_image_L.sum()} image tokens, but the {len(prompt.features)} pictures take {len(index_M)}"
                )
            arrays["feature_index_BL"][row, :length][is_image_L] = index_M
    return arrays


def prompt_positions(prompt: Prompt, config: ModelConfig) -> np.ndarray:
    """positions_3L of a prompt, as its model counts them."""
    tokens_L = np.asarray(prompt.tokens_L, np.int32)
    if config.text.mrope_section is None:
        return np.tile(np.arange(len(tokens_L), dtype=np.int32), (3, 1))
    assert isinstance(config.vision, VisionConfig), "M-RoPE counts the patches of Qwen's tower"
    intervals = None
    if rate := config.vision.tokens_per_second:
        seconds = prompt.seconds or (1.0,) * len(prompt.grids)
        intervals = [rate * s if grid[0] > 1 else 1.0 for s, grid in zip(seconds, prompt.grids, strict=True)]
    ids = {"image_token_id": config.image_token_id, "video_token_id": config.video_token_id}
    return mrope_positions(tokens_L, prompt.grids, merge_size=config.vision.merge_size, intervals=intervals, **ids)


def _bucket(count: int) -> int:
    """The array length that holds so many: 32, 64, 128 ... A new length is a new compilation, which costs seconds."""
    return max(32, 1 << (count - 1).bit_length())


def prompt_faults(prompt: Prompt, config: ModelConfig, max_new_tokens: int) -> list[str]:
    """Why a model cannot decode so many tokens from a prompt."""
    tokens_L, faults = np.asarray(prompt.tokens_L), []
    if tokens_L.ndim != 1 or not len(tokens_L):
        return [f"has shape {tokens_L.shape}; expected at least one id"]
    if len(tokens_L) + max_new_tokens > config.text.max_positions:
        faults.append(
            f"of {len(tokens_L)} tokens and {max_new_tokens} new ones exceed the model's "
            f"{config.text.max_positions} positions"
        )
    if tokens_L.min() < 0 or tokens_L.max() >= config.text.vocabulary:
        faults.append(f"holds ids outside 0 to {config.text.vocabulary - 1}")
    given = 0 if prompt.patches_PK is None else len(prompt.patches_PK)
    expected = sum(int(np.prod(grid)) for grid in prompt.grids)
    if given != expected or (given and config.vision is None):
        faults.append(f"has {given} patches, but its pictures have {expected}")
    return faults


def _check(
    prompts: Sequence[Prompt],
    config: ModelConfig,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    temperature: float,
    seed: int,
) -> None:
    faults = []
    if max_new_tokens < 0:
        faults.append(f"max_new_tokens={max_new_tokens}; expected 0 or more")
    if not 0 <= temperature < math.inf:
        faults.append(f"temperature={temperature}; expected 0, which takes the likeliest token, or above")
    if not 0 <= seed < 2**63:
        faults.append(f"seed={seed}; expected 0 to 2**63 - 1")
    if len(stop_ids) > MOST_STOPS:
        faults.append(f"{len(stop_ids)} stop ids; expected {MOST_STOPS} at most")
    for i, prompt in enumerate(prompts):
        faults += [f"prompt {i} {fault}" for fault in prompt_faults(prompt, config, max_new_tokens)]
    if faults:
        raise ValueError("generate: " + "; ".join(faults))


class Speaker:
    """What `generate` may be watched with: tells each prompt's text as it grows, and ends it at a string.

    `tell(prompt, text)` is given the text that is new. A character that is not whole yet is held back, and so is what
    may be the beginning of a stop string.
    """

    def __init__(
        self, tokenizer: Any, stop_strings: Sequence[str] = (), tell: Callable[[int, str], None] | None = None
    ):
        if not all(stop_strings):
            raise ValueError("a stop string is empty: it would end every answer before its first letter")
        self.tokenizer, self.stop_strings, self.tell = tokenizer, tuple(stop_strings), tell
        self.told: dict[int, int] = {}  # characters of each prompt that were told

    def __call__(self, prompt: int, ids: list[int]) -> bool:
        text = self._text(ids)
        cut = self.cut(text)
        held = max((len(stop) - 1 for stop in self.stop_strings), default=0) if cut == text else 0
        self._tell(prompt, cut[: len(cut) - held].rstrip("\ufffd"))
        return cut != text

    def finish(self, prompt: int, ids: list[int]) -> str:
        """The whole text of a prompt, cut at its stop string; what was held back is told."""
        text = self.cut(self._text(ids))
        self._tell(prompt, text)
        return text

    def cut(self, text: str) -> str:
        """The text before the first stop string."""
        places = [place for place in map(text.find, self.stop_strings) if place >= 0]
        return text[: min(places)] if places else text

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _tell(self, prompt: int, text: str) -> None:
        done = self.told.get(prompt, 0)
        if self.tell is not None and len(text) > done:
            self.tell(prompt, text[done:])
            self.told[prompt] = len(text)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the model's answer to a question, perhaps about pictures, as it comes; or asks the same of every picture
    of a folder, and prints a line of JSON for each."""
    from ain_jax.ask import Answering

    parser = argparse.ArgumentParser(prog="python -m ain_jax.generate", description=main.__doc__)
    parser.add_argument("text", help="what the user says; a model without a chat template goes on from it")
    parser.add_argument("--model", required=True, type=Path, help="a folder as ain_jax or transformers saves it")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--image", action="append", default=[], type=Path, help="a picture; may be given several times")
    shown.add_argument("--folder", type=Path, help="ask about every picture below it; a line of JSON for each")
    parser.add_argument("--rows", type=int, help="with --folder: so many pictures at a time (8)")
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token each time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stop", action="append", default=[], help="a string that ends the answer; may be repeated")
    given = parser.parse_args(arguments)
    if given.rows is not None and (given.rows < 1 or not given.folder):
        parser.error(f"--rows {given.rows}: expected 1 or more, and --folder beside it")
    try:
        sampling = {"temperature": given.temperature, "seed": given.seed}
        how = {"max_new_tokens": given.max_new_tokens, "stop": given.stop, "sampling": sampling}
        model, faults = Answering.load(given.model, **how), 0
        if given.folder:
            for line in model.of_folder(given.text, given.folder, given.rows or 8):
                faults += "fault" in line
                print(json.dumps(line, ensure_ascii=False), flush=True)
        else:
            prompt = model.prompt(given.text, [open_picture(path.read_bytes(), str(path)) for path in given.image])
            model.answers([prompt], tell=lambda _, text: print(text, end="", flush=True))
            print()
    except (ValueError, OSError) as error:
        parser.exit(2, f"{error}\n")
    if faults:
        parser.exit(1, f'{faults} of what looked like pictures could not be read: their lines hold a "fault"\n')


if __name__ == "__main__":
    machine.prepare()
    main()
