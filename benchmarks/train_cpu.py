"""Seconds and memory of a training step on a CPU: ours beside transformers with torch, as ratios.

    python benchmarks/train_cpu.py [--model qwen2 qwen2_vl] [--threads 2] [--steps 7] [--clock processor] [--json FILE]

A random Qwen2 and a random Qwen2-VL are saved once and opened by both sides: float32, the same rows (every position
filled, so that neither side works on padding), the same pictures, every token learnt, AdamW with the same settings, the
gradient clipped at 1. transformers runs as it comes ("eager") and compiled by torch ("compiled"); the quicker one is
the peer. That the work is the same is checked: the losses of the steps agree.

Each side is a process of its own. Steps are taken in turn, one process waiting while another works, behind two that
are not counted; ratios are taken within a turn. Memory is the most that the process held at once (VmHWM) while it
stepped, less what it held before the model was opened: parameters, moments, gradients and activations. What compiling
left behind is given back first, on either side; ours runs as `launch/local.py` starts it.

`--clock processor` counts the processor time of all threads, which stays true beside other work.
"""

import argparse
import contextlib
import ctypes
import gc
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

RATE, DECAY, BETAS, EPS = 1e-3, 0.1, (0.9, 0.95), 1e-8
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
TOLERANCE = 1e-3  # of the losses: sums are taken in another order, and the steps add up
TEXT = {
    "vocab_size": 16384,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {"depth": 8, "embed_dim": 320, "num_heads": 4, "mlp_ratio": 4, "hidden_size": 512, "patch_size": 14}
START, END, IMAGE, VIDEO = 16000, 16001, 16002, 16003
GRID = (1, 16, 24)  # patches of the one picture of each row: 96 features


def settings(model: str) -> Any:
    """The configuration of a model, as transformers builds it."""
    import transformers

    if model == "qwen2":
        return transformers.Qwen2Config(**TEXT)
    rope = {"type": "mrope", "rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 1e6}
    ids = {"vision_start_token_id": START, "vision_end_token_id": END, "image_token_id": IMAGE, "video_token_id": VIDEO}
    text = TEXT | ids | {"rope_scaling": rope}
    return transformers.Qwen2VLConfig(**text, vision_config=VISION)


def save(model: str, folder: Path) -> None:
    """A random model in the published layout."""
    import torch
    import transformers

    torch.manual_seed(0)
    auto = transformers.AutoModelForCausalLM if model == "qwen2" else transformers.AutoModelForImageTextToText
    auto.from_config(settings(model)).save_pretrained(folder)


def batches(model: str, rows: int, length: int) -> list[dict[str, np.ndarray]]:
    """Two batches that are taken in turn: ids, and for a model with pictures its patches."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(2):
        tokens_BL = rng.integers(5, START, (rows, length)).astype(np.int32)
        batch = {"tokens_BL": tokens_BL}
        if model == "qwen2_vl":
            features, patches = GRID[1] * GRID[2] // 4, GRID[1] * GRID[2]
            tokens_BL[:, 4], tokens_BL[:, 5 + features] = START, END
            tokens_BL[:, 5 : 5 + features] = IMAGE
            batch["patches_BPK"] = rng.normal(size=(rows, patches, 3 * 2 * 14 * 14)).astype(np.float32)
        made.append(batch)
    return made


def our_step(model: str, folder: Path, given: list[dict[str, np.ndarray]], remat: str) -> Any:
    """step(number) -> loss, with the model, the loss, the optimiser and the update that a stage uses."""
    import jax
    import jax.numpy as jnp

    from ain_jax.data.batch import Batch
    from ain_jax.data.positions import mrope_positions, patch_positions
    from ain_jax.models.multimodal import MultimodalModel
    from ain_jax.train import losses, optimizer, state, step
    from ain_jax.weights.load import load_folder

    params, config = load_folder(folder, np.dtype(np.float32))
    chosen = optimizer.Optimizer(RATE, schedule="flat", weight_decay=DECAY, b1=BETAS[0], b2=BETAS[1], eps=EPS)
    params = jax.device_put(params)
    transform = optimizer.make(chosen, params, 1000)
    network = MultimodalModel(config, remat=remat, longest_image=GRID[1] * GRID[2] if model == "qwen2_vl" else None)
    loss, layout = losses.next_token(network, 1), state.layout(params, transform)
    update = step.make_update(loss, transform, optimizer.rate_tree(params, {}), layout=layout)

    def laid(batch: dict[str, np.ndarray]) -> Batch:
        tokens_BL = batch["tokens_BL"]
        B, L = tokens_BL.shape
        positions_B3L = np.tile(np.arange(L, dtype=np.int32), (B, 3, 1))
        pictures = {}
        if model == "qwen2_vl":
            ids = {"image_token_id": IMAGE, "video_token_id": VIDEO}
            positions_B3L = np.stack([mrope_positions(row, [GRID], merge_size=2, **ids) for row in tokens_BL])
            is_image_BL = tokens_BL == IMAGE
            pictures = {
                "feature_index_BL": np.where(is_image_BL, np.cumsum(is_image_BL, axis=1) - 1, -1).astype(np.int32),
                "patches_BPK": batch["patches_BPK"],
                "patch_positions_BP2": np.tile(patch_positions(GRID, 2).astype(np.int32), (B, 1, 1)),
                "patch_segments_BP": np.ones((B, GRID[1] * GRID[2]), np.int32),
            }
        ones_BC = np.ones((B, L - 1), np.int32)
        return Batch(
            tokens_BL,
            np.ones((B, L), np.int32),
            positions_B3L.astype(np.int32),
            np.tile(np.arange(L - 1, dtype=np.int32), (B, 1)),
            tokens_BL[:, 1:],
            ones_BC,
            0 * ones_BC,
            **pictures,
        )

    on_device = [jax.device_put(laid(batch)) for batch in given]
    now, key = state.create(jax.tree.map(jnp.array, params), transform), jax.random.key(0)
    del params

    def one(number: int) -> float:
        nonlocal now
        now, sums, _ = update(now, {}, on_device[number % 2], key)
        return float(sums.loss) / float(sums.count)

    return one


def their_step(model: str, folder: Path, given: list[dict[str, np.ndarray]], compiled: bool) -> Any:
    """step(number) -> loss, as a training loop of torch is commonly written."""
    import torch
    import transformers

    auto = transformers.AutoModelForCausalLM if model == "qwen2" else transformers.AutoModelForImageTextToText
    network: Any = auto.from_pretrained(folder, dtype=torch.float32).train()
    matrices = [p for p in network.parameters() if p.ndim >= 2]
    others = [p for p in network.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=BETAS, eps=EPS, fused=True)
    call = torch.compile(network) if compiled else network
    inputs = []
    for batch in given:
        tokens_BL = torch.as_tensor(batch["tokens_BL"], dtype=torch.long)
        values: dict[str, Any] = {"input_ids": tokens_BL, "labels": tokens_BL}
        if model == "qwen2_vl":
            values["pixel_values"] = torch.as_tensor(batch["patches_BPK"]).flatten(0, 1)
            values["image_grid_thw"] = torch.tensor([GRID] * len(tokens_BL))
            if int(transformers.__version__.partition(".")[0]) >= 5:
                values["mm_token_type_ids"] = (tokens_BL == IMAGE).int()
        inputs.append(values)

    def one(number: int) -> float:
        loss = call(**inputs[number % 2], use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return one


def held(name: str) -> int:
    """Bytes of memory of this process: VmHWM, the most at once, or VmRSS, now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def work(side: str, model: str, folder: Path, asked: argparse.Namespace, pipe: Connection) -> None:
    """A process of one side: it steps when it is told a number, and tells loss, seconds and the most bytes held."""
    cores = sorted(os.sched_getaffinity(0))[: asked.threads]
    os.sched_setaffinity(0, cores)  # XLA makes as many threads as it sees cores
    try:
        given = batches(model, asked.rows, asked.length)
        if side == "ours":
            import jax  # noqa: F401  what an import holds is not the step's

            sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
            import ain_jax.stages.registry  # noqa: F401
            from ain_jax.launching.machine import keep_memory

            keep_memory()  # as every run on a CPU does
        else:
            import torch
            import transformers  # noqa: F401

            torch.set_num_threads(asked.threads)
        begun = held("VmRSS")
        ctypes.CDLL(None).malloc_trim(0)
        if side == "ours":
            one = our_step(model, folder, given, asked.remat)
        else:
            one = their_step(model, folder, given, side == "compiled")
        now = CLOCKS[asked.clock]
        pipe.send("ready")
        while (number := pipe.recv()) is not None:
            if number == 2:  # compiled and warm: from here on the most that is held counts
                gc.collect()
                ctypes.CDLL(None).malloc_trim(0)
                Path("/proc/self/clear_refs").write_text("5")
            start = now()
            loss = one(number)
            pipe.send((loss, now() - start, held("VmHWM") - begun))
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}")


def measure(model: str, sides: list[str], given: argparse.Namespace) -> dict[str, Any]:
    """By side: the losses, the seconds of each counted step and the most memory, or why it failed."""
    context = multiprocessing.get_context("spawn")
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as made:
        save(model, Path(made))
        pipes, processes = {}, []
        for side in sides:
            pipes[side], other = context.Pipe()
            arguments = (side, model, Path(made), given, other)
            processes.append(context.Process(target=work, args=arguments, daemon=True))
            processes[-1].start()
            said = pipes[side].recv()  # one opens the model after another
            found[side] = {"losses": [], "seconds": [], "bytes": 0} if said == "ready" else said
        for number in range(given.steps + 2):
            turn = sides[number % len(sides) :] + sides[: number % len(sides)]
            for side in turn:
                if isinstance(found[side], str):
                    continue
                pipes[side].send(number)
                said = pipes[side].recv()
                if isinstance(said, str):
                    found[side] = said
                    continue
                loss, seconds, most = said
                found[side]["losses"].append(loss)
                if number >= 2:
                    found[side]["seconds"].append(seconds)
                    found[side]["bytes"] = max(found[side]["bytes"], most)
        for pipe, process in zip(pipes.values(), processes, strict=True):
            with contextlib.suppress(BrokenPipeError):  # a side that failed has gone
                pipe.send(None)
            process.join()
    return found


def main(given: argparse.Namespace) -> int:
    given.threads = min(given.threads or len(os.sched_getaffinity(0)), len(os.sched_getaffinity(0)))
    console, rows, wrong = Console(width=None if sys.stdout.isatty() else 120), [], []
    title = (
        f"a training step, float32, {given.rows} rows of {given.length} tokens, {given.threads} threads each, "
        f"{given.clock} time, medians of {given.steps}; ours with remat {given.remat}; ratios are ours / theirs"
    )
    table = Table("model", "side", title=title)
    for column in ("s a step", "least to most", "MB", "time ratio", "memory ratio", "losses"):
        table.add_column(column, justify="right")
    for model in given.model:
        found = measure(model, ["ours", *given.peers], given)
        mine = found["ours"]
        if isinstance(mine, str):
            raise SystemExit(f"ours failed on {model}: {mine}")
        for side, values in found.items():
            row: dict[str, Any] = {"model": model, "side": side}
            if isinstance(values, str):
                table.add_row(model, side, *["-"] * 5, values)
                rows.append(row | {"failed": values})
                continue
            seconds = values["seconds"]
            cells = [f"{statistics.median(seconds):.3f}", f"{min(seconds):.3f} to {max(seconds):.3f}"]
            cells.append(f"{values['bytes'] / 1e6:.0f}")
            if side == "ours":
                cells += ["", "", f"{values['losses'][0]:.4f} to {values['losses'][-1]:.4f}"]
            else:
                ratio = statistics.median(a / b for a, b in zip(mine["seconds"], seconds, strict=True))
                apart = max(abs(a / b - 1) for a, b in zip(mine["losses"], values["losses"], strict=True))
                memory = mine["bytes"] / values["bytes"]
                row |= {"time_ratio": ratio, "memory_ratio": memory, "losses_apart": apart}
                cells += [f"{ratio:.2f}", f"{memory:.2f}", f"apart by {apart:.1e}"]
                if not apart < TOLERANCE:
                    wrong.append(f"{model}: the losses of {side} differ by {apart:.1e} of themselves")
            table.add_row(model, side, *cells)
            rows.append(row | values)
        table.add_section()
    console.print(table)
    if given.json:
        given.json.write_text(json.dumps({"title": title, "rows": rows}))
    if wrong:
        print("not the same work: " + "; ".join(wrong), file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=("qwen2", "qwen2_vl"), default=["qwen2", "qwen2_vl"])
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=7, help="counted steps; two more warm up")
    parser.add_argument("--threads", type=int, help="of each side; all cores where none is given")
    parser.add_argument("--remat", default="dots", help="what ours keeps for the backward pass: Model.remat")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall")
    parser.add_argument("--peers", nargs="+", choices=("eager", "compiled"), default=["eager", "compiled"])
    parser.add_argument("--json", type=Path)
    sys.exit(main(parser.parse_args()))
