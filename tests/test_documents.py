"""YAML and JSON that people write: words stay words, numbers are numbers, and what could surprise is refused."""

from __future__ import annotations

import pytest

from selectune.documents import MAX_YAML, read_document
from selectune.errors import ConfigError


def read(path, text):
    path.write_text(text)
    return read_document(path, error=ConfigError, limit=1 << 20)


def test_yaml_is_read_as_version_1_2_and_json_has_the_same_values(tmp_path):
    found = read(
        tmp_path / "a.yaml", "on: lora:r=2\nyes: no\nflag: true\nlr: 1e-3\nshare: 0.17%\nn: 5\nnone: null\nx: .5\n"
    )
    assert found == {
        "on": "lora:r=2", "yes": "no", "flag": True, "lr": 1e-3, "share": "0.17%", "n": 5, "none": None, "x": 0.5,
    }  # fmt: skip
    assert type(found["n"]) is int
    assert read(tmp_path / "a.json", '{"on": "lora:r=2", "lr": 1e-3}') == {"on": "lora:r=2", "lr": 1e-3}


@pytest.mark.parametrize(
    "text, why",
    [
        ("a: &x 1\nb: *x", "aliases"),
        ("a: 1\na: 2", "a is given twice"),
        ("[1", "neither YAML nor JSON"),
        ("a: !!python/object:os.system x", "neither YAML nor JSON"),
        ("# " + "x" * MAX_YAML, "of YAML at most"),
    ],
)
def test_what_could_surprise_is_refused(tmp_path, text, why):
    with pytest.raises(ConfigError, match=why):
        read(tmp_path / "a.yaml", text)
