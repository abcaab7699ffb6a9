"""Who wins a race: the simplest plan that is not worse beyond noise."""

from __future__ import annotations

import torch

from hf_sparsity.allocators.race import Race
from hf_sparsity.evaluation.divergence import PlanScores
from hf_sparsity.planning.race.candidates import Candidate
from hf_sparsity.planning.race.successive_halving import ScoredCandidate, winner


def scored(values: dict[str, list[float]], kinds: dict[str, str]) -> list[ScoredCandidate]:
    ones = torch.full((len(next(iter(values.values()))),), 10.0, dtype=torch.float64)
    made = []
    for number, (name, kl) in enumerate(values.items()):
        scores = PlanScores(torch.tensor(kl, dtype=torch.float64), torch.tensor(kl, dtype=torch.float64), ones)
        made.append(ScoredCandidate(Candidate(name, kinds[name], {}, {}), (number,), [scores]))
    return made


def test_within_noise_the_simpler_plan_wins():
    kinds = {"uniform": "uniform", "owl": "single", "owl + dlp": "mixture", "search": "search"}
    base = torch.linspace(1, 3, 20, dtype=torch.float64)
    noise = 0.2 * torch.randn(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shift = {"uniform": 0.0, "owl": -0.5, "owl + dlp": -0.5, "search": -0.5}

    def values(**change):
        return {n: (base + shift[n] + change.get(n.split()[0], 0.0) + noise * i).tolist() for i, n in enumerate(kinds)}

    assert winner(Race(), scored(values(), kinds), 0).name == "owl"
    assert winner(Race(), scored(values(search=-1), kinds), 0).name == "search"
    assert winner(Race(), scored(values(uniform=-0.5), kinds), 0).name == "uniform"
    assert winner(Race(), scored(values(uniform=-2), kinds), 0).name == "uniform"


def test_what_is_worse_than_something_simpler_is_no_choice():
    kinds = {"uniform": "uniform", "owl": "single", "owl + dlp": "mixture", "search": "search"}
    base = torch.linspace(1, 3, 20, dtype=torch.float64)
    noisy = base + torch.linspace(-2, 2, 20, dtype=torch.float64)[torch.randperm(20)] + 0.1
    kl = {"uniform": base + 1, "owl": base + 0.05, "owl + dlp": noisy, "search": base}
    assert winner(Race(), scored({n: v.tolist() for n, v in kl.items()}, kinds), 0).name == "search"
