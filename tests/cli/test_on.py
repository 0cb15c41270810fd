"""`--on` and the dense peers from the command line: train, eval, verify, show, apply; every name `methods` prints."""

from __future__ import annotations

import json

import pytest
from cli_kit import call

from selectune.adapters import KINDS

pytest.importorskip("peft")
pytest_plugins = ("tiny_fixtures",)


def data_of(*args):
    return json.loads(call(*args, "--json").stdout)


@pytest.fixture
def common(tiny, data, tmp_path):
    out = tmp_path / "out"
    return ("--model", tiny, "--task", "glue/stsb", "--data", data, "--max-steps", 2, "--seed", 3, "--out", out)


@pytest.mark.parametrize("kind", KINDS)
def test_every_peer_by_its_bare_name(common, tiny, data, tmp_path, kind):
    printed = data_of("train", *common, "--method", kind)
    assert (printed["method"], printed["selected"]) == (kind, 0)
    assert printed["trained"] > 0
    found = data_of("eval", "--model", tiny, "--delta", tmp_path / "out", "--task", "glue/stsb", "--data", data)
    assert found["value"] == printed["value"]


def test_a_selection_on_lora(common, tiny, data, tmp_path):
    """ID3 + LoRA: r = 32 at the size of r = 2."""
    out = tmp_path / "out"
    printed = data_of("train", *common, "--method", "id3", "--on", "lora:r=32", "--budget", "1792", "--lr", "1e-3")
    assert (printed["selected"], printed["config"]["on"]) == (1792, "lora:r=32")
    args = ("--model", tiny, "--delta", out)
    assert data_of("eval", *args, "--task", "glue/stsb", "--data", data)["value"] == printed["value"]
    assert data_of("verify", *args)["ok"]
    shown = call("delta", "show", out).stdout
    assert "adapter   lora:alpha=32.0,dropout=0.0,init=zero,r=32,targets=all, seed 3" in shown
    assert data_of("delta", "show", out)["module"]["kind"] == "lora"
    call("delta", "apply", *args, "--out", tmp_path / "merged")
    assert "adapter_config.json" not in {p.name for p in (tmp_path / "merged").iterdir()}
    length = ("--max-length", printed["max_length"])
    merged = data_of("eval", "--model", tmp_path / "merged", "--task", "glue/stsb", "--data", data, *length)
    assert merged["value"] == pytest.approx(printed["value"], abs=0.02)


def test_a_selection_on_an_adapter(common, tiny, tmp_path):
    printed = data_of("train", *common, "--method", "pafi", "--on", "pfeiffer:reduction=16", "--budget", "25%")
    assert 0 < printed["selected"] == printed["budget"]
    assert call("verify", "--model", tiny, "--delta", tmp_path / "out").stdout.startswith("ok: ")
    found = call("delta", "apply", "--model", tiny, "--delta", tmp_path / "out", "--out", tmp_path / "merged", code=2)
    assert "cannot be folded into weights" in found.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--method", "lora:rank=3"), "lora takes no option rank. It takes: r, alpha, dropout, targets"),
        (("--method", "lora", "--on", "pfeiffer"), "nothing goes under it"),
        (("--method", "id3", "--budget", "9", "--on", "lora:r=0"), "r=0 is not allowed"),
        (("--method", "lora", "--budget", "9"), "takes no budget"),
    ],
)
def test_what_is_refused(common, args, message):
    assert message in call("train", *common, *args, code=2).stderr
