"""What the builders ask tensorflow-datasets for: the features of a record, and silence."""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from absl import logging as absl_logging
from tensorflow_datasets.core.utils import tqdm_utils

from ain_jax.data.builders.coding import TEXTS
from ain_jax.data.formats import NO_MEDIA, Record, to_example


def features() -> tfds.features.FeaturesDict:
    """The features of a record: pictures and frames as encoded files of any format."""
    text = tfds.features.Text()
    pictures = tfds.features.Sequence(tfds.features.Image(shape=(None, None, 3)))
    return tfds.features.FeaturesDict(
        {
            **dict.fromkeys(TEXTS, text),
            "messages": tfds.features.Sequence({"role": text, "content": text}),
            "images": pictures,
            "frames": pictures,
            "frame_counts": tfds.features.Sequence(np.int64),
            "desirable": tfds.features.Scalar(np.int64),
        }
    )


def all_features(record: Record) -> dict[str, Any]:
    """The record as `features` wants it, with every key."""
    return {**NO_MEDIA, **to_example(record)}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """tensorflow-datasets without its bars and its warning that a config is of our making."""
    bars, level = tqdm_utils._active, absl_logging.get_verbosity()
    tfds.disable_progress_bar()
    absl_logging.set_verbosity(absl_logging.ERROR)
    try:
        yield
    finally:
        tqdm_utils.display_progress_bar(bars)
        absl_logging.set_verbosity(level)
