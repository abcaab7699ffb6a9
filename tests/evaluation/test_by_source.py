"""The divergence by source of a calibration mix: what is kept apart, what is measured, where it is written."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from hf_sparsity import (
    Report,
    Source,
    SparseModel,
    SparsityConfig,
    calibration_batches,
    evaluate_text,
    make_plan,
    prune,
)
from hf_sparsity.calibration.batches import data_fingerprint, prepare_batches
from hf_sparsity.calibration.mixture import Mixture
from hf_sparsity.calibration.splits import hold_out, split_of
from hf_sparsity.checkpoint.output import Output
from hf_sparsity.checkpoint.streamed import open_streamed
from hf_sparsity.checkpoint.zeros import REPORT_FILE
from hf_sparsity.evaluation.by_source import compare_by_source
from hf_sparsity.evaluation.certificate import certify
from hf_sparsity.evaluation.divergence import PlanScores
from hf_sparsity.records import SourcePlans
from tests.conftest import Stopped, stop_after, tiny

CONFIG = SparsityConfig(0.6)


def texts(low: int, high: int, sequences: int = 40, tokens: int = 16) -> torch.Tensor:
    """Sequences of a source that has its own words."""
    return torch.randint(low, high, (sequences, tokens), generator=torch.Generator().manual_seed(low))


def mixed(sequences: int = 24) -> Mixture:
    """Half of one source, a third of another, a sixth of the last."""
    given = [Source(texts(5, 40), 3, "web"), Source(texts(40, 80), 2, "code"), Source(texts(80, 120), 1, "math")]
    made = calibration_batches(given, sequences=sequences, length=16)
    assert isinstance(made, Mixture)
    return made


def rows_of(mix: Mixture, name: str) -> list[int]:
    return [i for i, source in enumerate(mix.sources) if source == name]


# ---- what is kept apart


def test_the_last_eighth_of_each_source_is_kept_apart():
    mix, model = mixed(), tiny("llama")
    rest, apart = hold_out(mix, prepare_batches(model, mix))
    assert sorted(apart.sources) == ["code", "math", "web"] and len(rest) == 21
    larger = mixed(48)
    rest, apart = hold_out(larger, prepare_batches(model, larger))
    assert sorted(apart.sources) == ["code", "code", "math", "web", "web", "web"] and len(rest) == 42
    for name, count in (("web", 3), ("code", 2), ("math", 1)):
        kept = [b["input_ids"][0] for b, source in zip(apart.batches, apart.sources, strict=True) if source == name]
        assert torch.equal(torch.stack(kept), larger.ids[rows_of(larger, name)[-count:]])
    together = torch.cat([b["input_ids"] for b in [*rest, *apart.batches]])
    assert sorted(together.tolist()) == sorted(larger.ids.tolist())


def test_of_plain_ids_nothing_is_kept_apart():
    model = tiny("llama")
    data = prepare_batches(model, texts(5, 40))
    rest, apart = hold_out(texts(5, 40), data)
    assert apart is None and data_fingerprint(rest) == data_fingerprint(data)


def test_what_the_certificate_keeps_is_judged_by_as_far_as_it_goes():
    mix, model = mixed(), tiny("llama")
    data = prepare_batches(model, mix)
    rest, apart = hold_out(mix, data[:-6], data[-6:])
    assert data_fingerprint(rest) == data_fingerprint(data[:-6]) and len(apart.batches) == 3
    last = {str(batch["input_ids"].tolist()) for batch in data[-6:]}
    assert all(str(batch["input_ids"].tolist()) in last for batch in apart.batches)
    larger = prepare_batches(model, mixed(48))
    _, apart = hold_out(mixed(48), larger[:-4], larger[-4:])
    assert apart.sources.count("web") == 2  # an eighth would be three
    rest, apart = hold_out(mix, data[:-1], data[-1:])  # it has but one source
    assert len(rest) == 21 and sorted(apart.sources) == ["code", "math", "web"]


def test_a_mix_with_nothing_left():
    mix = Mixture(texts(5, 40)[:2], ("a", "b"), {"a": 0.5, "b": 0.5})
    with pytest.raises(ValueError, match="none left to prune with"):
        make_plan(tiny("llama"), SparsityConfig(0.5, allocator="owl"), mix)


# ---- what the report says


@pytest.fixture(scope="module")
def pruned():
    """(the mix, the dense model, the pruned one, the report)."""
    mix, dense = mixed(48), tiny("llama")
    model = copy.deepcopy(dense)
    return mix, dense, model, prune(model, make_plan(model, CONFIG, mix), mix)


def test_the_report_has_each_sources_divergence(pruned):
    mix, dense, model, report = pruned
    assert list(report.sources) == ["web", "code", "math"]
    for name, share, count in (("web", 0.5, 3), ("code", 1 / 3, 2), ("math", 1 / 6, 1)):
        ids, found = mix.ids[rows_of(mix, name)[-count:]], report.sources[name]
        assert (found["sequences"], found["predictions"]) == (count, count * 15)
        assert found["weight"] == pytest.approx(share)
        assert found["perplexity"]["dense"] == pytest.approx(evaluate_text(dense, ids).perplexity, rel=1e-4)
        assert found["perplexity"]["pruned"] == pytest.approx(evaluate_text(model, ids).perplexity, rel=1e-4)
        with torch.no_grad():
            a, b = (one(ids).logits[:, :-1].double().log_softmax(-1) for one in (dense, model))
        kl = float((a.exp() * (a - b)).sum(-1).mean())
        assert found["kl"] == pytest.approx(kl, rel=1e-3) and kl > 0.001


def test_what_is_judged_by_was_not_pruned_with(pruned):
    mix, dense, model, _ = pruned
    rest, _ = hold_out(mix, prepare_batches(dense, mix))
    again = copy.deepcopy(dense)
    prune(again, make_plan(again, CONFIG, rest), rest)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))
    assert again.config.sparsity_config == model.config.sparsity_config  # so no fingerprint knows of sources


def test_planning_does_not_see_it_either():
    mix, model = mixed(), tiny("llama")
    plan = make_plan(model, SparsityConfig(0.6, allocator="owl"), mix)
    rest, _ = hold_out(mix, prepare_batches(model, mix))
    assert plan.data == data_fingerprint(rest)


def test_pruning_by_weights_alone_is_reported_on_too():
    model, config = tiny("llama"), SparsityConfig(0.6, pruner="magnitude")
    report = prune(model, make_plan(model, config), mixed())
    assert report.sources["math"]["kl"] > 0 and model.config.sparsity_config["pruned"]["data"] is None


def test_it_is_written_and_read_again(pruned, tmp_path):
    *_, report = pruned
    report.save(tmp_path / "report.json")
    assert Report.load(tmp_path / "report.json").sources == report.sources
    plain = Report(report.target, report.layers)
    assert "sources" not in plain.to_dict() and Report.from_dict(plain.to_dict()) == plain
    for wrong in (3, [1], "x"):
        with pytest.raises(ValueError, match=r"not a pruning report: .*not a mapping"):
            Report.from_dict(report.to_dict() | {"sources": wrong})


def test_encoder_decoders():
    model = tiny("t5")
    report = prune(model, make_plan(model, CONFIG, mixed()), mixed())
    assert all(one["kl"] > 0 and one["perplexity"]["dense"] > 1 for one in report.sources.values())


# ---- from a checkpoint, streamed, interrupted


@pytest.fixture
def folder(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def near(one: dict, other: dict) -> bool:
    return list(one) == list(other) and all(math.isclose(one[n]["kl"], other[n]["kl"], rel_tol=1e-4) for n in one)


def test_from_pretrained_with_sources_of_which_one_is_the_model_itself(folder, tmp_path):
    given = [Source(texts(5, 40), 0.75, "web"), {"data": "self", "weight": 0.25}]
    options = {"sequences": 16, "length": 16}
    SparseModel.from_pretrained(
        folder,
        sparsity_config=CONFIG,
        calibration_data=given,
        calibration_options=options,
        output_dir=tmp_path / "sparse",
    )
    sources = Report.load(tmp_path / "sparse" / REPORT_FILE).sources
    assert {name: one["sequences"] for name, one in sources.items()} == {"web": 1, "self": 1}
    model = SparseModel.from_pretrained(folder, sparsity_config=CONFIG, calibration_data=mixed(32))  # mixed already
    assert model.config.sparsity_config["pruned"]["data"]["sequences"] == 28


def test_a_streamed_model(folder, pruned, tmp_path):
    mix, *_, report = pruned
    model = open_streamed(folder)
    found = prune(model, make_plan(model, CONFIG, mix), mix, output_dir=tmp_path / "sparse")
    assert near(found.sources, report.sources)
    assert Report.load(tmp_path / "sparse" / REPORT_FILE).sources == found.sources


def test_a_run_that_was_interrupted_compares_with_the_dense_model(folder, pruned, tmp_path):
    mix, *_, report = pruned
    plan = make_plan(tiny("llama"), CONFIG, mix)
    with pytest.raises(Stopped):
        prune(tiny("llama"), plan, mix, output_dir=Output(tmp_path / "sparse", after_record=stop_after(2)))
    found = prune(tiny("llama"), plan, mix, output_dir=tmp_path / "sparse")
    assert near(found.sources, report.sources)


# ---- of a race


def test_a_races_plan():
    mix, model = mixed(32), tiny("llama")
    dense = copy.deepcopy(model)
    race = {"name": "race", "candidates": ["qkvo"]}
    plan = make_plan(model, SparsityConfig(0.6, allocator=race), mix)
    used, certificate = split_of(plan.chosen, prepare_batches(model, mix))
    assert len(certificate) == 8
    report = prune(model, plan, mix)
    pruned = model.config.sparsity_config["pruned"]
    assert pruned["data"] == data_fingerprint(used) == plan.data and pruned["certificate"]["kl"] > 0
    kept = [mix.ids[i] for i in rows_of(mix, "web") if i >= 24][-2:]
    assert report.sources["web"]["sequences"] == 2
    expected = certify(dense, model, model, torch.stack(kept))["kl"]["chosen"]
    assert report.sources["web"]["kl"] == pytest.approx(expected, rel=1e-4)


def test_a_race_records_both_plans_by_source():
    mix, model = mixed(32), tiny("llama")
    plan = make_plan(model, SparsityConfig(0.6, allocator={"name": "race", "candidates": ["qkvo"]}), mix)
    found, made = plan.chosen["sources"], plan.chosen["certificate"]["kl"]
    assert [one["sequences"] for one in found.values()] == [mix.sources[-8:].count(name) for name in found]
    for which in ("uniform", "chosen"):
        assert sum(x[which] * x["sequences"] for x in found.values()) / 8 == pytest.approx(made[which])


def test_two_plans_compared_by_source():
    uniform, chosen = (
        PlanScores(torch.tensor(kl), torch.zeros(3), torch.tensor([10.0, 30.0, 10.0]))
        for kl in ([1.0, 2.0, 3.0], [0.5, 1.5, 2.5])
    )
    assert compare_by_source(["a", "b", "a"], uniform, chosen) == {
        "a": SourcePlans(2, uniform=2.0, chosen=1.5),
        "b": SourcePlans(1, uniform=2.0, chosen=1.5),
    }
