"""What all tests share: the CPU, strictness, a store of compiled functions, a tokenizer and data at their smallest."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tiny models run for milliseconds and compile for seconds: code that is not optimised comes sooner.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import jax
import pytest

from ain_jax import sample
from ain_jax.data.builders.sample_records import SampleParams

# Files that take minutes: begun first, so that no process works on one while the others have nothing left to do.
LONG = (
    "test_whole_run.py",
    "test_tpu.py",
    "test_sharding.py",
    "test_processes.py",
    "test_twins.py",
    "test_published_folder.py",
    "test_extended_folder.py",
)

TEXTS = ["ما هذه الكلمة؟ هذه الكلمة هي الحرية", "اقرأ الكلمة", "هذه هي الحرية"] * 2


def pytest_configure(config):
    jax.config.update("jax_numpy_rank_promotion", "raise")
    # Most of the time of these tests is compilation; what was compiled before is read from here.
    cache = getattr(config, "cache", None)
    if cache is not None:
        jax.config.update("jax_compilation_cache_dir", str(cache.mkdir("jax")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture
def strict_dtypes():
    """No dtype is promoted unseen; for our own functions, since optax and orbax promote."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory) -> Path:
    """Mistral's vocabulary with fifteen Arabic pieces more."""
    from ain_jax.tokenizer.extend import extend

    base = sample.FOLDER / "tokenizer" / "mistral_v1.model"
    return extend(base, TEXTS, out_dir=tmp_path_factory.mktemp("tokenizer") / "extended", pieces=15).folder


@pytest.fixture(scope="session")
def small_tokenizer_folder(tmp_path_factory) -> Path:
    """Sixty words: no more than any tiny model has rows."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("words")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(60)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore
    words.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}', "utf-8")
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder):
    from ain_jax.tokenizer.chat import load_tokenizer

    return load_tokenizer(tokenizer_folder)


@pytest.fixture(scope="session")
def sample_params() -> SampleParams:
    """So few records that each kind is made in a second."""
    return SampleParams(
        read_pictures=24,
        read_test_pictures=6,
        renderings=1,
        test_renderings=1,
        preference_pairs=6,
        preference_test_pairs=4,
    )


@pytest.fixture(scope="session")
def sample_records(sample_params, tmp_path_factory):
    """`sample_records(kind, split)`: the records of one kind of the sample, built once."""
    from ain_jax.data.builders import sample as builder

    folder = tmp_path_factory.mktemp("sample")
    return lambda kind, split="train": builder.records(builder.build(kind, folder, sample_params), split)
