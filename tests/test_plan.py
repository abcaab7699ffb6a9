"""Plan and Report: files that are whole or not there, and damaged ones that say so."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import replace

import pytest

from hf_sparsity.plan import LARGEST_FILE, LayerPlan, LayerReport, Plan, Report, read_json, write_json

EMBEDDED = 256 * 1024  # bytes of a config.json that every tool still reads in one go


def make(layers: dict[str, LayerPlan] | None = None, **config) -> Plan:
    if layers is None:
        layers = {
            "model.layers.0.q_proj": LayerPlan(0.6, 1000, measure=1.25),
            "model.layers.0.up_proj": LayerPlan(0.1 + 0.2, 3000, pattern="2:4"),
            "model.layers.1.q_proj": LayerPlan(0.0, 500, measure=-3.0),
        }
    total = sum(layer.size for layer in layers.values())
    target = sum(layer.sparsity * layer.size for layer in layers.values()) / total
    return Plan(
        config={"sparsity": target, "pattern": "unstructured", "ignore": ["lm_head"]} | config,
        layers=layers,
        model={"type": "llama", "name": "x", "layers": "ab", "weights": None},
        data={"sequences": 2, "tokens": 64, "sha256": "cd"},
        versions={"torch": "2.13.0"},
    )


def experts(count: int, seed: int = 0, **changes) -> dict[str, LayerPlan]:
    """As `make_plan` rounds the experts of a fused parameter: 9 decimals, and 4 digits of the measure."""
    draw = random.Random(seed)
    one = {"size": 4096} | changes
    return {
        f"model.layers.{seed}.mlp.experts.up_proj[{e}]": LayerPlan(
            **({"sparsity": round(draw.uniform(0.3, 0.95), 9), "measure": float(f"{draw.uniform(0, 8):.4g}")} | one)
        )
        for e in range(count)
    }


def written(plan: Plan) -> dict:
    return json.loads(json.dumps(plan.to_dict()))


# ---- round trips


def test_round_trip_through_a_file(tmp_path):
    plan = make()
    plan.save(tmp_path / "deep" / "plan.json")
    again = Plan.load(tmp_path / "deep" / "plan.json")
    assert again == plan
    assert list(again.layers) == list(plan.layers)
    assert again.layers["model.layers.0.up_proj"].sparsity == 0.1 + 0.2  # to the bit
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["plan.json"]


def test_the_file_is_readable():
    data = written(make())
    assert list(data) == ["version", "config", "model", "data", "versions", "layers"]
    assert data["layers"]["model.layers.0.q_proj"] == {"sparsity": 0.6, "size": 1000, "measure": 1.25}
    assert data["layers"]["model.layers.0.up_proj"]["pattern"] == "2:4"


def test_what_may_be_left_out():
    plan = Plan.from_dict({"version": 1, "config": {"sparsity": 0.5}, "layers": {"a": {"sparsity": 0.5, "size": 10}}})
    assert plan.layers["a"] == LayerPlan(0.5, 10, "unstructured", None)
    assert (plan.model, plan.data, plan.versions, plan.target, plan.sparsity) == ({}, None, {}, 0.5, 0.5)
    assert Plan.from_dict(written(plan)) == plan


def test_instances_of_algorithms_are_not_written():
    plan = make()
    carried = replace(plan, algorithms={"allocator": object()})
    assert carried == plan and written(carried) == written(plan)


def test_a_model_folder(tmp_path):
    plan = make()
    config = {"model_type": "llama", "sparsity_config": plan.to_dict() | {"pruned": {"sparsity": 0.5}}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert Plan.load(tmp_path) == plan
    assert Plan.load(str(tmp_path / "config.json")) == plan
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=r"config.json: this is not a sparsity plan"):
        Plan.load(tmp_path)


# ---- fused experts


def test_experts_are_one_entry():
    plan = make(experts(128) | experts(128, seed=1, sparsity=0.5, measure=2.0))
    data = written(plan)
    first, second = data["layers"].items()
    assert first[0] == "model.layers.0.mlp.experts.up_proj[0:128]"
    assert len(first[1]["sparsity"].split()) == len(first[1]["measure"].split()) == 128
    assert second == ("model.layers.1.mlp.experts.up_proj[0:128]", {"sparsity": 0.5, "size": 4096, "measure": 2.0})
    assert Plan.from_dict(data) == plan
    assert list(Plan.from_dict(data).layers) == list(plan.layers)


@pytest.mark.parametrize(
    "edit",
    [
        lambda e, layer: replace(layer, pattern="2:8") if e % 2 else layer,
        lambda e, layer: replace(layer, pattern=f"{1 + e % 3}:8"),
        lambda e, layer: replace(layer, measure=None) if e in (0, 3) else layer,
        lambda e, layer: replace(layer, measure=-layer.measure if e else 0.0),
        lambda e, layer: replace(layer, sparsity=[0, 0.0, 0.1 + 0.2, 1e-9, 1 / 3][e % 5]),
        lambda e, layer: replace(layer, size=4096 + e),
    ],
    ids=["some patterns", "patterns", "some measures", "signs", "unrounded", "sizes"],
)
def test_experts_come_back_exactly(edit):
    layers = {n: edit(e, layer) for e, (n, layer) in enumerate(experts(6).items())}
    plan = make(layers)
    assert Plan.from_dict(written(plan)) == plan


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_experts_that_are_not_all_there_stay_apart(missing):
    layers = experts(4)
    del layers[f"model.layers.0.mlp.experts.up_proj[{missing}]"]
    plan = make(layers)
    assert list(written(plan)["layers"]) == list(layers)
    assert Plan.from_dict(written(plan)) == plan


def test_size_in_config_json_of_a_large_dense_model():
    draw = random.Random(0)
    names = [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]
    layers = {
        f"model.layers.{b}.{n}": LayerPlan(draw.random() * 0.9, 8192 * 28672, measure=draw.random() * 8)
        for b in range(80)
        for n in names
    }
    assert len(json.dumps({"sparsity_config": make(layers).to_dict()}, indent=2)) < EMBEDDED


def test_size_in_config_json_of_a_mixture_of_experts():
    draw = random.Random(0)
    layers = {}
    for b in range(48):
        for n in "qkvo":
            layers[f"model.layers.{b}.self_attn.{n}_proj"] = LayerPlan(
                draw.random() * 0.9, 2048 * 4096, measure=draw.random() * 8
            )
        for n in ("gate_up_proj", "down_proj"):
            for e in range(128):
                name = f"model.layers.{b}.mlp.experts.{n}[{e}]"
                layers[name] = LayerPlan(
                    round(draw.uniform(0.3, 0.95), 9), 2048 * 1536, measure=float(f"{draw.random() * 8:.4g}")
                )
    plan = make(layers)
    for one in (plan, plan.with_target(0.7)):
        text = json.dumps({"sparsity_config": one.to_dict()}, indent=2)
        assert len(text) < EMBEDDED
        assert Plan.from_dict(json.loads(text)["sparsity_config"]) == one


# ---- target


def test_an_edited_plan_that_misses_its_target():
    plan = make()
    plan.check_target()
    layers = dict(plan.layers) | {"model.layers.1.q_proj": LayerPlan(0.1, 500)}
    with pytest.raises(ValueError, match=r"add up to a sparsity of 0\.3444.*but its target is 0\.3333.*with_target"):
        replace(plan, layers=layers).check_target()
    replace(plan, layers=layers).with_target(plan.target).check_target()


@pytest.mark.parametrize(("wrong", "passes"), [(0.0, True), (9e-7, True), (-9e-7, True), (2e-6, False), (-2e-6, False)])
def test_target_is_met_to_a_millionth(wrong, passes):
    plan = make({"a": LayerPlan(0.5 + wrong, 1000)}, sparsity=0.5)
    if passes:
        return plan.check_target()
    with pytest.raises(ValueError, match="target"):
        plan.check_target()


def test_a_mixed_pattern_may_be_sparser_by_a_step_of_its_largest_layer():
    layers = {"a": LayerPlan(0.5, 1000, "4:8"), "b": LayerPlan(0.625, 3000, "3:8")}
    make(layers, pattern="*:8", sparsity=0.501).check_target()
    for target in (0.49, 0.6):  # a step of b, 3/4 of the weights, is 0.09375, and the plan's sparsity is 0.59375
        with pytest.raises(ValueError, match="target"):
            make(layers, pattern="*:8", sparsity=target).check_target()


@pytest.mark.parametrize("target", [0.0, 0.05, 0.5, 0.7, 0.95, 0.999])
def test_with_target(target):
    draw = random.Random(3)
    layers = {f"l{i}": LayerPlan(draw.random() * 0.9, draw.randint(1, 10**6)) for i in range(20)} | experts(8)
    plan = make(layers).with_target(target)
    plan.check_target()
    assert plan.target == target == plan.config["sparsity"]
    assert plan.sparsity == pytest.approx(target, abs=1e-6)
    assert all(0 <= layer.sparsity <= max(0.998, target) for layer in plan.layers.values())
    before = [layers[n].sparsity for n in layers]
    after = [plan.layers[n].sparsity for n in layers]
    pairs = sorted(zip(before, after, strict=True))
    assert all(b[1] >= a[1] - 1e-9 for a, b in itertools.pairwise(pairs)), "the order of layers changed"
    free = [a - b for a, b in zip(after, before, strict=True) if 0 < a < 0.998]
    assert max(free, default=0) - min(free, default=0) < 1e-8, "not all shifted by the same amount"
    assert Plan.from_dict(written(plan)) == plan


@pytest.mark.parametrize("target", [1.0, -0.1, float("nan")])
def test_with_target_out_of_range(target):
    with pytest.raises(ValueError, match=r"target=.* must be a number, at least 0 and below 1"):
        make().with_target(target)


# ---- files


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "plan.json"
    make().save(path)
    before = path.read_bytes()
    for unwritable in (float("nan"), object()):
        with pytest.raises((ValueError, TypeError)):
            write_json(path, {"ok": list(range(10_000)), "then": unwritable})
        assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"], "a temporary file was left behind"


def test_a_disk_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    make().save(path)
    before = path.read_bytes()

    def full(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space"):
        make().save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_a_truncated_file_at_every_length(tmp_path):
    path = tmp_path / "plan.json"
    make().save(path)
    text = path.read_text()
    for end in range(0, len(text) - 2, 7):
        path.write_text(text[:end])
        with pytest.raises(ValueError, match=r"plan.json is truncated or not JSON"):
            Plan.load(path)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"[" * 100_000, b"not json", b"{'a': 1}"])
def test_files_that_are_not_json(tmp_path, content):
    (tmp_path / "plan.json").write_bytes(content)
    with pytest.raises(ValueError, match="truncated or not JSON"):
        Plan.load(tmp_path / "plan.json")


def test_a_missing_file_and_a_huge_one(tmp_path):
    with pytest.raises(FileNotFoundError):
        Plan.load(tmp_path / "plan.json")
    with pytest.raises(FileNotFoundError):
        Plan.load(tmp_path)
    with open(tmp_path / "plan.json", "wb") as file:
        file.truncate(LARGEST_FILE + 1)
    with pytest.raises(ValueError, match="is refused"):
        Plan.load(tmp_path / "plan.json")


Q = "model.layers.0.q_proj"
E = "model.layers.0.mlp.experts.up_proj[0:4]"
ALTERED = {
    "unknown version": (lambda d: d.update(version=2), "version 2; this release of hf_sparsity reads version 1"),
    "no version": (lambda d: d.pop("version"), "version None"),
    "no config": (lambda d: d.pop("config"), "not a sparsity plan"),
    "no layers": (lambda d: d.pop("layers"), "not a sparsity plan"),
    "empty layers": (lambda d: d.update(layers={}), "no layers"),
    "layers in a list": (lambda d: d.update(layers=[1]), "'layers' must be an object"),
    "layer is a number": (lambda d: d["layers"].update({Q: 0.5}), "'layers' must be an object"),
    "config is a string": (lambda d: d.update(config="x"), "'config' must be an object"),
    "no target": (lambda d: d["config"].pop("sparsity"), "global 'sparsity'"),
    "target is a string": (lambda d: d["config"].update(sparsity="0.5"), r"config.sparsity is '0.5'.*\[0, 1\)"),
    "target 1.2": (lambda d: d["config"].update(sparsity=1.2), "config.sparsity is 1.2"),
    "target NaN": (lambda d: d["config"].update(sparsity=float("nan")), "config.sparsity is nan"),
    "target true": (lambda d: d["config"].update(sparsity=False), "config.sparsity is False"),
    "pattern": (lambda d: d["config"].update(pattern="*:0"), r"config.pattern is '\*:0'"),
    "pattern is a number": (lambda d: d["config"].update(pattern=4), "config.pattern is 4"),
    "model is a list": (lambda d: d.update(model=[1]), "'model' must be an object"),
    "data is a string": (lambda d: d.update(data="abc"), "'data' must be an object"),
    "versions is a number": (lambda d: d.update(versions=5), "'versions' must be an object"),
    "no sparsity": (lambda d: d["layers"][Q].pop("sparsity"), f"layer {Q} needs 'sparsity' and 'size'.*it has"),
    "no size": (lambda d: d["layers"][Q].pop("size"), "needs 'sparsity' and 'size'"),
    "unknown key": (lambda d: d["layers"][Q].update(sparsty=1), "needs 'sparsity' and 'size'.*'sparsty'"),
    "sparsity 1.2": (lambda d: d["layers"][Q].update(sparsity=1.2), f"sparsity of {Q} is 1.2"),
    "sparsity 1": (lambda d: d["layers"][Q].update(sparsity=1), r"is 1; it must be a number in \[0, 1\)"),
    "sparsity negative": (lambda d: d["layers"][Q].update(sparsity=-0.1), "is -0.1"),
    "sparsity NaN": (lambda d: d["layers"][Q].update(sparsity=float("nan")), "is nan"),
    "sparsity is a string": (lambda d: d["layers"][Q].update(sparsity="0.6"), "is '0.6'"),
    "sparsity is a list": (lambda d: d["layers"][Q].update(sparsity=[0.6]), r"is \[0.6\]"),
    "sparsity null": (lambda d: d["layers"][Q].update(sparsity=None), "is None"),
    "sparsity false": (lambda d: d["layers"][Q].update(sparsity=False), "is False"),
    "size negative": (lambda d: d["layers"][Q].update(size=-5), f"size of {Q} is -5"),
    "size zero": (lambda d: d["layers"][Q].update(size=0), "is 0; it must be a positive"),
    "size a fraction": (lambda d: d["layers"][Q].update(size=1000.0), "is 1000.0"),
    "size true": (lambda d: d["layers"][Q].update(size=True), "is True"),
    "size astronomic": (lambda d: d["layers"][Q].update(size=10**400), "size of"),
    "measure is a string": (lambda d: d["layers"][Q].update(measure="high"), f"measure of {Q} is 'high'"),
    "measure is infinite": (lambda d: d["layers"][Q].update(measure=float("inf")), "measure of .* is inf"),
    "layer pattern": (lambda d: d["layers"][Q].update(pattern="2of4"), f"pattern of {Q} is '2of4'"),
    "layer pattern null": (lambda d: d["layers"][Q].update(pattern=None), f"pattern of {Q} is 'None'"),
    "too few experts": (
        lambda d: d["layers"][E].update(sparsity="0.1 0.2 0.3"),
        "has 3 values of 'sparsity' for 4 experts",
    ),
    "too many experts": (
        lambda d: d["layers"][E].update(measure="1 2 3 4 5"),
        "has 5 values of 'measure' for 4 experts",
    ),
    "an expert is a word": (lambda d: d["layers"][E].update(sparsity="0.1 0.2 x 0.4"), "has 'x' as a sparsity"),
    "an expert is missing": (
        lambda d: d["layers"][E].update(sparsity="0.1 - 0.2 0.3"),
        r"up_proj\[1\] needs 'sparsity'",
    ),
    "an expert has 1.5": (
        lambda d: d["layers"][E].update(sparsity="0.1 0.2 1.5 0.4"),
        r"sparsity of .*up_proj\[2\] is 1.5",
    ),
    "an expert is nan": (lambda d: d["layers"][E].update(sparsity="0.1 0.2 nan 0.4"), r"up_proj\[2\] is nan"),
    "no experts": (lambda d: d["layers"].update({"x[0:0]": {"sparsity": 0.5, "size": 1}}), r"x\[0:0\] names 0 experts"),
    "experts without end": (
        lambda d: d["layers"].update({"x[0:9999999999]": {"sparsity": 0.5, "size": 1}}),
        "names 9999999999 experts",
    ),
    "an expert twice": (
        lambda d: d["layers"].update({E[:-5] + "[1]": {"sparsity": 0.5, "size": 1}}),
        r"up_proj\[1\] is there twice",
    ),
}


@pytest.mark.parametrize("name", ALTERED)
def test_an_altered_file(tmp_path, name):
    plan = make(make().layers | experts(4))
    data = written(plan)
    edit, says = ALTERED[name]
    edit(data)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"plan.json: .*" + says):
        Plan.load(path)


@pytest.mark.parametrize("data", [None, 5, "plan", [], {}])
def test_other_json(data):
    with pytest.raises(ValueError, match="not a sparsity plan"):
        Plan.from_dict(data)


def test_300_random_mutations_load_or_say_why(tmp_path):
    draw = random.Random(5)
    original = json.dumps(make(make().layers | experts(4) | experts(3, seed=1)).to_dict(), indent=1)
    path = tmp_path / "plan.json"
    loaded = 0
    for _ in range(300):
        text = list(original)
        for _ in range(draw.randint(1, 3)):
            at = draw.randrange(len(text))
            match draw.randrange(5):
                case 0:
                    del text[at : at + draw.randint(1, 20)]
                case 1:
                    text[at] = chr(draw.randrange(32, 127))
                case 2:
                    text[at] = draw.choice('0123456789.-eE,:[]{}"')
                case 3:
                    text[at:at] = draw.choice(
                        ["null", "1e999", "NaN", "[]", "{}", '"x"', "-", "0" * 50, "9" * 50, "\u00e9"]
                    )
                case 4:
                    text = text[: max(at, len(text) // 2)]
            if not text:
                break
        path.write_text("".join(text), encoding="utf-8")
        try:
            plan = Plan.load(path)
        except ValueError:
            continue
        loaded += 1
        assert all(0 <= layer.sparsity < 1 and layer.size > 0 for layer in plan.layers.values())
        assert Plan.from_dict(written(plan)) == plan
        try:
            plan.check_target()
        except ValueError:
            continue
    assert 10 < loaded < 290, "the mutations are too weak or too strong to say anything"


def test_200_values_exchanged_load_or_say_why():
    """As above, but always valid JSON: any value may have become any other."""
    draw = random.Random(6)
    others = [None, True, 0, -1, 0.5, 1e308, 10**30, float("nan"), "", "x", "0.5 0.5", "- - - -", "2:4", "*:8"]
    others += [[], [1], {}, {"sparsity": 0.1, "size": 3}]
    refused = 0
    for _ in range(200):
        data = written(make(make().layers | experts(4)))
        places = []

        def collect(node, places=places):
            for key in list(node):
                places.append((node, key))
                if isinstance(node[key], dict):
                    collect(node[key])

        collect(data)
        node, key = draw.choice(places)
        node[key] = draw.choice(others)
        try:
            plan = Plan.from_dict(data)
            again = Plan.from_dict(written(plan))
            assert json.dumps(again.to_dict()) == json.dumps(plan.to_dict())  # as text: NaN is not itself
            plan.check_target()
        except ValueError:
            refused += 1
    assert refused > 50


# ---- reports


def make_report() -> Report:
    layers = {
        "a": LayerReport(zeros=700, size=1000, planned=0.7, error=0.125, tokens=64, seconds=0.5),
        "b": LayerReport(zeros=0, size=200, planned=0.0),
        "c": LayerReport(zeros=100, size=100, planned=0.9, note="sparser than planned"),
    }
    return Report(target=0.61, layers=layers, skipped={"lm_head": "the output embedding"}, seconds=1.5)


def test_report_round_trip(tmp_path):
    report = make_report()
    report.save(tmp_path / "report.json")
    assert Report.load(tmp_path / "report.json") == report
    assert json.loads((tmp_path / "report.json").read_text())["sparsity"] == report.sparsity == 800 / 1300
    assert report.layers["a"].sparsity == 0.7
    assert report.notes == {"c": "sparser than planned"}


@pytest.mark.parametrize(
    "edit",
    [
        lambda d: d.update(version=2),
        lambda d: d.pop("version"),
        lambda d: d.pop("layers"),
        lambda d: d.pop("target"),
        lambda d: d.update(layers=[1]),
        lambda d: d["layers"]["a"].pop("zeros"),
        lambda d: d["layers"]["a"].update(zeros="many"),
        lambda d: d["layers"]["a"].update(zeros=1001),
        lambda d: d["layers"]["a"].update(size=0),
        lambda d: d["layers"]["a"].update(colour="red"),
        lambda d: d["layers"].update(a=5),
    ],
)
def test_an_altered_report(edit):
    data = make_report().to_dict()
    edit(data)
    with pytest.raises(ValueError, match="report"):
        Report.from_dict(data)


@pytest.mark.parametrize("data", [None, 5, "report", [], {}])
def test_what_is_not_a_report(data):
    with pytest.raises(ValueError, match="not a pruning report"):
        Report.from_dict(data)


def test_read_json_reads_what_write_json_wrote(tmp_path):
    write_json(tmp_path / "x.json", {"ä": [1, None, True]})
    assert read_json(tmp_path / "x.json") == {"ä": [1, None, True]}
