"""Selection by perturbation: what is missed most stays."""

from dataclasses import replace

import pytest
import torch

from dass import data
from dass.genotype import Edge
from dass.perturbation import select_by_perturbation
from dass.searching import search
from dass.space import CONCAT, edge_index
from dass.strategies import SearchConfig
from dass.supernet import Architecture, Choice, choices_of

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = SearchConfig(
    dataset="synthetic", size=8, limit=32, channels=4, layers=3, batch_size=8, epochs=(1, 1, 1),
    density=0.1, selection="perturbation", selection_images=16,
)  # fmt: skip


@pytest.fixture(scope="module")
def images():
    return data.load("synthetic", train=True, size=8, limit=32)


def test_it_finds_what_the_loss_needs_whatever_the_alphas_say():
    """A loss that is linear in the weights: each operation has a known worth."""
    choices = choices_of((0.5, 0.1))
    architecture = Architecture(choices)
    wanted, none = choices.index(Choice("dil_conv_3x3", 0.1)), choices.index(Choice("none"))
    worth = torch.zeros(14, len(choices))
    worth[:, none] = 100.0  # never selected, whatever it is worth
    for node in CONCAT:
        for source in range(node):
            worth[edge_index(node, source), wanted] = 1.0 + source  # the last two sources of a node
    with torch.no_grad():
        architecture.normal[:, choices.index(Choice("skip_connect"))] = 3.0  # misleading
    calls, tuned, told = [], [], []

    def loss(weights):
        calls.append(1)
        return -float(sum((worth * w).sum() for w in weights.values()))

    genotype = select_by_perturbation(
        architecture, loss, tune=lambda w: tuned.append(float(w["normal"].sum())),
        tell=lambda done, count: told.append((done, count)), seed=1,
    )  # fmt: skip
    for cell in (genotype.normal, genotype.reduce):
        for node, edges in zip(CONCAT, cell, strict=True):
            assert edges == tuple(Edge("dil_conv_3x3", s, 0.1) for s in (node - 2, node - 1))
    assert len(calls) == 2 * 14 * (len(choices) - 1) + 2 * 14
    assert told == [(n, 36) for n in range(1, 37)] and len(tuned) == 36
    assert tuned[-1] == pytest.approx(8)  # eight edges of the normal cell are left, each at 1


def test_ties_go_to_the_larger_alpha():
    architecture = Architecture(choices_of())
    with torch.no_grad():
        architecture.normal[:, 4] = 1.0
    assert select_by_perturbation(architecture, lambda w: 0.0) == architecture.genotype()


def test_a_search_that_selects_by_perturbation(images):
    result = search(TINY, data=images)
    assert result.selection == "perturbation"
    again = search(TINY, data=images)
    assert again.genotype == result.genotype
    by_alpha = search(replace(TINY, selection="alpha"), data=images)
    assert by_alpha.selection == "alpha" and result.genotype != by_alpha.genotype
    assert by_alpha.genotype.to_json() == result.history[-1]["genotype"]
    assert result.genotype.differences(by_alpha.genotype) > 0
    assert result.genotype.differences(result.genotype) == 0


def test_tuning_and_resuming(images, tmp_path):
    config = replace(TINY, selection_steps=1, epochs=(0, 1, 1))
    straight = search(config, data=images)
    told = []

    def stop(progress):
        if progress.phase == "select" and progress.epoch == 5:
            raise KeyboardInterrupt
        told.append(progress.phase)

    path = tmp_path / "c.pt"
    with pytest.raises(KeyboardInterrupt):
        search(config, data=images, checkpoint=path, on_step=stop)
    assert "select" in told
    resumed = search(config, data=images, checkpoint=path)
    assert resumed.resumed_at > 0 and resumed.genotype == straight.genotype


def test_guarded_selection_asks_only_at_a_sign_of_collapse(images, monkeypatch):
    config = replace(TINY, selection="guarded")
    monkeypatch.setattr("dass.searching.signs_of_collapse", lambda *_: ["skips: forced"])
    assert search(config, data=images).selection == "perturbation"
    monkeypatch.setattr("dass.searching.signs_of_collapse", lambda *_: [])
    assert search(config, data=images).selection == "alpha"


def test_settings_are_checked():
    with pytest.raises(ValueError, match="selection must be alpha, perturbation or guarded"):
        replace(TINY, selection="best")
