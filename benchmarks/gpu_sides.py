"""The two sides of `gpu.py`: the same packed rows, trained by ours and by transformers with SDPA."""

import dataclasses
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

RATE, DECAY, BETAS, EPS = 1e-5, 0.1, (0.9, 0.95), 1e-8
WARM = 3  # steps that are not counted: compilation, and the allocator finding its sizes
ROPE = {"type": "mrope", "rope_type": "default", "rope_theta": 1e6}


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, its rows and how it is trained. Every position of a row is filled; a segment may open with a picture."""

    name: str
    text: dict[str, Any]
    vision: dict[str, Any] | None
    rows: int
    segments: tuple[int, ...]  # tokens of each segment of a row
    grid: tuple[int, int, int] | None  # patches of the picture of each segment
    rank: int  # of adapters beside a frozen base; 0 trains all
    mixed: bool  # products in bfloat16; parameters that learn are float32, a frozen base is bfloat16
    remat: bool = True  # layers are computed again in the backward pass, on both sides

    @property
    def length(self) -> int:
        return sum(self.segments)

    @property
    def special(self) -> dict[str, int]:
        """Ids at the end of the vocabulary: the marks of a picture."""
        names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
        return {name: self.text["vocab_size"] - 8 + i for i, name in enumerate(names)}

    def settings(self) -> dict[str, Any]:
        """The arguments of transformers' configuration, which is also what ours is read from."""
        plain = {"bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.02, "max_position_embeddings": 32768}
        if self.vision is None:
            return self.text | plain
        half = self.text["hidden_size"] // self.text["num_attention_heads"] // 2
        section = [half - 2 * (half * 3 // 8), half * 3 // 8, half * 3 // 8]
        return self.text | plain | self.special | {"rope_scaling": ROPE | {"mrope_section": section}}


def shape(vocab: int, hidden: int, mlp: int, layers: int, heads: int, kv: int, tied: bool) -> dict[str, Any]:
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return dict(zip(names, (vocab, hidden, mlp, layers, heads), strict=True)) | {
        "num_key_value_heads": kv,
        "tie_word_embeddings": tied,
    }


def tower(depth: int, width: int, heads: int, hidden: int) -> dict[str, Any]:
    return {"depth": depth, "embed_dim": width, "num_heads": heads, "mlp_ratio": 4, "hidden_size": hidden}


def cases(cpu: bool) -> dict[str, Case]:
    """Of a card of 141 GB, and their twins, which run in seconds on a CPU in float32."""
    if cpu:
        text, small = shape(512, 64, 160, 2, 4, 2, True), shape(512, 64, 160, 2, 4, 2, False)
        see = Case("qwen2_vl twin, all", text, tower(2, 32, 2, 64), 2, (40, 56), (1, 4, 8), 0, False)
        return {"vision": see, "decoder": Case("qwen2 twin, rank 4", small, None, 2, (40, 56), None, 4, False)}
    text = shape(151936, 1536, 8960, 28, 12, 2, True)
    see = Case("Qwen2-VL-2B, all", text, tower(32, 1280, 16, 1536), 8, (900, 700, 1200, 1296), (1, 32, 32), 0, True)
    wide = shape(152064, 3584, 18944, 28, 28, 4, False)
    return {"vision": see, "decoder": Case("Qwen2-7B, rank 16", wide, None, 8, (900, 700, 1200, 1296), None, 16, True)}


def batch(case: Case) -> dict[str, np.ndarray]:
    """The arrays of the rows, named as the fields of `Batch`; half of the words of a segment are learnt."""
    from ain_jax.data.packing import Packing, Segment, lay_row
    from ain_jax.data.positions import feature_count, mrope_positions, patch_positions

    random, rows = np.random.default_rng(0), []
    patches = int(np.prod(case.grid)) if case.grid else 0
    width = 3 * 2 * 14 * 14
    for _ in range(case.rows):
        made = []
        for length in case.segments:
            tokens_L = random.integers(5, case.text["vocab_size"] - 16, length).astype(np.int32)
            learn_L = np.arange(length) >= length // 2
            picture: dict[str, Any] = {}
            if case.grid:
                count, special = feature_count(case.grid), case.special
                tokens_L[0], tokens_L[1 + count] = special["vision_start_token_id"], special["vision_end_token_id"]
                tokens_L[1 : 1 + count] = special["image_token_id"]
                learn_L &= np.arange(length) > 1 + count
                picture = {
                    "is_picture_L": tokens_L == special["image_token_id"],
                    "patches_PK": random.standard_normal((patches, width), np.float32),
                    "patch_positions_P2": patch_positions(case.grid).astype(np.int32),
                    "patch_counts": (patches,),
                }
            image = case.special["image_token_id"] if case.grid else None
            positions_3L = mrope_positions(tokens_L, [case.grid] if case.grid else [], image)
            made.append(Segment(tokens_L, learn_L, positions_3L.astype(np.int32), 0, **picture))
        packing = Packing(case.length, patches * len(case.segments), sum(int(s.learn_L[1:].sum()) for s in made))
        rows.append(lay_row(made, packing, width, 2))
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def ours(case: Case, folder: Path | None) -> Any:
    """step() -> loss, with the model, the loss, the optimiser and the update that a stage uses."""
    import jax
    import jax.numpy as jnp

    from ain_jax.data.batch import Batch
    from ain_jax.models import lora
    from ain_jax.models.attention import resolve
    from ain_jax.models.config import from_hf
    from ain_jax.models.multimodal import MultimodalModel, abstract_params
    from ain_jax.train import losses, optimizer, state, step
    from ain_jax.weights.load import load_folder

    stored = jnp.bfloat16 if case.mixed and case.rank else jnp.float32
    if folder is not None:
        params, config = load_folder(folder, np.dtype(stored))
    else:
        config = from_hf(as_json(case))
        params = _random(abstract_params(config), stored)
    params = jax.device_put(params)
    network = MultimodalModel(
        config,
        dtype=jnp.bfloat16 if case.mixed else jnp.float32,
        remat="full" if case.remat else "none",
        longest_image=int(np.prod(case.grid)) if case.grid else None,
        attention=resolve(jax.devices()[0].platform),
    )
    loss: Any = losses.next_token(network, 1)
    trained, frozen, aim = params, {}, loss
    if case.rank:
        settings = lora.Lora(rank=case.rank)
        trained, frozen = lora.init(settings, config, jax.random.key(0)), params
        aim = lambda pairs, base, *rest: loss(base, {"lora": lora.scaled(pairs, settings)}, *rest)
    chosen = optimizer.Optimizer(RATE, schedule="flat", weight_decay=DECAY, b1=BETAS[0], b2=BETAS[1], eps=EPS)
    transform = optimizer.make(chosen, trained, 1000)
    update = step.make_update(aim, transform, optimizer.rate_tree(trained, {}))
    on_device = jax.device_put(Batch(**batch(case)))
    now, key = state.create(trained, transform), jax.random.key(0)
    del trained, params

    def one() -> float:
        nonlocal now
        now, sums, *_ = update(now, frozen, on_device, key)
        return float(sums.loss) / float(sums.count)

    return one


def _random(shapes: Any, dtype: Any) -> Any:
    """Values of the published spread, drawn on the device: norms 1, biases 0."""
    import jax
    import jax.numpy as jnp

    def draw(path, leaf, key):
        names = [str(getattr(p, "key", p)) for p in path]
        if names[-1] == "bias" or "norm" in names[-2] or names[-2] == "ln_q":
            return jnp.full(leaf.shape, 0.0 if names[-1] == "bias" else 1.0, dtype)
        return (0.02 * jax.random.normal(key, leaf.shape, jnp.float32)).astype(dtype)

    flat, tree = jax.tree_util.tree_flatten_with_path(shapes)
    keys = jax.random.split(jax.random.key(0), len(flat))
    drawn = [
        jax.jit(lambda key, p=path, x=leaf: draw(p, x, key))(k) for (path, leaf), k in zip(flat, keys, strict=True)
    ]
    return tree.unflatten(drawn)


def their_settings(case: Case) -> Any:
    """The configuration of the model, as transformers builds it."""
    import transformers

    if case.vision is None:
        return transformers.Qwen2Config(**case.settings())
    return transformers.Qwen2VLConfig(**case.settings(), vision_config=case.vision)


def as_json(case: Case) -> dict[str, Any]:
    """The same as the attributes of a published `config.json`."""
    kind, architecture = ("qwen2", "Qwen2ForCausalLM") if case.vision is None else _VISION
    more = {} if case.vision is None else {"vision_config": case.vision | {"patch_size": 14, "spatial_merge_size": 2}}
    plain = {"model_type": kind, "architectures": [architecture], "hidden_act": "silu", "rms_norm_eps": 1e-6}
    return case.settings() | plain | {"rope_theta": 1e6} | more


_VISION = ("qwen2_vl", "Qwen2VLForConditionalGeneration")


def their_model(case: Case, folder: Path | None) -> Any:
    """The model, random or from a folder, with the attention that handles a mask of segments."""
    import torch
    import transformers

    auto: Any = transformers.AutoModelForCausalLM if case.vision is None else transformers.AutoModelForImageTextToText
    dtype = torch.bfloat16 if case.mixed and case.rank else torch.float32
    if folder is not None:
        return auto.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        return auto.from_config(their_settings(case), dtype=dtype, attn_implementation="sdpa")


def theirs(case: Case, folder: Path | None) -> Any:
    """step() -> loss, as a training loop of torch is commonly written; packed rows by a mask and their positions."""
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = their_model(case, folder).to(device).train()
    if case.rank:
        import peft

        adapted = peft.LoraConfig(r=case.rank, lora_alpha=16, target_modules="all-linear", lora_dropout=0.0)
        network = peft.get_peft_model(network, adapted)
        network.enable_input_require_grads()
    if case.remat:
        network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    learning = [p for p in network.parameters() if p.requires_grad]
    decays = {True: DECAY, False: 0.0}
    groups = [{"params": [p for p in learning if (p.ndim >= 2) == k], "weight_decay": v} for k, v in decays.items()]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=BETAS, eps=EPS, fused=True)
    rows = batch(case)
    B, L = rows["tokens_BL"].shape
    labels_BL = np.full((B, L), -100, np.int64)
    for b in range(B):
        used = rows["target_segments_BC"][b] > 0
        labels_BL[b, rows["predict_at_BC"][b][used] + 1] = rows["targets_BC"][b][used]
    segments_BL = torch.as_tensor(rows["segments_BL"], device=device)
    seen_B1LL = (segments_BL[:, None, :, None] == segments_BL[:, None, None, :]).tril()
    put = lambda array: torch.as_tensor(array, dtype=torch.long, device=device)
    positions_3BL = put(rows["positions_B3L"]).transpose(0, 1)
    inputs = {
        "input_ids": put(rows["tokens_BL"]),
        "labels": put(labels_BL),
        "attention_mask": seen_B1LL,
        "position_ids": positions_3BL if case.grid else positions_3BL[0],
    }
    if case.grid:
        inputs["pixel_values"] = torch.as_tensor(rows["patches_BPK"], device=device).flatten(0, 1)
        inputs["image_grid_thw"] = put([case.grid] * (B * len(case.segments)))
        if int(transformers.__version__.partition(".")[0]) >= 5:
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == case.special["image_token_id"]).int()

    def one() -> float:
        with torch.autocast(device, torch.bfloat16, enabled=case.mixed):
            loss = network(**inputs, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return one


def measure(side: str, case: Case, folder: Path | None, steps: int) -> dict[str, Any]:
    """Losses of all steps, seconds of the counted ones, and the most bytes that were held."""
    one = ours(case, folder) if side == "ours" else theirs(case, folder)
    losses, seconds = [], []
    for number in range(WARM + steps):
        start = time.perf_counter()
        losses.append(one())
        if number >= WARM:
            seconds.append(time.perf_counter() - start)
    return {"losses": losses, "seconds": seconds, "bytes": _most(side)}


def _most(side: str) -> int:
    """The most bytes of the card that were in use; without a card, of the process."""
    if side == "ours":
        import jax

        numbers = jax.local_devices()[0].memory_stats() or {}
        found = numbers.get("peak_bytes_in_use", 0)
    else:
        import torch

        found = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(found) or next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def card() -> str | None:
    """The name of the GPU of this machine, asked of its driver; None without one."""
    import subprocess

    try:
        asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        said = subprocess.run(asked, capture_output=True, text=True, check=True, env=os.environ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return said.splitlines()[0].strip() or None
