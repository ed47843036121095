"""A forest computed in segments: the single sequences' log-probabilities, each token once, whatever the budget."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import PromptTuningConfig, get_peft_model

from koat.core.sequence import Sequence
from koat.forest.build import build_forest
from koat.forest.probe import single_logprobs
from koat.forest.stream import Predictions, cut_forest, score_forest, stream_forest
from koat.forest.verify import verify_layout


def draw_sequences(seed: int, vocabulary: int = 100) -> list[Sequence]:
    """Return two trees of long trunks with limbs and leaves, and a stranger; some sequences twice."""
    rng = np.random.default_rng(seed)

    def draw(length: int) -> tuple[int, ...]:
        return tuple(int(token) for token in rng.integers(2, vocabulary, length))

    found = []
    for _ in range(2):
        trunk = draw(int(rng.integers(8, 20)))
        for _ in range(3):
            limb = trunk + draw(int(rng.integers(1, 9)))
            for _ in range(3):
                body, answer = limb + draw(int(rng.integers(0, 6))), draw(int(rng.integers(1, 4)))
                found.append(Sequence(body + answer, (False,) * len(body) + (True,) * len(answer)))
    stranger = draw(12)
    return [*found, found[0], found[7], Sequence(stranger, (False, *(True,) * 11))]


def collect(parts: Iterable[Predictions], num_sequences: int) -> tuple[list[list[float]], list[list[int]], int]:
    """Return each sequence's log-probabilities and likeliest tokens, in order, and how many tokens were computed."""
    values, likeliest, num_tokens = defaultdict(list), defaultdict(list), 0
    for part in parts:
        for owner, value, token in zip(*(each.tolist() for each in (part.owner, part.logprobs, part.likeliest)),
                                       strict=True):  # fmt: skip
            values[owner].append(value)
            likeliest[owner].append(token)
        num_tokens += part.num_tokens
    owners = range(num_sequences)
    return [values[owner] for owner in owners], [likeliest[owner] for owner in owners], num_tokens


@pytest.mark.parametrize("family", ["gpt_neox", "llama", "mistral", "qwen2-window", "qwen3", "gpt2", "gemma2", "opt"])
@pytest.mark.parametrize("budget", [1, 7, 40, 10_000])
def test_every_budget_gives_the_single_sequences_log_probabilities(make_model, family: str, budget: int) -> None:
    model, sequences = make_model(family), draw_sequences(budget)
    forest = build_forest(sequences)
    layout, verification = verify_layout(model)
    assert verification.to_mapping()["streams"] == layout.streams
    assert layout.streams == (family != "gemma2")  # capped attention takes dense masks, which want short rows
    layout = replace(layout, streams=True)
    for each in (layout, replace(layout, narrow=False)):
        values, _, num_tokens = collect(stream_forest(model, each, forest, budget), len(sequences))
        for mine, expected in zip(values, single_logprobs(model, sequences), strict=True):
            assert mine == pytest.approx(expected.tolist(), rel=1e-5, abs=1e-5)
        assert num_tokens == len(forest)


def test_the_likeliest_tokens_are_those_of_whole_micro_batches(make_model) -> None:
    model, sequences = make_model("llama"), draw_sequences(3)
    layout, _ = verify_layout(model)
    streamed = collect(stream_forest(model, layout, build_forest(sequences), 16), len(sequences))
    whole = collect(score_forest(model, replace(layout, streams=False), sequences, 4096), len(sequences))
    assert streamed[1] == whole[1]


def test_a_trunk_is_computed_once_for_more_than_a_budget_behind_it(make_model) -> None:
    """Forty questions of six tokens behind one hundred: without segments the trunk is computed in every batch."""
    model, rng = make_model("llama"), np.random.default_rng(0)
    trunk = tuple(range(2, 62)) + tuple(range(2, 42))
    tails = [tuple(int(token) for token in rng.integers(2, 100, 6)) for _ in range(40)]
    sequences = [Sequence(trunk + tail, (False,) * 105 + (True,)) for tail in tails]
    layout, _ = verify_layout(model)
    once = collect(score_forest(model, layout, sequences, 150), 40)[2]
    again = collect(score_forest(model, replace(layout, streams=False), sequences, 150), 40)[2]
    assert once == len(build_forest(sequences)) <= 100 + 40 * 5 < again


def test_trees_that_share_nothing_stay_whole(make_model, monkeypatch) -> None:
    """Segments would only cut through trees: nothing is computed twice without them."""
    model = make_model("llama")
    layout, _ = verify_layout(model)
    monkeypatch.setattr("koat.forest.stream.stream_forest", None)
    bodies = [tuple(range(start, start + 20)) for start in (2, 30, 60)]
    sequences = [Sequence(body, (False,) * 19 + (True,)) for body in bodies]
    assert collect(score_forest(model, layout, sequences, 25), 3)[2] == 3 * 19


def test_a_segment_carries_the_path_of_its_first_token_and_no_more() -> None:
    """Written down by hand: trunk 1 2, limb 3 with leaves 4 and 5, limb 6 with leaf 7."""
    bodies = [(1, 2, 3, 4, 9), (1, 2, 3, 5, 9), (1, 2, 6, 7, 9)]
    forest = build_forest([Sequence(body, (False,) * 4 + (True,)) for body in bodies])
    assert forest.token_ids.tolist() == [1, 2, 3, 4, 5, 6, 7]
    segments = list(cut_forest(forest, 2))
    assert [segment.ancestors.tolist() for segment in segments] == [[], [0, 1], [0, 1, 2], [0, 1, 5]]
    assert [segment.position.tolist() for segment in segments] == [
        [[0, 1]], [[0, 1, 2, 3]], [[0, 1, 2, 3, 2]], [[0, 1, 2, 3]]
    ]  # fmt: skip
    # The limb 3 ends before 6 begins; the trunk reaches past the segment and is cut at its end.
    assert segments[2].subtree_end.tolist() == [[5, 5, 4, 4, 5]]
    assert [segment.source.tolist() for segment in segments] == [[], [1], [0], [0]]


def write_tree(number: int, trunk: int, limbs: list[int]) -> list[Sequence]:
    """Return a tree of a trunk and limbs of so many tokens each; a last token, which nothing follows, is left out."""
    stem, found = (10 * number + 1,) * trunk, []
    for place, length in enumerate(limbs):
        body = stem + (10 * number + 2 + place,) * length
        found.append(Sequence((*body, 0), (False,) * len(body) + (True,)))
    return found


@pytest.mark.parametrize(
    ("budget", "starts"),
    [
        # All branches in reach are limbs: the farthest, 1900. From there the tree at 2700 is too near (800), and the
        # limb at 3800 the only one in reach; then the tree at 5400 is preferred to the limb at 5000.
        (10_000, [0, 1900, 3800, 5400, 7300]),
        (2048, [0, 1900, 3800, 5400, 7300]),
        # Limbs at 1100 and 1500, then the tree at 2700, and so in each of the three.
        (1500, [0, 1500, 2700, 4200, 5400, 6900]),
        # No more than half of what is comfortable: nothing is chosen.
        (1024, [0, 1024, 2048, 3072, 4096, 5120, 6144, 7168]),
    ],
)
def test_segments_end_before_the_branch_with_the_shortest_path(budget: int, starts: list[int]) -> None:
    """Three trees of 2700 tokens, limbs at 700, 1100, 1500, 1900 and 2300; a comfortable reach is 1025 to 2048."""
    forest = build_forest([each for tree in range(3) for each in write_tree(tree, 700, [400] * 5)])
    assert len(forest) == 8100
    segments = list(cut_forest(forest, budget))
    assert [segment.start for segment in segments] == starts
    assert [segment.stop for segment in segments] == [*starts[1:], 8100]
    carried = {0: 0, 1500: 700, 1900: 700, 2700: 0, 3800: 700, 4200: 700, 5400: 0, 6900: 700, 7300: 700}
    assert all(len(each.ancestors) == carried[each.start] for each in segments if each.start in carried)


def test_a_tree_is_begun_rather_than_a_limb_further_on() -> None:
    """A tree of 1100 tokens, then one with limbs at 1400 and 1700: both 1100 and 1700 are in reach."""
    forest = build_forest(write_tree(0, 700, [400]) + write_tree(1, 300, [300, 800]))
    assert [segment.start for segment in cut_forest(forest, 2048)] == [0, 1100]


@pytest.mark.parametrize(("budget", "starts"), [(4000, [0, 3000]), (2500, [0, 2500])])
def test_without_a_branch_in_comfortable_reach_the_next_one_is_taken(budget: int, starts: list[int]) -> None:
    forest = build_forest(write_tree(0, 3000, [0]) + write_tree(1, 500, [0]))
    assert [segment.start for segment in cut_forest(forest, budget)] == starts


@pytest.mark.parametrize("family", ["gpt_neox", "llama", "mistral"])
def test_segments_that_end_at_branches_give_the_same_log_probabilities(make_model, family: str, monkeypatch) -> None:
    monkeypatch.setattr("koat.forest.stream.COMFORTABLE", 16)
    model, sequences = make_model(family), draw_sequences(5)
    forest = build_forest(sequences)
    branches = set(np.flatnonzero(np.diff(forest.position, prepend=-2) != 1).tolist())
    assert sum(segment.start in branches for segment in cut_forest(forest, 40)) > 3
    layout, _ = verify_layout(model)
    values, _, num_tokens = collect(stream_forest(model, layout, forest, 40), len(sequences))
    for mine, expected in zip(values, single_logprobs(model, sequences), strict=True):
        assert mine == pytest.approx(expected.tolist(), rel=1e-5, abs=1e-5)
    assert num_tokens == len(forest)


def test_a_soft_prompt_is_left_to_whole_micro_batches(make_model) -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(make_model("llama"), config).eval()
    layout, _ = verify_layout(model)
    assert not layout.streams
    sequences = draw_sequences(1)
    values, _, _ = collect(score_forest(model, replace(layout, streams=True), sequences, 64), len(sequences))
    for mine, expected in zip(values, single_logprobs(model, sequences), strict=True):
        assert mine == pytest.approx(expected.tolist(), rel=1e-5, abs=1e-5)


def test_scoring_again_gives_the_same_and_no_gradient(make_model) -> None:
    model = make_model("gpt_neox")
    layout, _ = verify_layout(model)
    forest = build_forest(draw_sequences(2))
    twice = [torch.cat([part.logprobs for part in stream_forest(model, layout, forest, 30)]) for _ in range(2)]
    assert torch.equal(*twice)
    assert not twice[0].requires_grad
