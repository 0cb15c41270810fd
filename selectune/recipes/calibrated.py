"""Recipes that choose the support once, before training, from data at fixed weights."""

from __future__ import annotations

import dataclasses

from selectune import scores
from selectune.errors import ConfigError
from selectune.method import Method, Patterns, compose
from selectune.recipes.parameters import count, number
from selectune.schedule import Budget, OneShot
from selectune.scope import LINEAR, LORA, Scope, patterns
from selectune.select import PerTensor


def fish(
    budget: Budget,
    examples: int = 1024,
    labels: str = "data",
    scope: Scope | Patterns = ("*",),
    train_fully: Patterns = (),
) -> Method:
    """FISH mask: the B entries with the largest Fisher information over single examples, once.

    labels="data": the labels of the loss, one backward pass per example (empirical Fisher).
    labels="model": every class weighted by its probability, one backward pass per class (true Fisher).
    Source: Sung, Nair, Raffel (2021), Training Neural Networks with Fixed Sparse Masks, arXiv 2111.09839.

    >>> import selectune as st
    >>> st.fish(budget=1000, examples=64).score.parameters["examples"]
    64
    """
    if labels not in ("data", "model"):
        raise ConfigError(f"Unknown labels '{labels}'. Known: data, model.")
    score = scores.fisher(examples=count("examples", examples), labels=labels)
    return compose("fish", score, OneShot(budget), scope, train_fully)


def child_tuning_d(
    budget: Budget = 0.3,
    batches: int | None = None,
    clip: float | None = 1.0,
    scope: Scope | Patterns = ("*",),
    train_fully: Patterns = (),
) -> Method:
    """Child-Tuning-D: the B entries with the largest squared gradients summed over mini-batches, once.

    `batches`: how many mini-batches are read; None: all that `calibration` gives (the paper: one pass over
    the training set). `clip`: every tensor's gradient is scaled down to this norm before it is squared; None:
    it is not. The model is in training mode, as in the released code. Its script keeps 30 % and masks only
    tensors with "layer" in their name; embeddings, pooler and head are trained whole. Here that is
    scope="*layer*", train_fully=....
    Source: Xu et al. (2021), Raise a Child in Large Language Model, arXiv 2109.05687.

    >>> import selectune as st
    >>> st.child_tuning_d().schedule
    OneShot(budget=0.3)
    """
    score = scores.fisher_batches(
        batches=count("batches", batches, none="all"), clip=None if clip is None else number("clip", clip)
    )
    return compose("child-tuning-d", score, OneShot(budget), scope, train_fully)


def movement(
    budget: Budget,
    batches: int | None = 64,
    scope: Scope | Patterns = ("*",),
    train_fully: Patterns = (),
) -> Method:
    """Movement: the B entries with the largest -sum g w over a window in which no weight moves, once.

    This uses Movement Pruning's score as a selection: weights that descent would move away from 0 are trained.
    The others keep their pretrained values, where pruning would set them to 0. The paper learns the score
    during training; the window of 64 mini-batches is ours.
    Source: Sanh, Wolf, Rush (2020), Movement Pruning, arXiv 2005.07683.

    >>> import selectune as st
    >>> st.movement(budget=1000).score.parameters
    {'batches': 64}
    """
    score = scores.movement(batches=count("batches", batches, none="all"))
    return compose("movement", score, OneShot(budget), scope, train_fully)


def snip(
    budget: Budget,
    batches: int | None = 1,
    scope: Scope | Patterns = ("*",),
    train_fully: Patterns = (),
) -> Method:
    """SNIP: the B entries with the largest |g w| over `batches` mini-batches, once.

    The paper takes one mini-batch of 100 examples. Several are summed before the absolute value is taken.
    Source: Lee, Ajanthan, Torr (2019), SNIP, arXiv 1810.02340.

    >>> import selectune as st
    >>> st.snip(budget=1000).score.name
    'snip'
    """
    score = scores.snip(batches=count("batches", batches, none="all"))
    return compose("snip", score, OneShot(budget), scope, train_fully)


def speft(
    budget: Budget,
    batches: int | None = 64,
    scope: Scope | Patterns = ("*",),
    train_fully: Patterns = (),
) -> Method:
    """SPEFT: the B entries with the largest |g|, g the gradient of `batches` mini-batches together, once.

    The authors compare scores for masks that stay, and find this one, the simplest, to be the best. They take linear
    layers only and the same share of each matrix: scope=st.Scope(...) and `select` of `st.Method` say that. 64
    mini-batches are ours.
    Source: Liu et al. (2024), SPEFT, arXiv 2412.13488.

    >>> import selectune as st
    >>> st.speft(budget=1000).score.parameters["batches"]
    64
    """
    score = scores.d3_pooled(exp=0.0, batches=count("batches", batches, none="all"))
    return compose("speft", score, OneShot(budget), scope, train_fully)


def gem(
    budget: Budget = 0.001,
    batches: int | None = 64,
    eps: float = 1e-8,
    scope: Scope | Patterns = ("*",),
    train_fully: Patterns = (),
) -> Method:
    """GEM: of each tensor the entries with the largest |g| / |w|, more where its values have more entropy, once.

    A tensor gets a part of the budget in proportion to its size times the entropy of a histogram of its values
    (`PerTensor("entropy")`); one of a single value, as LoRA's B before training, counts with the mean of the others.
    We know the paper's abstract: the ratio, a number for each layer that follows the entropy of its values, and 0.1 %
    of the weights. The histogram, the factor of size, tensors in place of layers, eps, and g as the gradient of 64
    mini-batches together are ours.
    Source: Kang, Kim, Avestimehr, Lee (2025), GEM, arXiv 2508.16191.

    >>> import selectune as st
    >>> st.gem(budget=1000).select
    PerTensor(quota='entropy')
    """
    score = scores.d3_pooled(exp=1.0, eps=number("eps", eps), batches=count("batches", batches, none="all"))
    return compose("gem", score, OneShot(budget), scope, train_fully, PerTensor("entropy"))


def rosa(
    budget: Budget,
    batches: int | None = 1,
    adapter: str = LORA,
    scope: Scope | Patterns = (LINEAR,),
    train_fully: Patterns = (),
) -> Method:
    """RoSA: LoRA, and of each linear layer of the base the entries with the largest mean g^2, in one budget.

    It is attached to a model with LoRA on it whose base is not frozen: `put_on(model, "lora:r=8", freeze=False)`, or
    --on lora:r=8. LoRA's tensors, those that match `adapter`, are trained whole. They count in the budget, and the rest
    of it is selected in the base, by matrix, in proportion to its size. g are the gradients of `batches` mini-batches
    before training, not clipped. The released code trains LoRA alone for 64 steps first, at a rate of its own.
    Source: Nikdan, Tabesh, Crnčević, Alistarh (2024), RoSA, arXiv 2401.04679, and its released code.

    >>> import selectune as st
    >>> st.rosa(budget=100_000).counted
    ('*lora_*',)
    """
    score = scores.fisher_batches(batches=count("batches", batches, none="all"), clip=None, train_mode=False)
    whole = (adapter, *patterns(train_fully))
    return compose("rosa", score, OneShot(budget), scope, whole, PerTensor(), counted=adapter)


def grasp(
    budget: Budget,
    batches: int | None = 1,
    temperature: float = 200.0,
    scope: Scope | Patterns = ("*",),
    train_fully: Patterns = (),
) -> Method:
    """GraSP: the B entries with the largest w (H g), the ones that keep the gradient flowing, once.

    `temperature` divides the logits, which `loss(model, batch, temperature=200.0)` has to do; at 1 the callable
    is `loss(model, batch)`. GraSP needs the second derivative of every operation of the model.
    Source: Wang, Zhang, Grosse (2020), GraSP, arXiv 2002.07376 (temperature 200: its released code).

    >>> import selectune as st
    >>> st.grasp(budget=1000).score.parameters
    {'batches': 1, 'temperature': 200.0}
    """
    score = scores.grasp(batches=count("batches", batches, none="all"), temperature=number("temperature", temperature))
    return compose("grasp", score, OneShot(budget), scope, train_fully)


def synflow(budget: Budget, scope: Scope | Patterns = ("*",), train_fully: Patterns = ()) -> Method:
    """SynFlow: the B entries with the largest |w dR/dw|, R the outputs' sum on ones with absolute weights, once.

    `attach(..., calibration=[ones], loss=lambda model, ones: model(ones).sum())`; a language model takes ones
    as its input embeddings, so an embedding table scores 0. There is one round; the paper prunes in 100.
    Source: Tanaka, Kunin, Yamins, Ganguli (2020), SynFlow, arXiv 2006.05467.

    >>> import selectune as st
    >>> st.synflow(budget=1000).score.reads
    <Reads.FLOW: 'flow'>
    """
    return compose("synflow", scores.synflow(), OneShot(budget), scope, train_fully)


_PRUNERS = {
    "snip": scores.snip, "grasp": scores.grasp, "synflow": scores.synflow, "magnitude": scores.magnitude,
    "random": scores.random,
}  # fmt: skip


def sparse_adapter(
    budget: Budget = 0.2,
    score: str = "snip",
    batches: int = 1,
    temperature: float = 200.0,
    scope: Scope | Patterns = ("*",),
    train_fully: Patterns = (),
) -> Method:
    """SparseAdapter: the B best entries of a new adapter by a pruning score, once; all others are set to 0.

    The scope is an adapter (a bottleneck, LoRA, a prefix; freeze the rest). `budget`: .2 keeps a fifth, the
    paper's 80 % sparsity. `score`: snip, grasp, synflow, magnitude or random. For Large-Sparse, make the
    bottleneck k times as wide and set the budget to .2 / k, which keeps as many entries. The delta holds the
    kept entries and marks the others as 0. Needs a copy of the scope's weights.

    Matrices that are all 0 (an up-projection) are scored as if drawn from N(0, .02^2), because 0 times a
    gradient would tie. Biases of 0 score 0 and stay 0 under snip, grasp, synflow and magnitude.
    Source: He et al. (2022), SparseAdapter, arXiv 2210.04284; temperature 200: its released code.

    >>> import selectune as st
    >>> st.sparse_adapter(score="magnitude").fill
    'zero'
    """
    if score not in _PRUNERS:
        raise ConfigError(f"Unknown score '{score}'. Known: {', '.join(_PRUNERS)}.")
    given = {"batches": count("batches", batches), "temperature": number("temperature", temperature)}
    defaults = {"batches": 1, "temperature": 200.0}
    takes = {"snip": ("batches",), "grasp": ("batches", "temperature")}.get(score, ())
    for name in given:
        if name not in takes and given[name] != defaults[name]:
            raise ConfigError(f"The score '{score}' takes no {name}, but {name}={given[name]!r} was given.")
    chosen = _PRUNERS[score](**{name: given[name] for name in takes})
    if score != "random":
        chosen = dataclasses.replace(chosen, drawn=0.02)
    return compose("sparse-adapter", chosen, OneShot(budget), scope, train_fully, fill="zero")
