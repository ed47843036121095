"""A sequence: token ids of which some are supervised. The one thing that every room hands to the next."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sequence:
    """Token ids with a supervised part.

    `supervised[i]` says that token `i` is a target, predicted from tokens `0 .. i-1`. Token 0 has nothing
    to be predicted from and is never supervised.
    """

    token_ids: tuple[int, ...]
    supervised: tuple[bool, ...]
    group: str = ""
    """What this sequence shares its context with (an article), for the sampler."""
    alternatives: tuple[tuple[int, ...], ...] = ()
    """Wrong answers: tokens that could stand in the place of all from the first supervised one on."""

    def __post_init__(self) -> None:
        if len(self.token_ids) != len(self.supervised):
            raise ValueError(f"{len(self.token_ids)} tokens but {len(self.supervised)} supervision marks")
        if not self.token_ids:
            raise ValueError("a sequence needs at least one token")
        if self.supervised[0]:
            raise ValueError("the first token of a sequence cannot be supervised: nothing predicts it")

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def num_supervised(self) -> int:
        """How many tokens are targets."""
        return sum(self.supervised)

    def list_choices(self) -> list[Sequence]:
        """Return the sequence itself and one for each wrong answer, all of its tokens supervised."""
        given = self.token_ids[: self.supervised.index(True)] if self.alternatives else ()
        return [self, *(supervise_from(given + wrong, len(given), self.group) for wrong in self.alternatives)]


def supervise_from(token_ids: tuple[int, ...], start: int, group: str = "") -> Sequence:
    """Make a sequence whose tokens from `start` on are supervised (a prompt and its response)."""
    given = min(max(start, 1), len(token_ids))
    return Sequence(token_ids, (False,) * given + (True,) * (len(token_ids) - given), group)
