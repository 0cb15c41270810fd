"""Recipes that select whole rows, columns, blocks, heads or subnets of matrices."""

from __future__ import annotations

from selectune import scores
from selectune.method import Method, Patterns, compose
from selectune.recipes.parameters import count
from selectune.schedule import Budget, OneShot, Repeat
from selectune.scope import COUPLED, LINEAR, OUTPUT, UP, VALUE, Scope
from selectune.select import PerTensor
from selectune.structure import Structure


def s2ft(
    budget: Budget,
    head: int | None = None,
    scope: Scope | Patterns = (COUPLED,),
    train_fully: Patterns = (),
) -> Method:
    """S2FT: whole attention heads and whole channels of the FFN, at random over all layers, once.

    Of the value projection the rows that make a head, of the attention's output the columns that read it; of the FFN's
    first map the rows that make a channel, of its last the columns that read it. Other tensors in `scope` give columns.
    Every unit is as likely as any other; the paper's code has a share for each of the four and, as here, draws what
    makes and what reads independently. `head`: rows of a head, by default as the model's config says.
    The budget is exact: the last unit is trained in part if the rest does not hold it. The code permutes weights, so
    that the units are contiguous; here they stay where they are, and small products are taken of the columns in use.
    Source: Yang et al. (2024), S2FT, arXiv 2412.06289, and its released code.

    >>> import selectune as st
    >>> st.s2ft(budget=100_000).structure.unit
    'column'
    """
    also = ((VALUE, "head-rows"), (OUTPUT, "head-columns"), (UP, "row"))
    structure = Structure("column", count("head", head, none="what the config says"), also=also)
    return compose("s2ft", scores.random(), OneShot(budget), scope, train_fully, structure=structure)


def smt(
    budget: Budget,
    block: int = 256,
    batches: int | None = 64,
    scope: Scope | Patterns = (LINEAR,),
    train_fully: Patterns = (),
) -> Method:
    """SMT: the square blocks of linear layers with the largest mean |g| over all layers, once.

    g is the gradient of `batches` mini-batches together at the pretrained weights; the paper sums gradients over a
    warm-up of full fine-tuning. A block at the edge of a matrix is smaller and is compared by its mean like the
    others; the paper's shapes divide by 256. The budget is exact: the last block is trained in part if the rest does
    not hold it, so a multiple of 65,536 scalars gives whole blocks of 256.
    Source: He et al. (2024), Sparse Matrix Tuning, arXiv 2405.15525.

    >>> import selectune as st
    >>> st.smt(budget=65_536 * 4).structure
    Structure(unit='block', size=256, pool='mean', also=())
    """
    score = scores.d3_pooled(exp=0.0, batches=count("batches", batches, none="all"))
    structure = Structure("block", count("block", block))
    return compose("smt", score, OneShot(budget), scope, train_fully, structure=structure)


def paca(budget: Budget, scope: Scope | Patterns = (LINEAR,), train_fully: Patterns = ()) -> Method:
    """PaCA: random columns of each linear layer: all weights of some of its inputs, once.

    Each matrix gets a part of the budget in proportion to its size; the paper takes the same number of columns of
    every matrix. Of an input only the chosen columns are kept for backward, as in the paper, if they are at most a
    quarter of it. The budget is exact: a matrix' last column is trained in part.
    Source: Woo et al. (2025), PaCA: Partial Connection Adaptation, arXiv 2503.01905, and its released code.

    >>> import selectune as st
    >>> st.paca(budget=100_000).structure.unit
    'column'
    """
    structure = Structure("column")
    return compose("paca", scores.random(), OneShot(budget), scope, train_fully, PerTensor(), structure=structure)


def losia(
    budget: Budget = 1 / 64,
    steps: int | None = None,
    batches: int | None = 16,
    every: int | None = None,
    scope: Scope | Patterns = (LINEAR,),
    train_fully: Patterns = (),
) -> Method:
    """LoSiA: of each linear layer the subnet of some rows by some columns with the largest sensitivity.

    A matrix' part of the budget is in proportion to its size; 1/64 is an eighth of the rows by an eighth of the
    columns, as in the paper. Rows and columns are found greedily, in three orders (`structure.subnet`). `every`: they
    are chosen again every so many steps, from calibration data that can be read again, in all layers at once; None:
    once. The paper chooses again one layer after the other, by moving averages that are gathered during training, and
    warms the learning rate up each time; that is not built.
    Source: Wang et al. (2025), LoSiA, arXiv 2507.04487, and its released code.

    >>> import selectune as st
    >>> st.losia().structure.unit
    'subnet'
    """
    score = scores.sensitivity(batches=count("batches", batches, none="all"))
    again = count("every", every, none="once")
    schedule = OneShot(budget) if again is None else Repeat(budget, steps, again)
    return compose("losia", score, schedule, scope, train_fully, PerTensor(), structure=Structure("subnet", pool="sum"))
