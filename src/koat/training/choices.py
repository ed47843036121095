"""What a step minimises: the loss of the right answers, and T-Few's two losses of right against wrong ones.

Liu et al. 2022 (arXiv 2205.05638), section 3.2, each divided once by its counts in the whole step:

- unlikelihood: `-log(1 - p)` of every token of every wrong answer, over their number;
- length-normalised: with `b` the mean log-probability of an answer's tokens, `-log(exp(b) / sum(exp(b')))` of the
  right answer among all of an example, over the number of examples.

The second needs whole answers, and those of one example may lie in several micro-batches. Its gradient is a number
per answer, (share of the answer - whether it is right), times that of `b`: with these numbers from a pass without
gradients the loss is a sum over tokens again, and does not depend on how the forest was cut.
"""

from __future__ import annotations

from collections.abc import Sequence as ListLike
from dataclasses import dataclass

import torch
from torch import Tensor

from koat.core.sequence import Sequence
from koat.core.settings import TrainingSettings

FLOOR = 1e-2
"""Added to `1 - p`, as in T-Few's code: a token that wrong and right answers share would count without bound."""


@dataclass(frozen=True, slots=True)
class Objective:
    """The S sequences of a step's examples on this process, and how their log-probabilities make the loss."""

    sequences: ListLike[Sequence]
    example: Tensor
    """Which example each sequence answers, `[S]`."""
    right: Tensor
    """Which sequences are the right answers, `[S]`."""
    length: Tensor
    """Supervised tokens of each sequence, `[S]`."""
    num_right: int
    """Supervised tokens of the step's right answers, over all processes."""
    num_wrong: int
    num_examples: int
    """Those of the step that have a choice."""
    unlikelihood: float
    choice_loss: float

    def weigh_answers(self, sums: Tensor) -> tuple[Tensor, float]:
        """Return the slope `[S]` of the length-normalised loss along each token of an answer, and its value.

        `sums` are the log-probabilities of whole sequences, `[S]`.
        """
        mean = sums.cpu().double() / self.length
        count = int(self.example.max()) + 1
        top = torch.full((count,), -torch.inf, dtype=mean.dtype).scatter_reduce(0, self.example, mean, "amax")
        parts = (mean - top[self.example]).exp()
        share = parts / torch.zeros_like(top).index_add(0, self.example, parts)[self.example]
        weight = self.choice_loss / max(1, self.num_examples)
        return weight * (share - self.right.double()) / self.length, -weight * float(share[self.right].log().sum())

    def measure(self, logprobs: Tensor, owner: Tensor, slope: Tensor | None) -> Tensor:
        """Return this micro-batch's share of the loss, from `logprobs [P]` of the sequences `owner [P]`.

        Of the length-normalised loss it has the gradient, `slope` being given, and not the value.
        """
        if not (self.unlikelihood or self.choice_loss):
            return -logprobs.sum() / self.num_right
        right = self.right.to(owner.device)[owner]
        loss = -logprobs[right].sum() / self.num_right
        if self.unlikelihood:
            unlikely = -torch.log(1 - logprobs[~right].exp() + FLOOR).sum()
            loss = loss + self.unlikelihood * unlikely / max(1, self.num_wrong)
        if slope is not None:
            along = (slope.to(owner.device)[owner].to(logprobs.dtype) * logprobs).sum()
            loss = loss + along - along.detach()
        return loss


def list_answers(examples: ListLike[Sequence], settings: TrainingSettings) -> list[list[Sequence]]:
    """Return the sequences of each example that go through the model, the right answer first."""
    return [example.list_choices() if settings.wants_choices else [example] for example in examples]


def make_objective(step: ListLike[Sequence], mine: ListLike[Sequence], settings: TrainingSettings) -> Objective:
    """Return what to minimise for the examples `mine` of this process, counts being those of the whole `step`."""
    answers = list_answers(mine, settings)
    flat = [sequence for each in answers for sequence in each]
    chosen = [example for example in step if settings.wants_choices and example.alternatives]
    return Objective(
        flat,
        torch.tensor([number for number, each in enumerate(answers) for _ in each], dtype=torch.int64),
        torch.tensor([place == 0 for each in answers for place in range(len(each))], dtype=torch.bool),
        torch.tensor([max(1, sequence.num_supervised) for sequence in flat], dtype=torch.float64),
        num_right=sum(example.num_supervised for example in step),
        num_wrong=sum(len(wrong) for example in chosen for wrong in example.alternatives),
        num_examples=len(chosen),
        unlikelihood=settings.unlikelihood,
        choice_loss=settings.choice_loss,
    )
