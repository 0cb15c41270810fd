"""Shared by the tests of drop-and-grow: a support that is set, and a second, dense and slow form of the rules."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import torch
from torch import nn

import selectune as st
from selectune.schedule import DropGrow
from selectune.select import PerTensor


def one(values):
    """A model of one weight tensor (1, n) whose gradient is the input (1, n)."""
    model = nn.Linear(len(values), 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([values]))
    return model


def plant(tuner, flat, changes):
    """Makes these the entries of the first tensor, moved from the base by `changes`."""
    ledger = tuner.engine.ledger
    ledger.drop(0, torch.ones(ledger.pages[0].flat.shape, dtype=torch.bool))
    ledger.settle()
    slots = ledger.add(torch.zeros(len(flat), dtype=torch.int64), torch.tensor(flat))
    with torch.no_grad():
        ledger.offsets[slots] = torch.tensor(changes)
    tuner.engine.tracker.write_weights()


def changes(tuner):
    """{flat index: value - base} of the first tensor."""
    page = tuner.engine.ledger.pages[0]
    moved = tuner.engine.ledger.values()[page.slot] - page.base
    return dict(zip(page.flat.tolist(), moved.tolist(), strict=True))


def growing(score, budget, steps, **arguments):
    return st.Method(score=score, select=PerTensor(), schedule=DropGrow(budget, steps, **arguments))


class Oracle:
    """Drop and grow on dense float64 gradients, an entry at a time; AdamW with an age per entry, or SM3."""

    def __init__(self, model, support, schedule, lr, decay, kind):
        self.weights = [p for n, p in model.named_parameters() if "selectune" not in n]
        self.base = [p.detach().flatten().numpy().copy() for p in self.weights]
        self.active = support
        self.schedule, self.lr, self.decay, self.kind = schedule, lr, decay, kind
        self.state = {(j, i): [0.0, 0.0, 0] for j, own in enumerate(support) for i in own}
        self.factors = [
            (np.zeros(p.shape[0] if p.ndim > 1 else 1), np.zeros(p.numel() // (p.shape[0] if p.ndim > 1 else 1)))
            for p in self.weights
        ]
        self.window = None  # per tensor {candidate: [sum, sum of squares]}, and how many steps
        self.step = 0

    def value(self, j):
        return self.weights[j].detach().view(-1).numpy()

    def train(self, passes):
        """One step over the dense gradients that `passes` give, each a list of arrays, computed when called."""
        if self.schedule.due(self.step) and self.kind in ("watch", "factors"):
            self.exchange_ahead()
        total = None
        for number, run in enumerate(passes):
            gradients = run()
            if number == 0 and self.kind == "watch" and self.schedule.opens(self.step):
                self.window = [{i: [0.0, 0.0] for i in best(np.abs(g), range(g.size), len(own))}
                               for g, own in zip(gradients, self.active, strict=True)], 0  # fmt: skip
            total = gradients if total is None else [a + b for a, b in zip(total, gradients, strict=True)]
        if self.schedule.due(self.step) and self.kind == "gradient":
            self.exchange([np.abs(g) for g in total], [range(g.size) for g in total])
        if self.window is not None:
            for g, sums in zip(total, self.window[0], strict=True):
                for i, pair in sums.items():
                    pair[0] += g[i]
                    pair[1] += g[i] ** 2
            self.window = self.window[0], self.window[1] + 1
        for j, g in enumerate(total):
            self.update(j, g)
        self.step += 1

    def update(self, j, g):
        w, (r, c) = self.value(j), self.factors[j]
        seen = []
        for i in self.active[j]:
            w[i] -= self.lr * self.decay * (w[i] - self.base[j][i])
            if self.kind == "factors":
                row, column = divmod(i, c.size)
                v = min(r[row], c[column]) + g[i] ** 2
                seen.append((row, column, v))
                w[i] -= self.lr * g[i] / math.sqrt(v + 1e-8) if g[i] else 0.0
                continue
            state = self.state[j, i]
            state[0] = 0.9 * state[0] + 0.1 * g[i]
            state[1] = 0.999 * state[1] + 0.001 * g[i] ** 2
            state[2] += 1
            m, v = state[0] / (1 - 0.9 ** state[2]), state[1] / (1 - 0.999 ** state[2])
            w[i] -= self.lr * m / (math.sqrt(v) + 1e-8)
        for row, column, v in seen:
            r[row], c[column] = max(r[row], v), max(c[column], v)

    def exchange_ahead(self):
        if self.kind == "factors":
            self.exchange([np.outer(r, c).ravel() for r, c in self.factors], None)
            return
        sums, steps = self.window
        self.exchange(
            [np.array([abs(s[i][0]) if i in s else 0.0 for i in range(b.size)])
             for s, b in zip(sums, self.base, strict=True)],
            [list(s) for s in sums],
            [{i: (a / steps, q / steps, steps) for i, (a, q) in s.items()} for s in sums],
        )  # fmt: skip
        self.window = None

    def exchange(self, scores, candidates, known=None):
        share = self.schedule.share(self.step)
        for j, own in enumerate(self.active):
            count = math.floor(share * Fraction(len(own)))
            w, base = self.value(j), self.base[j]
            small = sorted(own, key=lambda i: (abs(w[i] - base[i]), i))[:count]
            if candidates is None:  # a dropped entry may not grow at once
                allowed = [i for i in range(base.size) if i not in own]
            else:
                allowed = [i for i in candidates[j] if i not in own or i in small]
            grown = best(scores[j], allowed, count)
            fresh = [i for i in grown if i not in own]
            gone = [i for i in small if i not in grown][: len(fresh)]
            for i in gone:
                w[i] = base[i]
                del self.state[j, i]
            for i in fresh:
                mean, square, age = known[j][i] if known else (0.0, 0.0, 0)
                self.state[j, i] = [mean * (1 - 0.9**age), square * (1 - 0.999**age), age]
            self.active[j] = sorted(set(own) - set(gone) | set(fresh))


def best(scores, allowed, count):
    """The `count` best, ties by index; those that score 0 are not worth it."""
    return sorted((i for i in allowed if scores[i] > 0), key=lambda i: (-scores[i], i))[:count]
