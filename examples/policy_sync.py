"""A loop like GRPO's: a server samples, the trainer learns, and each step sends the server the changed scalars only.

    python examples/policy_sync.py

The policy is a table of next tokens. With TRL and vLLM, sampling and loss differ; the updates have vLLM's shape.
"""

import copy

import torch

import selectune as st

WANTED, STEPS = 7, 60
torch.manual_seed(0)
policy = torch.nn.Sequential(
    torch.nn.Embedding(12, 16), torch.nn.Linear(16, 64), torch.nn.Tanh(), torch.nn.Linear(64, 12)
)
server = st.sync.Replica(copy.deepcopy(policy))  # another process in truth, which has loaded the same base


@torch.no_grad()
def sampled(group=16, length=6):
    tokens = torch.zeros(group, 1, dtype=torch.int64)
    for _ in range(length):
        tokens = torch.cat((tokens, torch.multinomial(server.model(tokens[:, -1]).softmax(-1), 1)), 1)
    return tokens


tuner = st.attach(policy, st.id3(budget=200, steps=STEPS))
stream = st.sync.PatchStream(tuner)
optimizer = torch.optim.AdamW(tuner.parameters(), lr=5e-2)
rewards, sent = [], 0
for _ in range(STEPS):
    tokens = sampled()
    reward = (tokens[:, 1:] == WANTED).float().mean(1)
    advantage = (reward - reward.mean()) / (reward.std() + 1e-4)
    logs = policy(tokens[:, :-1]).log_softmax(-1).gather(2, tokens[:, 1:, None]).squeeze(2)
    (-advantage[:, None] * logs).mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    update = stream.update()
    server.apply(st.sync.WeightUpdate.from_bytes(update.to_bytes()))
    rewards, sent = [*rewards, reward.mean().item()], sent + update.scalars

print(f"reward {sum(rewards[:5]) / 5:.2f}, then {sum(rewards[-5:]) / 5:.2f}")
print(f"scalars sent a step: {sent // STEPS} of {sum(p.numel() for p in server.model.parameters())}")
weights = zip(server.model.parameters(), (policy.get_parameter(n) for n in server.model.state_dict()), strict=True)
print(f"the server has the trainer's bits: {all(torch.equal(a, b) for a, b in weights)}")
