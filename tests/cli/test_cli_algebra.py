"""The commands of `selectune delta` that combine deltas, on files that `selectune train` wrote."""

from __future__ import annotations

import json

import pytest
from cli_kit import call

import selectune as st
from selectune.delta.combine import algebra
from selectune.models.restore import Source, load_base

pytest_plugins = ("tiny_fixtures",)


def data_of(*args):
    return json.loads(call(*args, "--json").stdout)


@pytest.fixture(scope="module")
def pair(tiny, data, tmp_path_factory):
    """Two deltas of one base: the same head, another choice of scalars."""
    made = []
    for method in ("id3", "pafi"):
        out = tmp_path_factory.mktemp("runs") / method
        call(
            "train", "--model", tiny, "--task", "glue/rte", "--method", method, "--budget", "0.2k", "--lr", "5e-3",
            "--max-steps", 4, "--batch-size", 8, "--max-length", 24, "--seed", 3, "--data", data, "--out", out,
        )  # fmt: skip
        made.append(out)
    return made


def base(tiny, delta):
    return load_base(Source(str(tiny)), delta, None).model


CASES = {
    "add": (["--weights", "1,0.5"], lambda d, m: algebra.add(d, weights=[1.0, 0.5], base=m)),
    "ties": (["--density", "0.5", "--scale", "0.8"], lambda d, m: algebra.ties(d, density=0.5, scale=0.8, base=m)),
    "dare": (["--drop", "0.5", "--seed", "9"], lambda d, m: algebra.dare(d, drop=0.5, seed=9, base=m)),
}


@pytest.mark.parametrize("command", CASES)
def test_merges(command, tiny, data, pair, tmp_path):
    options, direct = CASES[command]
    printed = data_of("delta", command, *pair, *options, "--model", tiny, "--out", tmp_path / "out")
    deltas = [st.load(path) for path in pair]
    expected = direct(deltas, base(tiny, deltas[0]))
    found = st.load(printed["delta"])
    assert found == expected
    assert printed["scalars"] == found.selected
    assert printed["bytes"] == found.nbytes == (tmp_path / "out" / "delta.safetensors").stat().st_size
    assert {k: v for k, v in printed["conflicts"].items() if k != "tensors"} == printed["method"]["conflicts"]
    assert sum(row["shared"] for row in printed["conflicts"]["tensors"].values()) == printed["conflicts"]["shared"]
    assert call("verify", "--model", tiny, "--delta", tmp_path / "out").stdout.startswith("ok: ")
    found = data_of("eval", "--model", tiny, "--delta", tmp_path / "out", "--task", "glue/rte", "--data", data)
    assert 0 <= found["value"] <= 1


def test_scale_by_a_negative_number(tiny, pair, tmp_path):
    printed = data_of("delta", "scale", pair[0], "--by", "-1", "--model", tiny, "--out", tmp_path / "x.safetensors")
    one = st.load(pair[0])
    assert st.load(printed["delta"]).digest == algebra.negate(one, base=base(tiny, one)).digest


def test_overlap(pair):
    printed = data_of("delta", "overlap", *pair)
    found = algebra.overlap(*(st.load(path) for path in pair))
    assert (printed["first"], printed["second"], printed["shared"]) == (200, 200, found.shared)
    assert (printed["ratio"], printed["jaccard"]) == (found.ratio, found.jaccard)
    assert sum(row["shared"] for row in printed["tensors"].values()) == found.shared
    assert "Jaccard" in call("delta", "overlap", *pair).stdout
    assert data_of("delta", "overlap", pair[0], pair[0])["jaccard"] == 1.0


def test_people_are_told(tiny, pair, tmp_path):
    text = call("delta", "add", *pair, "--model", tiny, "--out", tmp_path).stdout
    assert "scalars are written by several deltas" in text
    assert str(tmp_path) in text


def test_what_cannot_be_combined(tiny, other, pair, tmp_path):
    out = ("--out", tmp_path / "out")
    assert "pass base=the base model" in call("delta", "add", *pair, *out, code=1).stderr
    assert "not the base" in call("delta", "add", *pair, "--model", other, *out, code=1).stderr
    assert "--weights 1;2" in call("delta", "add", *pair, "--weights", "1;2", *out, code=2).stderr
    assert "weights must have" in call("delta", "add", *pair, "--weights", "1", *out, code=2).stderr
    assert "density" in call("delta", "ties", *pair, "--density", "2", *out, code=2).stderr
    assert "drop" in call("delta", "dare", *pair, "--drop", "1", *out, code=2).stderr
    call("delta", "overlap", pair[0], tmp_path / "nothing", code=1)
    assert not (tmp_path / "out").exists()
