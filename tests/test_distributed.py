"""Several processes: real ones over gloo on loopback, against one process that does everything."""

from __future__ import annotations

import os
import sys

import pytest
import torch
from accelerate import PartialState

from hf_sparsity import make_plan, prune
from hf_sparsity.algorithm import Layer
from hf_sparsity.core.stats import GRAM, NORMS, SAMPLES, InputStats
from hf_sparsity.distributed import STOPPED, Processes, owners
from hf_sparsity.model.layers import find_layers
from hf_sparsity.pruning.reconstruction import BlockReconstruction
from hf_sparsity.streaming.merge import merge_stats
from hf_sparsity.streaming.observer import Collector
from hf_sparsity.streaming.operands import Operands
from tests.conftest import tiny
from tests.tools import FORKED, free_port, launched, several

ALL = frozenset({NORMS, GRAM, SAMPLES})


@pytest.fixture(scope="module")
def two():
    with several(2) as call:
        yield call


# ---- what the processes do; each returns plain values or numpy arrays


def collected(model, ids, needs, index=1):
    """Closed statistics of one block over sequences of its own batch each."""
    block = find_layers(model).blocks[index]
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    collector = Collector(Operands(block.weights.values()), needs)
    for row in ids:
        collector.begin_batch()
        with torch.no_grad(), collector.observe(slice(0, 1), length=len(row)):
            model(row[None], use_cache=False)
    collector.finish(len(ids))
    return collector.stats, {name: weight.read().device for name, weight in block.weights.items()}


def shown(stats):
    """Everything that can be read from statistics, and which layers share them."""
    first = {}
    for name, one in stats.items():
        first.setdefault(id(one), name)
    return {
        name: {
            "with": first[id(one)],
            "tokens": one.tokens,
            "sequences": one.sequences,
            "norms": one.norms.numpy() if one.tokens else None,
            "mean_sq": None if one.mean_sq is None else one.mean_sq.numpy(),
            "energy": one.energy(torch.eye(one.norms.numel())[:3] + 0.1) if one.tokens else None,
            "gram": None if one.gram is None else one.gram.numpy(),
            "samples": one.samples.numpy() if one.sample_count else None,
        }
        for name, one in stats.items()
    }


def merge_collected(processes, name, ids, needs):
    mine = processes.share(list(ids))
    stats, devices = collected(tiny(name), mine, needs) if mine else ({}, collected(tiny(name), ids, needs)[1])
    seen = list(stats)
    merged = merge_stats(processes, stats, devices, needs=needs, sequences=len(mine))
    assert all(merged[layer] is stats[layer] for layer in seen)  # reduced in place
    return seen, shown(merged)


def added(needs, x, sequences):
    stats = InputStats(needs)
    if x is not None:
        stats.add(x, sequences=len(x), last=torch.arange(len(x)))
    stats.close(sequences)
    return stats


def merge_made(processes, needs, inputs, sharing):
    """`inputs[rank]`: by object; `sharing[rank]`: layer -> object."""
    objects = {key: added(needs, x, 4) for key, x in inputs[processes.rank].items()}
    stats = {layer: objects[key] for layer, key in sharing[processes.rank].items()}
    devices = dict.fromkeys("abcd", torch.device("cpu"))
    return shown(merge_stats(processes, stats, devices, needs=needs, sequences=4))


def talk(processes, empty):
    processes.wait()
    said = processes.gather({"rank": processes.rank, "long": "ä" * 1000 * processes.rank, "nothing": None})
    nothing = processes.gather([] if empty else {})
    total = processes.sum(torch.tensor([0.1, 10.0**processes.rank], dtype=torch.float64).repeat(2, 1).T)
    return processes.rank, processes.count, processes.main, said, nothing, total.tolist()


def disagree(processes):
    processes.agree("the plan", {"b": 1, "a": [1.5]})
    try:
        processes.agree("the calibration data", {"sha256": "ab" if processes.main else "cd", "n": 1})
    except ValueError as error:
        return str(error)


def reconstruct(processes):
    """What a process of several is told that asks for a reconstruction."""
    model, ids = tiny("llama"), torch.arange(3, 67).view(4, 16)
    try:
        prune(model, make_plan(model, {"sparsity": 0.5}), ids, reconstruct=BlockReconstruction())
    except ValueError as error:
        return str(error)


def give(processes, dtype):
    """The layers' old weights are transposed for one, and each owner's new ones say whose they are."""
    like = {n: torch.zeros(3, 5, dtype=dtype) for n in "ab"} | {"c": torch.zeros(7, 2, dtype=dtype).T}
    owner = {"a": 1, "b": 0, "c": 1}
    mine = {n: (torch.randn(like[n].T.shape) + 100 * owner[n]).to(dtype).T for n in "cba" if owner[n] == processes.rank}
    before = {n: w.float().tolist() for n, w in mine.items()}
    got, left = {}, []
    for name, weight in processes.exchange(mine, owner, like):
        left.append(sorted(mine))
        assert weight.dtype == dtype and weight.shape == like[name].shape
        got[name] = weight.float().tolist()
    return before, got, left


# ---- statistics


@pytest.mark.parametrize("needs", [frozenset({NORMS}), ALL], ids=["norms", "all"])
@pytest.mark.parametrize("name, seed", [("llama", 0), ("mixtral", 5), ("deepseek_v3", 2)])
def test_merged_statistics_are_those_of_one_process(two, name, seed, needs):
    """Unequal shares, of sequences so short that each process misses an expert that the other saw."""
    ids = torch.randint(3, 120, (3, 2), generator=torch.Generator().manual_seed(seed))
    expected = shown(collected(tiny(name), ids, needs)[0])
    (seen_a, a), (seen_b, b) = two(merge_collected, name, ids, needs)
    if name != "llama":
        assert set(seen_a) - set(seen_b) and set(seen_b) - set(seen_a)
    assert set(seen_a) | set(seen_b) == set(expected) == set(a) == set(b)
    for layer, want in expected.items():
        for key, value in want.items():
            got, other = a[layer][key], b[layer][key]
            if value is None or isinstance(value, (str, int)):
                assert got == other == value, (layer, key)
                continue
            value, got, other = map(torch.as_tensor, (value, got, other))
            assert torch.equal(got, other), (layer, key)  # the same bits on all processes
            torch.testing.assert_close(got, value.to(got.dtype), rtol=1e-5, atol=1e-5)
    assert any(one["with"] != layer for layer, one in a.items())


def test_a_process_without_sequences_learns_all(two):
    ids = torch.randint(3, 120, (1, 5), generator=torch.Generator().manual_seed(4))
    expected = shown(collected(tiny("llama"), ids, ALL)[0])
    (seen_a, a), (seen_b, b) = two(merge_collected, "llama", ids, ALL)
    assert sorted(map(len, (seen_a, seen_b)))[0] == 0
    for got in (a, b):
        assert {n: v["with"] for n, v in got.items()} == {n: v["with"] for n, v in expected.items()}
        assert all((got[n]["gram"] == v["gram"]).all() and got[n]["tokens"] == 5 for n, v in expected.items())


@pytest.mark.parametrize("width", [3, 700, 1100])
def test_a_gram_matrix_of_many_tiles_is_summed_whole(two, width):
    """Small integers, whose sums are exact: equal to the last bit, on and above the diagonal and mirrored below."""
    x = torch.randint(-4, 5, (6, width)).float()
    one = {"a": "x", "b": "x"}
    for got in two(merge_made, ALL, [{"x": x[:2]}, {"x": x[2:]}], [one, one]):
        assert (got["a"]["gram"] == (x.T @ x).numpy()).all()
        assert (got["a"]["samples"] == x.numpy()).all()  # in calibration order
        assert got["b"]["with"] == "a" and got["a"]["tokens"] == 6 and got["a"]["sequences"] == 8
        assert got["a"]["energy"] == pytest.approx(float((x @ (torch.eye(width)[:3] + 0.1).T).square().sum()), rel=1e-5)


@pytest.mark.parametrize("needs", [frozenset({NORMS, SAMPLES}), ALL], ids=["norms", "gram"])
def test_layers_share_after_it_only_what_they_share_everywhere(two, needs):
    """a and b share on one process only; c was seen by one process, d by none that had a token."""
    x, y, z = torch.randint(-4, 5, (3, 2, 4)).float()
    inputs = [{"x": x, "z": z}, {"x": y, "y": z, "none": None}]
    sharing = [{"a": "x", "b": "x", "c": "z"}, {"a": "x", "b": "y", "d": "none"}]
    for got in two(merge_made, needs, inputs, sharing):
        assert list(got) == ["a", "b", "c", "d"]
        for layer, rows in {"a": [x, y], "b": [x, z], "c": [z]}.items():
            rows = torch.cat(rows)
            assert (got[layer]["samples"] == rows.numpy()).all()
            assert got[layer]["tokens"] == len(rows) and got[layer]["sequences"] == 8
            norms = (rows.square().sum(0) / 8).sqrt()
            torch.testing.assert_close(torch.tensor(got[layer]["norms"]), norms)
            assert got[layer]["with"] == layer
        assert got["d"]["tokens"] == 0 and got["d"]["sequences"] == 8 and got["d"]["gram"] is None


# ---- the rest


def test_what_one_says_all_hear(two):
    for rank, (own, count, main, said, nothing, total) in enumerate(two(talk, True)):
        assert (own, count, main) == (rank, 2, rank == 0)
        assert said == [{"rank": r, "long": "ä" * 1000 * r, "nothing": None} for r in range(2)]
        assert nothing == [[], []] and total == [[0.2, 0.2], [11.0, 11.0]]


def test_differing_inputs_are_named_on_every_process(two):
    said = two(disagree)
    assert said[0] == said[1]
    assert "differ in the calibration data" in said[0]
    assert 'process 0 has {"n": 1, "sha256": "ab"}; process 1 has {"n": 1, "sha256": "cd"}' in said[0]


def test_a_reconstruction_is_refused(two):
    assert all("runs in one process" in told for told in two(reconstruct))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_process_gets_the_owners_weights(two, dtype):
    (mine_a, got_a, left_a), (mine_b, got_b, left_b) = two(give, dtype)
    assert got_a == got_b == mine_a | mine_b and list(got_a) == ["a", "b", "c"]
    assert left_a == [["b"], [], []] and left_b == [["c"], ["c"], []]  # let go one by one


def layers(*shapes):
    return [Layer(str(i), torch.empty(shape, device="meta")) for i, shape in enumerate(shapes)]


def test_owners_take_whole_groups_and_share_the_cost():
    groups = [layers((8, 8), (8, 8), (8, 8)), layers((8, 8)), layers((24, 8), (24, 8)), layers((8, 24))]
    # costs: 1706, 682, 3242, 9216
    assert owners(groups, 2) == [1, 1, 1, 0]
    assert owners(groups, 1) == [0, 0, 0, 0]
    assert owners(groups, 9) == [2, 3, 1, 0]
    assert owners([layers((4, 4))] * 6, 3) == [0, 1, 2, 0, 1, 2]
    assert owners([], 2) == []


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_shares_in_the_order_of_ranks_are_all_items(count):
    for length in range(8):
        shares = [Processes(rank, count).share(range(length)) for rank in range(count)]
        assert [item for share in shares for item in share] == list(range(length))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_alone_nothing_is_distributed(monkeypatch):
    for name in ("all_reduce", "all_gather", "broadcast", "barrier", "init_process_group", "get_backend_config"):
        monkeypatch.setattr(torch.distributed, name, None)
    alone = Processes.current()
    assert alone == Processes(0, 1) and alone.main
    needs = frozenset({NORMS})
    stats, devices = collected(tiny("llama"), torch.arange(3, 9)[None], needs)
    before = [one.mean_sq for one in stats.values()]
    merged = merge_stats(alone, stats, devices, needs=needs, sequences=1)
    assert merged == stats and all(a is one.mean_sq for a, one in zip(before, merged.values(), strict=True))
    thing, weight = object(), torch.ones(2, 2)
    alone.wait()
    alone.agree("anything", thing)
    assert alone.gather(thing) == [thing] and alone.sum(weight) is weight
    assert [w is weight for _, w in alone.exchange({"a": weight}, {"a": 0}, {"a": weight})] == [True]


def dying(environment, said, then):
    """Joins the other process; that of rank 1 ends with an error, while the other waits in `then`."""
    sys.stderr.flush()
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
    os.environ.update(environment)
    del os.environ["LOCAL_RANK"]  # not every launcher gives one; without it this state finds only one process
    PartialState()  # as a library may have done
    processes = Processes.current()
    assert processes.count == 2
    processes.wait()
    if processes.rank == 1:
        raise ValueError("the disk is full")
    processes.wait() if then == "wait" else processes.sum(torch.ones(3))


@pytest.mark.parametrize("then", ["sum", "wait"])
def test_when_one_process_dies_the_others_end_and_say_so(then, tmp_path):
    port, logs = free_port(), [tmp_path / f"{rank}" for rank in range(2)]
    started = [
        FORKED.Process(target=dying, args=(launched(rank, 2, port), logs[rank], then), daemon=True) for rank in range(2)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(100)
    assert [process.exitcode for process in started] == [1, 1]
    said = [log.read_text() for log in logs]
    assert f"RuntimeError: {STOPPED}" in said[0] and "ValueError: the disk is full" in said[1]
