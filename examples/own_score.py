"""A score of your own, from outside the package: composed into a method, trained, and held against ID3 and chance.

    python examples/own_score.py

It runs on the CPU in seconds and needs nothing but selectune. The score here is |w g|, taken at every step: to first
order, the change of the loss if the weight were set to 0.
"""

import torch

import selectune as st
from selectune.schedule import Increment

STEPS, BUDGET = 100, 60


@st.score(reads="gradient", above=0.0)
def taylor(weight: torch.Tensor, gradient: torch.Tensor, power: float = 1.0) -> torch.Tensor:
    """|w g|^power: a score of 0 is never selected."""
    return (weight * gradient).abs() ** power


METHODS = {
    "taylor": st.Method(score=taylor(), schedule=Increment(budget=BUDGET, steps=STEPS), name="taylor"),
    "id3": st.id3(budget=BUDGET, steps=STEPS),
    "random": st.random(budget=BUDGET),
}
x = torch.randn(512, 8, generator=torch.Generator().manual_seed(1))
y = x[:, 0] * x[:, 1]

for name, method in METHODS.items():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
    tuner = st.attach(model, method, seed=0)
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=2e-2)
    loss = torch.zeros(())
    for _ in range(2 * STEPS):
        loss = torch.nn.functional.mse_loss(model(x).squeeze(1), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"{name:<8} selected {tuner.selected} of {tuner.budget}, loss {loss.item():.3f}")
