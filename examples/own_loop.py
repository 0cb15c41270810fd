"""ID3 in a loop of your own: train 60 scalars of a small model, save them as a delta, take them off again.

    python examples/own_loop.py

It runs on the CPU in seconds and needs nothing but selectune. The delta is written to a temporary folder.
"""

import tempfile

import torch

import selectune as st


def data(rows: int, largest: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of four numbers, and which of them is the largest or the smallest."""
    x = torch.randn(rows, 4)
    return x, x.argmax(dim=1) if largest else x.argmin(dim=1)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int, largest: bool) -> None:
    for _ in range(steps):
        x, y = data(64, largest)
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def accuracy(model: torch.nn.Module) -> float:
    x, y = data(2000, largest=False)
    return (model(x).argmax(dim=1) == y).float().mean().item()


torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
train(model, torch.optim.AdamW(model.parameters(), lr=1e-2), steps=200, largest=True)  # the base
print(f"base, on the new task: {accuracy(model):.2f}")

size = sum(parameter.numel() for parameter in model.parameters())
tuner = st.attach(model, st.id3(budget=60, steps=200))
train(model, torch.optim.AdamW(tuner.parameters(), lr=1e-2), steps=300, largest=False)
print(f"tuned, {tuner.selected} of {size} scalars: {accuracy(model):.2f}")
print(f"scalars that differ from the base: {tuner.verify().changed}")
with tempfile.TemporaryDirectory() as folder:
    print(f"file: {tuner.save(folder).stat().st_size} bytes")
    tuner.detach()  # the model is the base again, bit for bit
    with st.load(folder).applied(model):
        print(f"base and delta: {accuracy(model):.2f}")
print(f"reverted: {accuracy(model):.2f}")
