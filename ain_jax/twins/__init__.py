"""What the twins of experiments begin with: the published models in small, at random, and the sample as files."""

from pathlib import Path


def write(folder: Path) -> list[Path]:
    """Write them below the folder: models/ and data/; the places of each."""
    from ain_jax.twins import data, models  # which import jax

    return [*models.write_models(folder / "models"), *data.write_data(folder / "data")]
