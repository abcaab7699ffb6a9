"""The certificate: arithmetic by hand, text that nothing touched before, and what checking it notices."""

from __future__ import annotations

import copy

import pytest
import torch

from hf_sparsity import Plan, Report, SparseModel, SparsityConfig, make_plan, prune
from hf_sparsity.checkpoint.zeros import REPORT_FILE
from hf_sparsity.evaluation.certificate import certify, check, compare
from hf_sparsity.evaluation.divergence import PlanScores
from hf_sparsity.records import Interval, PlanPair
from tests.conftest import tiny

CERTAIN = 125  # a token that only the certificate's text has


def texts(count: int = 16, tokens: int = 24) -> torch.Tensor:
    ids = torch.randint(3, 120, (count, tokens), generator=torch.Generator().manual_seed(3))
    ids[-count // 4 :, ::3] = CERTAIN
    return ids


CONFIG = SparsityConfig(0.6, allocator={"name": "race", "candidates": ("owl",), "slices": (48, 96)})


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("certificate")
    tiny("llama").save_pretrained(root / "dense")
    SparseModel.from_pretrained(
        root / "dense", sparsity_config=CONFIG, calibration_data=texts(), output_dir=root / "sparse"
    )
    return root


def scores(kl, loss, tokens) -> PlanScores:
    return PlanScores(*(torch.tensor(x, dtype=torch.float64) for x in (kl, loss, tokens)))


def test_it_compares_pairs_weighted_by_tokens():
    uniform, chosen = scores([1.0, 3.0], [2.0, 4.0], [10.0, 30.0]), scores([0.5, 1.0], [1.0, 3.0], [10.0, 30.0])
    made = compare(uniform, chosen)
    assert made.kl == PlanPair(2.5, 0.875, Interval(1.625, 0.5, 2.0)) and made.pays is True
    e = torch.e
    assert made.perplexity.uniform == pytest.approx(e**3.5)
    gain = made.perplexity.uniform_minus_chosen
    assert (gain.value, gain.low, gain.high) == pytest.approx((e**3.5 - e**2.5, e**2 - e, e**4 - e**3))
    nothing = compare(chosen, chosen)
    assert nothing.kl.uniform_minus_chosen == Interval(0.0, 0.0, 0.0) and nothing.pays is None


def test_its_text_is_touched_by_nothing_before():
    model, seen = tiny("llama"), []
    model.get_input_embeddings().register_forward_pre_hook(
        lambda _, args: seen.append(bool((args[0] == CERTAIN).any()))
    )
    plan = make_plan(model, CONFIG, texts())
    assert True in seen and not any(seen[: seen.index(True)]) and all(seen[seen.index(True) :]), "it is read last"
    assert plan.chosen["certificate"]["sequences"] == 4
    other = texts()
    other[-4:] = 7
    chosen = make_plan(tiny("llama"), CONFIG, other).chosen
    same = plan.chosen.keys() - {"certificate", "data"}
    assert {key: chosen[key] for key in same} == {key: plan.chosen[key] for key in same}, "and decides nothing"
    assert chosen["certificate"] != plan.chosen["certificate"]


def test_it_says_what_finished_models_say():
    dense, chosen = tiny("llama"), tiny("llama")
    plan = make_plan(dense, CONFIG, texts())
    prune(chosen, plan, texts())
    uniform = tiny("llama")
    prune(uniform, make_plan(uniform, SparsityConfig(0.6)), texts()[:12])
    made = certify(dense, uniform, chosen, texts()[12:])
    assert made["of"] == "models" and made["data"] == plan.chosen["certificate"]["data"]
    assert made["kl"]["chosen"] == pytest.approx(chosen.config.sparsity_config["pruned"]["certificate"]["kl"], rel=1e-4)
    assert made["kl"]["uniform"] == pytest.approx(plan.chosen["certificate"]["kl"]["uniform"], rel=0.2)
    equal = certify(dense, copy.deepcopy(dense), dense, texts()[12:])
    assert equal["kl"]["uniform_minus_chosen"]["high"] == pytest.approx(0, abs=1e-6)


def test_checking_scores_it_again(folders):
    found = check(folders / "sparse", texts(), dense=tiny("llama"))
    assert found["holds"] and found["same_text"]
    assert found["now"]["kl"] == pytest.approx(found["recorded"]["kl"], rel=1e-3)
    assert found["certificate"]["of"] == "masks"
    assert check(folders / "sparse", texts()[12:])["holds"], "the certificate's text alone will do"


def test_plan_and_report_have_it(folders):
    plan, report = Plan.load(folders / "sparse"), Report.load(folders / "sparse" / REPORT_FILE)
    assert report.certificate["masks"] == plan.chosen["certificate"]
    recorded = check(folders / "sparse", texts())["recorded"]
    assert {key: report.certificate["pruned"][key] for key in recorded} == recorded
    other = prune(tiny("llama"), plan, texts()[:8])  # not the text that it was made with
    assert other.certificate == {"masks": plan.chosen["certificate"], "pruned": None}


def test_checking_notices_other_text_and_other_weights(folders):
    other = texts()
    other[-1, 0] = 7
    found = check(folders / "sparse", other)
    assert not found["same_text"] and not found["holds"]
    model = SparseModel.from_pretrained(folders / "sparse")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(9)
    found = check(folders / "sparse", texts(), model=model)
    assert found["same_text"] and not found["holds"]


def test_checking_says_what_is_missing(folders, tmp_path):
    with pytest.raises(ValueError, match="4 sequences, and 2 were given"):
        check(folders / "sparse", texts()[14:])
    SparseModel.from_pretrained(
        folders / "dense", sparsity_config=SparsityConfig(0.5, pruner="magnitude"), output_dir=tmp_path / "plain"
    )
    with pytest.raises(ValueError, match="no certificate"):
        check(tmp_path / "plain", texts())


def test_a_damaged_record_is_an_error_and_old_plans_are_read(folders):
    stored = Plan.load(folders / "sparse").to_dict()
    assert stored["chosen"]["by"] == "race"
    with pytest.raises(ValueError, match="'chosen' must be an object"):
        Plan.from_dict(stored | {"chosen": [1]})
    stored.pop("chosen")
    assert Plan.from_dict(stored).chosen is None and "chosen" not in Plan.from_dict(stored).to_dict()
