"""The state of a run between steps: refusals, and what its file may contain."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load, save
from train_kit import Mixed, bits, mixed_loss, same, steps, tokens

import selectune as st
from selectune.adapters import put_on
from selectune.errors import BaseMismatchError, ConfigError, DeltaError, DeltaFormatError, TunerError
from selectune.train import read_state, write_state


def begin(method=None, **arguments):
    torch.manual_seed(0)
    model = Mixed()
    tuner = st.attach(model, method or st.repeat_d3(60, 6), **arguments)
    return model, tuner, torch.optim.AdamW(tuner.parameters(), lr=1e-2)


def after(count, **arguments):
    model, tuner, optimizer = begin(**arguments)
    for _ in steps(model, optimizer, count):
        pass
    optimizer.zero_grad()
    return model, tuner, optimizer


def test_the_tensors_fit_into_safetensors():
    model, tuner, optimizer = after(3)
    state = tuner.state_dict()
    packed = load(save(state["tensors"]))
    model_2, tuner_2, optimizer_2 = begin()
    tuner_2.load_state_dict({"info": state["info"], "tensors": packed})
    optimizer_2.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert same(bits(model), bits(model_2))
    for _ in zip(steps(model, optimizer, 3, 3), steps(model_2, optimizer_2, 3, 3), strict=True):
        assert same(bits(model), bits(model_2))


def test_the_state_is_a_copy():
    model, tuner, optimizer = after(2)
    state = tuner.state_dict()
    before = {key: tensor.clone() for key, tensor in state["tensors"].items()}
    for _ in steps(model, optimizer, 2, 2):
        pass
    assert all(torch.equal(tensor, before[key]) for key, tensor in state["tensors"].items())


def test_within_a_window_it_is_refused():
    model, tuner, optimizer = begin(accumulation_steps=2)
    mixed_loss(model, tokens(0)).backward()
    with pytest.raises(TunerError, match="after 1 of 2 backward passes"):
        tuner.state_dict()
    mixed_loss(model, tokens(1)).backward()
    with pytest.raises(TunerError, match="after 2 of 2 backward passes"):
        tuner.state_dict()
    optimizer.step()
    tuner.state_dict()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"method": st.repeat_d3(60, 7)}, "its method is"),
        ({"method": st.repeat_d3(61, 6)}, "its method is"),
        ({"seed": 1}, "its seed is 0, this tuner's is 1"),
        ({"accumulation_steps": 2}, "its accumulation_steps is 1, this tuner's is 2"),
    ],
)
def test_the_state_of_another_run(arguments, said):
    state = after(2)[1].state_dict()
    model, tuner, _ = begin(**arguments)
    before = bits(model)
    with pytest.raises(ConfigError, match=said):
        tuner.load_state_dict(state)
    assert same(bits(model), before)
    assert tuner.step == 0


def test_another_base():
    state = after(2)[1].state_dict()
    torch.manual_seed(0)
    model = Mixed()
    with torch.no_grad():
        model.linear.weight[0, 0] += 1
    tuner = st.attach(model, st.repeat_d3(60, 6))
    before = bits(model)
    with pytest.raises(BaseMismatchError, match=r"another base: 1 tensors differ \(linear.weight\)"):
        tuner.load_state_dict(state)
    assert same(bits(model), before)


def test_damaged_states():
    state = after(2)[1].state_dict()
    key = next(k for k, t in state["tensors"].items() if k.endswith(".flat") and t.numel())
    damages = {
        "offsets": state["tensors"]["offsets"][:-1],
        key: state["tensors"][key] + 10**9,
        key.replace("flat", "slot"): state["tensors"][key.replace("flat", "slot")][:-1],
    }
    model, tuner, _ = begin()
    before = bits(model)
    for name, tensor in damages.items():
        with pytest.raises(ConfigError, match="The state's"):
            tuner.load_state_dict({"info": state["info"], "tensors": state["tensors"] | {name: tensor}})
    for wrong in ({}, {"info": 1, "tensors": {}}, {"info": {**state["info"], "version": 1}, "tensors": {}}):
        with pytest.raises(ConfigError, match=r"keys|version 1"):
            tuner.load_state_dict(wrong)
    assert same(bits(model), before)


def test_a_step_that_a_scaler_skipped_leaves_no_trace():
    """The state is then that of the step before, with nothing selected, as the next backward pass would find it."""
    model, tuner, optimizer = after(2, method=st.id3(60, 6))
    whole = tuner.state_dict()
    mixed_loss(model, tokens(9)).backward()
    optimizer.zero_grad()  # no step
    skipped = tuner.state_dict()
    assert skipped["info"]["events"] == {"skipped_steps": 1}
    assert (skipped["info"]["step"], tuner.selected) == (2, 20)
    for key, tensor in whole["tensors"].items():
        assert torch.equal(tensor, skipped["tensors"][key]) or key in ("offsets", "start", "free"), key
    for _ in steps(model, optimizer, 4, 2):
        pass
    assert (tuner.step, tuner.selected) == (6, 60)
    assert tuner.events == {"skipped_steps": 1}


def layers():
    torch.manual_seed(0)
    layer = torch.nn.ModuleDict({"up": torch.nn.Linear(8, 16), "down": torch.nn.Linear(16, 8)})
    return torch.nn.ModuleDict({"layers": torch.nn.ModuleList([layer])})


ROLES = {"layers.#.up": "ffn1", "layers.#.down": "ffn2"}
ON = {
    "parallel:reduction=2,init=normal": (st.id3(20, 6), st.repeat_d3(20, 6), st.rigl(20, 6, every=2), st.pafi(20)),
    "lora:r=2,targets=ffn1+ffn2": (st.id3(20, 6), st.increment_pafi(20, 6), st.lt_sft(20, 6, dense=3), st.full()),
}


@pytest.mark.parametrize("on", ON)
@pytest.mark.parametrize("which", range(4))
def test_on_a_module_through_a_file(on, which, tmp_path):
    if on.startswith("lora"):
        pytest.importorskip("peft")

    def start():
        model = put_on(layers(), on, 5, roles=ROLES).model
        tuner = st.attach(model, ON[on][which])
        return model, tuner, torch.optim.AdamW(tuner.parameters(), lr=1e-2)

    def go_on(model, optimizer, numbers):
        layer = model["layers"][0]
        for number in numbers:
            x = torch.randn(4, 8, generator=torch.Generator().manual_seed(number))
            layer["down"](layer["up"](x).relu()).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    model, tuner, optimizer = start()
    go_on(model, optimizer, range(2))
    file = write_state(tmp_path / "state.safetensors", tuner.state_dict())
    moments = copy.deepcopy(optimizer.state_dict())
    go_on(model, optimizer, range(2, 6))
    again, second, other = start()
    other.load_state_dict(moments)  # before the tuner's, as the Trainer does
    second.load_state_dict(read_state(file))
    go_on(again, other, range(2, 6))
    assert same(bits(again), bits(model))
    assert second.delta().to_bytes() == tuner.delta().to_bytes()


def test_files_that_hold_no_state(tmp_path):
    file = write_state(tmp_path / "state.safetensors", after(2)[1].state_dict())
    whole = file.read_bytes()
    assert write_state(tmp_path / "again.safetensors", read_state(file)).read_bytes() == whole
    for number in range(0, len(whole), len(whole) // 40):
        file.write_bytes(whole[:number] + bytes([whole[number] ^ 16]) + whole[number + 1 :])
        with pytest.raises(DeltaFormatError, match="damaged"):
            read_state(file)
        file.write_bytes(whole[:number])
        with pytest.raises(DeltaFormatError, match="damaged"):
            read_state(file)
    file.write_bytes(save({"a": torch.zeros(2)}))
    with pytest.raises(DeltaFormatError, match="holds no state of a tuner"):
        read_state(file)


def header_of(whole):
    end = 8 + int.from_bytes(whole[:8], "little")
    return json.loads(whole[8:end]), whole[end:]


def with_header(head, rest):
    text = json.dumps(head).encode()
    return len(text).to_bytes(8, "little") + text + rest


HEADERS = {
    "a hole": lambda head: head["offsets"].update(data_offsets=[head["offsets"]["data_offsets"][0] + 4, 10**6]),
    "another dtype": lambda head: head["offsets"].update(dtype="F64"),
    "no dtype": lambda head: head["offsets"].update(dtype=["F32"]),
    "a dtype that is none": lambda head: head["offsets"].update(dtype="I3"),
    "a shape below 0": lambda head: head["offsets"].update(shape=[-60]),
    "a shape of truths": lambda head: head["offsets"].update(shape=[60, True]),
    "a shape without end": lambda head: head["offsets"].update(shape=[1] * 100 + [60]),
    "a shape beyond memory": lambda head: head["free"].update(shape=[0, 2**47, 2**47]),
    "offsets as text": lambda head: head["offsets"].update(data_offsets="0"),
    "no tensor": lambda head: head.update(offsets=None),
    "a key more": lambda head: head["offsets"].update(more=1),
    "no metadata": lambda head: head.pop("__metadata__"),
    "metadata as a list": lambda head: head.update(__metadata__=["selectune_state"]),
    "more metadata": lambda head: head["__metadata__"].update(format="pt"),
    "no info": lambda head: head["__metadata__"].update(selectune_state="{}"),
    "half a pair": lambda head: head["__metadata__"].update(selectune_state='"\ud800"'),
    "deep": lambda head: head["__metadata__"].update(selectune_state="[" * 10**5),
    "an integer without end": lambda head: head["__metadata__"].update(selectune_state="9" * 10**5),
    "NaN": lambda head: head["__metadata__"].update(selectune_state='{"info": NaN, "digest": ""}'),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_that_lie(name, tmp_path):
    file = write_state(tmp_path / "state.safetensors", after(2)[1].state_dict())
    head, rest = header_of(file.read_bytes())
    file.write_bytes(with_header(head, rest))
    read_state(file)  # what follows is refused for what is changed
    HEADERS[name](head)
    file.write_bytes(with_header(head, rest))
    with pytest.raises(DeltaFormatError, match="damaged"):
        read_state(file)


def test_what_is_no_state_file(tmp_path):
    for number, data in enumerate(
        (b"", b"\0" * 8, b"\xff" * 8, b"\x80\x02" + b"a" * 90, (2**26).to_bytes(8, "little"))
    ):
        file = tmp_path / f"{number}.safetensors"
        file.write_bytes(data)
        with pytest.raises(DeltaFormatError, match="has no header"):
            read_state(file)
    with pytest.raises(DeltaFormatError, match="is not a regular file"):
        read_state(tmp_path)
    with pytest.raises(DeltaError, match="no path can hold"):
        read_state("a\0b")


def test_a_seed_of_64_bits_comes_back(tmp_path):
    state = begin(seed=2**64 - 1)[1].state_dict()
    assert read_state(write_state(tmp_path / "state.safetensors", state))["info"] == state["info"]


def test_a_dtype_that_is_not_read_is_not_written(tmp_path):
    state = after(1)[1].state_dict()
    state["tensors"]["buffer.odd"] = torch.zeros(2, dtype=torch.float8_e4m3fnuz)
    with pytest.raises(DeltaError, match=r"buffer\.odd"):
        write_state(tmp_path / "state.safetensors", state)
    assert not list(tmp_path.iterdir())


_PEAK = """
import sys
from selectune.train import read_state
def most():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
read_state(sys.argv[1])
before = most()
read_state(sys.argv[2])
print(1024 * (most() - before))
"""


def test_memory_of_reading(tmp_path):
    """A large state takes little more than its file."""
    state = after(1)[1].state_dict()
    small = write_state(tmp_path / "small.safetensors", state)
    state["tensors"]["offsets"] = torch.zeros(50 << 20)
    large = write_state(tmp_path / "large.safetensors", state)
    run = subprocess.run([sys.executable, "-c", _PEAK, small, large], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 1.5 * large.stat().st_size


def test_a_tuner_shows_the_share_that_it_trains():
    """Tied tensors count once, and the vector of offsets is not counted as one of the model's tensors."""
    model, tuner, _ = after(1, method=st.id3(60, 6))
    total = sum(p.numel() for name, p in model.named_parameters() if "selectune" not in name)
    share = f"10 of {total:,} scalars ({1000 / total:.2f} %)"
    assert repr(tuner) == f"Tuner(id3, selected 10 of 60, step 1; {share})"
    tuner.detach()
    assert share in repr(tuner)
    assert total == sum(p.numel() for p in model.parameters())
