"""Two deltas of one base: add them, merge them, compare them, and serve them from one model.

    python examples/combine_deltas.py

It runs on the CPU in seconds and needs nothing but selectune.
"""

import torch

import selectune as st

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 2))
x = torch.randn(256, 8)


def trained(target: torch.Tensor) -> st.Delta:
    """A delta of 60 scalars that moves the model's output towards a target."""
    tuner = st.attach(model, st.id3(budget=60, steps=60))
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=2e-2)
    for _ in range(100):
        (model(x) - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    delta = tuner.delta()
    tuner.detach()
    return delta


left, right = trained(torch.tensor([1.0, 0.0])), trained(torch.tensor([0.0, 1.0]))
shared = st.algebra.overlap(left, right)
print(f"shared scalars: {shared.shared} of {shared.first} and {shared.second}")
print(f"opposed: {st.algebra.conflicts([left, right], base=model).opposed}")

shelf = st.Shelf(model, {
    "left": left,
    "right": right,
    "half left": st.algebra.scale(left, 0.5, base=model),
    "mean": st.algebra.add([left, right], weights=[0.5, 0.5], base=model),
    "ties": st.algebra.ties([left, right], density=0.8, base=model),
})  # fmt: skip
for name in (None, *shelf.names):
    with shelf.using(name) as served, torch.no_grad():
        first, second = served(x).mean(dim=0).tolist()
        print(f"{name or 'base':<10} {first:5.2f} {second:5.2f}")
st.switch(model, None)  # the base again, bit for bit
