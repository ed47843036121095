"""When a step's micro-batches go to the device."""

from __future__ import annotations

import torch

from koat.core.sequence import supervise_from
from koat.forest.pack import MicroBatch
from koat.forest.score import make_padded
from koat.training.loop import accumulate_gradients


def test_a_step_is_moved_before_its_first_backward_pass(make_model, monkeypatch, accelerator, make_settings) -> None:
    model, events = make_model("llama").requires_grad_(True), []
    move, pull = MicroBatch.to, torch.Tensor.backward

    def note_move(batch, device):
        events.append("move")
        return move(batch, device)

    def note_pull(loss):
        events.append("backward")
        pull(loss)

    monkeypatch.setattr(MicroBatch, "to", note_move)
    monkeypatch.setattr(torch.Tensor, "backward", note_pull)
    examples = [supervise_from((5, 9, 17, 40 + number, 2), 3) for number in range(6)]
    settings = make_settings(tokens_per_microbatch=8)
    accumulate_gradients(model, examples, make_padded(), settings, accelerator)
    count = events.count("move")
    assert count > 1 and events == ["move"] * count + ["backward"] * count
