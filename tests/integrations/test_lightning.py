"""Lightning's Trainer under a tuner: a stopped run goes on bit for bit, windows, and what is refused."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch

import selectune as st
from selectune.errors import BaseMismatchError, CheckpointError, ConfigError, IntegrityError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    L = pytest.importorskip("lightning.pytorch", reason="Lightning is not installed")

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),  # Lightning's advice: workers, loggers, folders
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
EPOCHS, BATCHES = 3, 4
HEAD = st.Scope(train_fully=("4.*",))


def id3(passes=1):
    return st.id3(30, EPOCHS * BATCHES // passes)


class Task(L.LightningModule):
    def __init__(self, make, passes=1, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.net = torch.nn.Sequential(
            torch.nn.Linear(6, 12), torch.nn.BatchNorm1d(12), torch.nn.Tanh(), torch.nn.Dropout(0.2),
            torch.nn.Linear(12, 3),
        )  # fmt: skip
        self.tuner = st.attach(self.net, make(), accumulation_steps=passes)
        self.losses = []

    def training_step(self, batch, number):
        torch.manual_seed(self.current_epoch * 100 + number)
        loss = self.net(batch[0]).square().mean()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.tuner.parameters(), lr=1e-2)


@pytest.mark.parametrize("first", [True, False])
def test_an_average_of_weights_beside_the_callback(tmp_path, first):
    """It copies the module, with the tuner that the module holds and what keeps weights out of it."""
    from lightning.pytorch.callbacks import EMAWeightAveraging

    from selectune.integrations.lightning import SelectuneCallback

    task, plain = Task(id3), Task(id3)
    ours = [SelectuneCallback(task.tuner), EMAWeightAveraging(decay=0.9)]
    options = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    options |= {"enable_checkpointing": False, "enable_model_summary": False}
    L.Trainer(callbacks=ours if first else ours[::-1], **options).fit(task, loader())
    L.Trainer(callbacks=[SelectuneCallback(plain.tuner)], **options).fit(plain, loader())
    assert task.losses == plain.losses


def loader():
    rows = torch.utils.data.TensorDataset(torch.randn(8 * BATCHES, 6, generator=torch.Generator().manual_seed(1)))
    return torch.utils.data.DataLoader(rows, batch_size=8)


def fitted(folder, make=id3, passes=1, epochs=EPOCHS, ckpt=None, seed=0, task=None, known=True, callbacks=(), **more):
    from selectune.integrations.lightning import SelectuneCallback

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    task = task or Task(make, passes, seed)
    keep = L.callbacks.ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=epochs, accumulate_grad_batches=passes, default_root_dir=folder,
        callbacks=[*([SelectuneCallback(task.tuner)] if known else []), *callbacks, keep],
        logger=more.pop("logger", False), enable_progress_bar=False, enable_model_summary=False, **more,
    )  # fmt: skip
    trainer.fit(task, loader(), ckpt_path=ckpt)
    return task


def bits(task):
    widths = {4: torch.int32, 8: torch.int64}
    return {name: t.detach().clone().view(widths[t.element_size()]) for name, t in task.net.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


CASES = {
    "id3": {},
    "a head": {"make": lambda: st.id3(30, EPOCHS * BATCHES, scope=HEAD)},
    "repeat-d3": {"make": lambda: st.repeat_d3(30, EPOCHS * BATCHES)},
    "rigl": {"make": lambda: st.rigl(30, EPOCHS * BATCHES, every=2)},
    "in a dense phase": {"make": lambda: st.lt_sft(30, EPOCHS * BATCHES, dense=9)},
    "accumulation": {"make": lambda: id3(2), "passes": 2},
}


@pytest.mark.parametrize("case", CASES)
def test_a_stopped_run_goes_on(tmp_path, case):
    straight = fitted(tmp_path / "straight", **CASES[case])
    first = fitted(tmp_path / "first", epochs=1, **CASES[case])
    file = tmp_path / "first" / "epoch=0.ckpt"
    assert torch.load(file, weights_only=True)["callbacks"]
    second = fitted(tmp_path / "second", ckpt=file, **CASES[case])
    assert same(bits(second), bits(straight))
    assert first.losses + second.losses == straight.losses
    assert second.tuner.delta().to_bytes() == straight.tuner.delta().to_bytes()
    assert second.tuner.step == straight.tuner.step == EPOCHS * BATCHES // CASES[case].get("passes", 1)
    assert second.tuner.verify() == straight.tuner.verify()
    again = fitted(tmp_path / "third", ckpt=file, task=second, **CASES[case])  # back, in one process
    assert same(bits(again), bits(straight))


def test_the_delta_lies_beside(tmp_path):
    task = fitted(tmp_path)
    for epoch in range(EPOCHS):
        assert st.load(tmp_path / f"epoch={epoch}.delta.safetensors").selected == 10 * (epoch + 1)
    assert st.load(tmp_path / "epoch=2.delta.safetensors").to_bytes() == task.tuner.delta().to_bytes()


def test_the_delta_goes_with_its_checkpoint(tmp_path):
    best = L.callbacks.ModelCheckpoint(tmp_path / "last", filename="{epoch}", save_top_k=1, monitor="epoch", mode="max")
    task = Task(id3)
    task.on_train_epoch_end = lambda: task.log("epoch", float(task.current_epoch))
    fitted(tmp_path, task=task, callbacks=[best])
    assert sorted(path.name for path in (tmp_path / "last").iterdir()) == ["epoch=2.ckpt", "epoch=2.delta.safetensors"]


def test_a_logger_gets_the_counts(tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    fitted(tmp_path, logger=CSVLogger(tmp_path, name="log"), log_every_n_steps=1)
    lines = next(tmp_path.glob("log/*/metrics.csv")).read_text().splitlines()
    at = lines[0].split(",").index("selected")
    counts = [float(line.split(",")[at]) for line in lines[1:] if line.split(",")[at]]
    assert counts[0] > 0
    assert counts[-1] == 30
    assert "quota" in lines[0]


def test_windows_select_on_the_whole_gradient(tmp_path):
    """What Lightning accumulates is what one larger batch gives: the support of a plain loop."""
    task = fitted(tmp_path, make=lambda: st.id3(30, 1), passes=BATCHES, epochs=1)
    other = Task(lambda: st.id3(30, 1), BATCHES)
    optimizer = other.configure_optimizers()
    for number, batch in enumerate(loader()):
        torch.manual_seed(number)
        (other.net(batch[0]).square().mean() / BATCHES).backward()
    optimizer.step()
    assert task.tuner.events == {}
    ours, theirs = task.tuner.support, other.tuner.support
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture
def stopped(tmp_path):
    fitted(tmp_path / "first", epochs=1)
    return tmp_path / "first" / "epoch=0.ckpt"


def refused(tmp_path, ckpt, error, said, **how):
    task = Task(how.pop("make", id3), how.get("passes", 1), how.pop("seed", 0))
    before = bits(task)
    with pytest.raises(error, match=said):
        fitted(tmp_path / "again", ckpt=ckpt, task=task, **how)
    assert same(bits(task), before)
    assert task.tuner.step == 0
    task.tuner.verify()


def test_another_run_and_another_base(tmp_path, stopped):
    refused(tmp_path, stopped, ConfigError, "its method is", make=lambda: st.pafi(30))
    refused(tmp_path, stopped, BaseMismatchError, "another base", seed=1)


def test_a_checkpoint_without_a_state(tmp_path):
    fitted(tmp_path / "first", epochs=1, known=False)
    refused(tmp_path, tmp_path / "first" / "epoch=0.ckpt", ConfigError, "made without SelectuneCallback")


def test_weights_that_were_changed(tmp_path, stopped):
    content = torch.load(stopped, weights_only=True)
    content["state_dict"]["net.0.weight"][1, 1] += 1
    torch.save(content, stopped)
    refused(tmp_path, stopped, CheckpointError, "the sha256 that it was written with")
    del content["selectune_digest"]
    torch.save(content, stopped)
    refused(tmp_path, stopped, IntegrityError, r"1 of the \d+ tensors in the checkpoint .*: 0\.weight\.")


@pytest.mark.parametrize("where", ["optimizer_states", "callbacks", "loops"])
def test_content_that_was_changed(tmp_path, stopped, where):
    content = torch.load(stopped, weights_only=True)

    def change(value):
        """The first number or tensor below."""
        for key in value if isinstance(value, dict) else range(len(value)):
            if isinstance(value[key], torch.Tensor) and value[key].numel():
                value[key] = value[key] + 1
                return True
            if isinstance(value[key], int | float):
                value[key] += 1
                return True
            if isinstance(value[key], dict | list) and change(value[key]):
                return True
        return False

    assert change(content[where])
    torch.save(content, stopped)
    refused(tmp_path, stopped, CheckpointError, "damaged")


def test_accumulation_must_agree(tmp_path):
    with pytest.raises(ConfigError, match=r"accumulate_grad_batches=2 .* accumulation_steps=1"):
        fitted(tmp_path, task=Task(id3), passes=2)
    scheduler = L.callbacks.GradientAccumulationScheduler({0: 1, 1: 2})
    with pytest.raises(ConfigError, match=r"accumulate_grad_batches=2 .* accumulation_steps=1"):
        fitted(tmp_path, callbacks=[scheduler])


def test_a_stranger(tmp_path):
    from selectune.integrations.lightning import SelectuneCallback

    callback = SelectuneCallback(Task(id3).tuner)
    with pytest.raises(ConfigError, match="not part of the Task"):
        fitted(tmp_path, known=False, callbacks=[callback])
