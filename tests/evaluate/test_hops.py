import math

import numpy as np
import pytest
import torch

from raygrec.data.arrays import CSR
from raygrec.draws import Draws
from raygrec.evaluate.hops import hop_figures, hop_representations
from raygrec.model.backbone import Backbone, BackboneConfig
from tests.model.test_galrec import hop_prompts, model_of

TRAIN = [[3, 5, 7], [5, 9, 2], [4, 5], [2, 7]]


def test_figures_by_hand():
    """On the circle: hop 0 and hop 1 are alike, hop 2 is opposite; of two nodes at a right angle."""
    nodes = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    figures = hop_figures(torch.stack([nodes, 2 * nodes, -nodes], dim=1))
    assert figures == pytest.approx(
        {f"uniformity {hop}-hop": -4.0 for hop in range(3)}  # log exp(-2 · 2)
        | {"alignment 0-hop 1-hop": 0.0, "alignment 0-hop 2-hop": 4.0, "alignment 1-hop 2-hop": 4.0}
    )
    turned = nodes.roll(1, 0)  # the other node's
    assert hop_figures(torch.stack([nodes, nodes, turned], dim=1))["alignment 0-hop 2-hop"] == pytest.approx(2.0)
    near = torch.tensor([[1.0, 0.0], [math.cos(1), math.sin(1)]])
    apart = 2 - 2 * math.cos(1)
    assert hop_figures(torch.stack([near, nodes, nodes], dim=1))["uniformity 0-hop"] == pytest.approx(-2 * apart)


def test_representations_are_each_users_own_with_the_history_that_is_given(tiny_backbone):
    prompter = hop_prompts(TRAIN)
    model = model_of(prompter, Backbone(BackboneConfig(name=str(tiny_backbone))))
    users, histories = np.array([2, 0, 3]), CSR.from_lists([[3, 5], [9], [4, 5, 6], [7]])
    found = hop_representations(model, prompter, users, histories, batch=2, seed=4)
    assert found.shape == (3, 3, model.backbone.width)
    for row, user in enumerate(users):
        alone = prompter.describing(np.array([user]), histories.take(np.array([user])), Draws(4))
        with torch.no_grad():
            hidden = model.hidden(alone).padded()[0]
        shown = alone.symbols[0] - prompter.symbols.first_item
        assert [item for item in shown.tolist()[3:] if item in histories[user]] == histories[user].tolist()
        torch.testing.assert_close(found[row], hidden[alone.hops[0]], rtol=1e-5, atol=1e-5)
