"""Calibration mixes: shares, order, names, what each source gives, and what is refused."""

from __future__ import annotations

import random

import pytest
import torch
from datasets import Dataset

from hf_sparsity import Source, calibration_batches
from hf_sparsity.calibration.batches import data_fingerprint, prepare_batches
from hf_sparsity.calibration.mixture import Mixture, counts, interleaved, names, sources_in
from tests.conftest import tiny


def ids(first: int, sequences: int = 40, tokens: int = 8) -> torch.Tensor:
    """Sequences that tell where they are from: all of one source begin with the same token."""
    rows = torch.arange(sequences * tokens).reshape(sequences, tokens) % 50 + 60
    rows[:, 0], rows[:, 1] = first, torch.arange(sequences)
    return rows


def mixed(**changes) -> Mixture:
    """Twenty sequences of three sources: ten, six and four."""
    sources = [Source(ids(1), 0.5, "web"), Source(ids(2), 0.3, "code"), Source(ids(3), 0.2, "math")]
    made = calibration_batches(sources, **({"sequences": 20, "length": 8} | changes))
    assert isinstance(made, Mixture)
    return made


# ---- shares and order


@pytest.mark.parametrize(
    ("weights", "total", "expected"),
    [
        ([0.5, 0.3, 0.2], 10, [5, 3, 2]),
        ([1, 1, 1], 10, [4, 3, 3]),
        ([5, 3, 2], 128, [64, 38, 26]),  # 64, 38.4, 25.6
        ([0.15, 0.05, 0.8], 10, [2, 2, 6]),  # a tie goes to the first; then no source has fewer than two
        ([1000, 1, 1], 6, [2, 2, 2]),
        ([1e-9, 1], 128, [2, 126]),
    ],
)
def test_shares_are_whole_sequences_by_the_largest_remainder(weights, total, expected):
    assert counts(weights, total) == expected


def test_too_few_sequences_for_so_many_sources():
    with pytest.raises(ValueError, match=r"5 sequences are too few for a mix of 3 sources.*give sequences=6 or more"):
        counts([1, 1, 1], 5)


def test_every_stretch_holds_the_mix():
    draw = random.Random(0)
    for _ in range(60):
        sizes = [draw.randint(2, 40) for _ in range(draw.randint(2, 6))]
        order, total = interleaved(sizes), sum(sizes)
        assert [order.count(i) for i in range(len(sizes))] == sizes
        for source, size in enumerate(sizes):
            ahead = [0.0]  # of its share, after each position
            for position, one in enumerate(order, 1):
                ahead.append(ahead[-1] + (one == source) - size / total)
                assert position
            assert (
                max(ahead) - min(ahead) < 2
            )  # any stretch has its share of the source, but for less than two sequences


# ---- what a mix is made of


def test_a_mix_has_the_sequences_that_each_source_gives_alone():
    made = mixed()
    assert made.ids.shape == (20, 8) and made.ids.dtype == torch.int64
    assert [made.sources.count(name) for name in ("web", "code", "math")] == [10, 6, 4]
    assert made.weights == {"web": 0.5, "code": 0.3, "math": 0.2}
    for first, name in ((1, "web"), (2, "code"), (3, "math")):
        own = made.ids[[source == name for source in made.sources]]
        assert torch.equal(own, ids(first)[: len(own)])
    assert torch.equal(made.ids, mixed().ids) and made.sources == mixed().sources


def test_texts_are_drawn_as_without_a_mix():
    texts = {seed: [[one + i % 7] * 5 for i in range(50)] for one, seed in ((10, 0), (30, 1))}
    both = calibration_batches([Source(texts[0], name="a"), Source(texts[1], name="b")], sequences=8, length=10, seed=5)
    for name, own in (("a", texts[0]), ("b", texts[1])):
        alone = calibration_batches(own, sequences=4, length=10, seed=5)
        assert torch.equal(both.ids[[source == name for source in both.sources]], alone)
        assert not torch.equal(alone, calibration_batches(own, sequences=4, length=10, seed=6))


def test_one_source_is_no_mix():
    rows = [[i] * 10 for i in range(1, 9)]
    plain = calibration_batches(rows, sequences=4, length=10, seed=3)
    for given in (Source(rows), [Source(rows, 0.3, "own")], [{"data": rows}]):
        made = calibration_batches(given, sequences=4, length=10, seed=3)
        assert isinstance(made, torch.Tensor) and torch.equal(made, plain)
    dataset = Dataset.from_dict({"other": rows, "input_ids": rows[::-1]})
    assert torch.equal(
        calibration_batches(Source(dataset, column="other"), length=10),
        calibration_batches(dataset, length=10, column="other"),
    )


def test_each_source_may_have_its_own_column():
    rows = [[i] * 8 for i in range(1, 9)]
    first, second = Dataset.from_dict({"a": rows, "b": rows[:4] * 2}), Dataset.from_dict({"b": [[90] * 8] * 8})
    made = calibration_batches(
        [Source(first, name="x", column="a"), {"data": second}], length=8, sequences=8, column="b"
    )
    assert made.sources == ("x", "source") * 4 and bool((made.ids[1::2] == 90).all())
    assert len({int(row[0]) for row in made.ids[::2]}) == 4


def test_what_is_a_mix_and_what_are_documents():
    chat = [{"role": "user", "content": "Hello"}]
    for documents in (["text"], [chat], [{"text": "a"}], [], "c4", [[1, 2]], [{"data": "text", "other": 1}]):
        assert sources_in(documents) is None
    assert sources_in([{"data": "a text"}], column="data") is None
    assert [one.data for one in sources_in([{"data": "c4", "weight": 2.0}, Source("self")])] == ["c4", "self"]


def test_names():
    paths = [Source("data/a.txt"), Source("other/a.txt"), Source("allenai/c4"), Source("self"), Source(["text"])]
    assert names(paths) == ["a.txt", "a.txt 2", "allenai/c4", "self", "source"]
    assert names([Source("c4"), Source("x", name="c4")]) == ["c4 2", "c4"]


def test_a_mix_goes_where_ids_go():
    made, model = mixed(), tiny("llama")
    assert data_fingerprint(prepare_batches(model, made)) == data_fingerprint(prepare_batches(model, made.ids))
    assert len(made) == 20 and torch.equal(made[3]["input_ids"], made.ids[3:4])
    part = made[4:7]
    assert torch.equal(part.ids, made.ids[4:7]) and part.sources == made.sources[4:7]


# ---- what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": 0}, "source c4: weight=0 must be a number, above 0"),
        ({"weight": -1.0}, "weight=-1.0"),
        ({"weight": float("nan")}, "weight=nan"),
        ({"weight": float("inf")}, "weight=inf"),
        ({"weight": True}, "weight=True"),
        ({"weight": "half"}, "weight='half'"),
        ({"name": ""}, "name is ''"),
        ({"name": " c4"}, "name is ' c4'"),
        ({"name": "a\nb"}, "one line of text"),
        ({"name": "x" * 101}, "1 to 100 characters"),
        ({"name": 3}, "name is 3"),
        ({"data": None}, "data is None"),
        ({"data": Source("c4")}, "texts, a file, a dataset or 'self'"),
    ],
)
def test_a_bad_source(changes, message):
    with pytest.raises(ValueError, match=message):
        Source(**({"data": "c4"} | changes))


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([Source("c4"), "texts"], "entry 1 of the calibration mix is a str; write Source"),
        ([Source("c4", name="a"), Source("x", name="a")], "two sources of the calibration mix are called 'a'"),
        (
            [Source(ids(1)), Source("no/such.txt", name="gone")],
            "source 'gone' of the calibration mix: .*cannot be read",
        ),
        ([Source(ids(1)), Source(["a text"])], "source 'source 2' of the calibration mix: texts need a tokenizer"),
        ([Source(ids(1)), Source("self")], "source 'self' of the calibration mix: .*pass model="),
        ([Source(ids(1)), Source(ids(2, tokens=4), name="short")], "source 'short' of the calibration mix: token ids"),
        (
            [Source(ids(1), 3), Source(ids(2, sequences=3), name="few")],
            "source 'few' of the calibration mix fills 3 of the 5 sequences of 8 tokens that its weight makes of 20; "
            ".*or sequences=12",
        ),
        (
            [Source(ids(1)), Source([[1, 2]], name="tiny")],
            "source 'tiny' of the calibration mix fills 0 of the 10 sequences of 8 tokens.*a smaller length$",
        ),
    ],
)
def test_a_bad_mix(sources, message):
    with pytest.raises(ValueError, match=message):
        calibration_batches(sources, sequences=20, length=8)


def test_what_is_proposed_for_too_little_text_works():
    sources = [Source(ids(1), 3), Source(ids(2, sequences=3), name="few")]
    assert calibration_batches(sources, sequences=12, length=8).sources.count("few") == 3


def test_a_mixture_that_does_not_fit_its_names():
    with pytest.raises(ValueError, match="do not go with 1 names"):
        Mixture(ids(1), ("a",), {"a": 1.0})
    with pytest.raises(ValueError, match="no weight is given for the sources b"):
        Mixture(ids(1)[:2], ("a", "b"), {"a": 1.0})
