"""The programs that open an export of every family in either version of transformers, on two of the families."""

import families
import numpy as np
import pytest

pytest.importorskip("torch")
import check_export
import write_families

NAMES = ("llama, yarn", "llava_next, llama")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    out = tmp_path_factory.mktemp("families")
    for name in NAMES:
        write_families.write_family(name, families.every()[name], out)
    return out


def test_exports_are_opened_to_the_same_models(place, capsys):
    assert check_export.check_families(place) == []
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" ok")[0].strip() for line in lines] == list(NAMES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("what", ["logits", "pixel_values", "input_ids"])
def test_a_difference_is_told(place, tmp_path, name, what):
    """One number of the reference is changed by ten tolerances."""
    path = next(path for path in place.glob("*.npz") if str(np.load(path)["case"]) == name)
    with np.load(path) as arrays:
        saved = dict(arrays)
    if what not in saved:
        pytest.skip("a text has no pictures")
    saved[what].flat[0] += {"logits": 1e-3, "pixel_values": 1e-5, "input_ids": 1}[what]
    (tmp_path / path.stem).symlink_to(path.with_suffix(""))
    np.savez(tmp_path / path.name, **saved)
    faults = check_export.check_families(tmp_path)
    named = {"logits": "logits", "pixel_values": "pixels", "input_ids": "ids"}[what]
    assert faults and faults[0].startswith(f"{name}: {named} differ by")


def test_what_the_older_version_cannot_compute_is_told(place, capsys, monkeypatch):
    for name in check_export.NOT_IN_OLD:
        assert name in families.every()
    monkeypatch.setattr(check_export, "OLD", True)
    monkeypatch.setattr(check_export, "NOT_IN_OLD", dict.fromkeys(NAMES, "for a reason"))
    assert check_export.check_families(place) == []
    assert capsys.readouterr().out.count("SKIPPED: for a reason") == 2


def test_an_empty_folder_is_no_success(tmp_path):
    assert "holds no *.npz" in check_export.check_families(tmp_path)[0]
