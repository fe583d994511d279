"""Claims: what is planted is found, what is false is not seen, and too little is open."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from holdfast.experiments.records.record import Record
from holdfast.experiments.studies.claims import Claim, answer
from holdfast.experiments.studies.study import read_study, study_names


def record(seed: int, **values: Any) -> Record:
    known = {key.replace("__", "."): value for key, value in values.items()} | {"seed": seed}
    return Record(Path(str(known)), "finished", known)


def better(above: float = 0.0) -> Claim:
    cells = {
        "ours": {"of": "certified", "where": {"method": "BCP"}},
        "theirs": {"of": "certified", "where": {"method": "LMT"}},
    }
    return Claim.model_validate({"says": "More.", "cells": cells, "number": "ours - theirs", "above": above})


def pair(seed: int, lead: float, base: float = 0.5) -> list[Record]:
    return [record(seed, method="BCP", certified=base + lead), record(seed, method="LMT", certified=base)]


def test_a_planted_difference_is_seen_and_its_opposite_is_not() -> None:
    """The seeds' means move far more than the difference, which is taken seed by seed."""
    runs = [one for seed, base in enumerate((0.2, 0.5, 0.8)) for one in pair(seed, 0.02 + 0.001 * seed, base)]
    found = answer(better(), runs)
    assert (found.answer, found.number.n) == ("seen", 3)
    assert found.number.value == pytest.approx(0.021)
    assert (
        answer(better(), [one for seed in range(3) for one in pair(seed, -0.02 + 0.001 * seed)]).answer
        == "not seen"
    )
    assert answer(better(0.1), runs).answer == "not seen"


def test_too_few_seeds_leave_it_open_and_say_so() -> None:
    one = answer(better(), pair(0, 0.3))
    assert (one.answer, one.number.n) == ("open", 1)
    assert "three" in one.why
    spread = answer(better(), [run for seed, lead in enumerate((-0.1, 0.1, 0.12)) for run in pair(seed, lead)])
    assert spread.answer == "open"
    assert "seeds" in spread.why
    none = answer(better(), [record(0, method="BCP", certified=0.5)])
    assert (none.answer, none.interval) == ("open", "–")
    digits = better().model_copy(update={"needs": "MNIST, half an hour"})
    assert answer(digits, pair(0, 0.3)).why == "MNIST, half an hour"


def test_an_exact_number_needs_no_seeds() -> None:
    claim = Claim.model_validate(
        {"says": "Apart.", "cells": {"d": {"of": "train"}}, "number": "d / 2", "above": 0.1, "exact": True}
    )
    assert answer(claim, [record(0, train=0.3)]).answer == "seen"
    assert answer(claim, [record(0, train=0.2)]).answer == "not seen"  # no more than, not at least


def test_slopes_and_ranks_are_of_rows_in_order() -> None:
    cells = {
        "n": {"of": "data.train_size", "along": "data.train_size"},
        "certified": {"of": "certified", "along": "data.train_size"},
    }
    claim = Claim.model_validate(
        {"says": "Grows.", "cells": cells, "number": "slope(log2(n), certified)", "above": 0.04}
    )
    runs = [
        record(seed, data__train_size=size, certified=0.1 + 0.05 * math.log2(size / 30) + 1e-4 * seed * size / 30)
        for size in (120, 30, 60)
        for seed in range(3)
    ]
    found = answer(claim, runs)
    assert found.answer == "seen"
    assert found.number.value == pytest.approx(0.05, abs=0.001)
    ranks = claim.model_copy(update={"number": "spearman(n, -certified)", "above": None, "below": -0.99})
    assert answer(ranks, runs).number.value == pytest.approx(-1)
    assert answer(ranks, runs).answer == "seen"
    tied = claim.model_copy(update={"number": "spearman(n, certified)"})
    flat = [
        record(seed, data__train_size=size, certified=c) for seed in (0, 1) for size, c in ((1, 1), (2, 1), (3, 2))
    ]
    assert answer(tied, flat).number.value == pytest.approx(math.sqrt(3) / 2)  # ranks 1.5, 1.5, 3
    lines = claim.model_copy(update={"number": "certified * 2"})
    with pytest.raises(ValueError, match="a claim is about one"):
        answer(lines, runs)


def test_of_several_settings_the_best_by_validation_counts() -> None:
    claim = Claim.model_validate(
        {"says": "Fast.", "cells": {"rate": {"of": "lr", "where": {"net": "CPL"}}}, "number": "rate", "above": 0.5}
    )
    runs = [
        record(seed, net="CPL", lr=lr, last__validation_certified=valid)
        for seed in (0, 1)
        for lr, valid in ((0.1, 0.3), (1.0, 0.6), (9.0, 0.2))
    ]
    found = answer(claim, runs, best="last.validation_certified")
    assert (found.answer, found.number.value) == ("seen", 1.0)


def test_what_has_no_answer_is_not_made_up() -> None:
    cells = {"n": {"of": "size", "along": "size"}, "certified": {"of": "certified", "along": "size"}}
    claim = Claim.model_validate({"says": "Grows.", "cells": cells, "number": "last(certified)", "above": 0.1})
    single = [record(seed, size=60, certified=0.5) for seed in range(3)]
    assert answer(claim, single).answer == "seen"  # a row of one is a row
    slope = claim.model_copy(update={"number": "slope(n, certified)"})
    assert answer(slope, single).answer == "open"
    ratio = {"a": {"of": "a"}, "b": {"of": "b"}}
    claim = Claim.model_validate({"says": "Less.", "cells": ratio, "number": "a / b", "below": 1})
    runs = [record(seed, a=0.5, b=b) for seed, b in enumerate((1.0, 0.9, 0.0))]
    assert (answer(claim, runs).answer, answer(claim, runs[:2]).number.n) == ("open", 2)
    twice = [record(0, a=1, b=2, run="x"), record(0, a=1, b=2, run="y")]
    with pytest.raises(ValueError, match="which is meant"):
        answer(claim, twice)
    unfinished = [replace(one, status="failed") for one in single]
    assert answer(better(), unfinished).answer == "open"


def test_the_best_is_not_one_without_a_validation() -> None:
    claim = Claim.model_validate({"says": "Fast.", "cells": {"rate": {"of": "lr"}}, "number": "rate", "above": 0.5})
    runs = [record(0, lr=0.1), record(0, lr=1.0, v=0.6), record(0, lr=2.0, v=0.1), record(0, lr=0.2)]
    assert answer(claim, runs, best="v").number.value == 1.0
    assert answer(claim, runs[::-1], best="v").number.value == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"above": 0, "below": 1}, "above a number or below one"),
        ({"above": None}, "above a number or below one"),
        ({"number": "ours - thiers"}, "thiers is none of ours, theirs"),
        ({"number": "ours.__class__"}, "none of"),
        ({"number": "open(1)"}, "is no formula"),
    ],
)
def test_what_is_no_claim_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Claim.model_validate(better().model_dump() | change)


@pytest.mark.parametrize("name", study_names())
def test_the_claims_of_a_study_read_numbers_that_it_has(name: str) -> None:
    """Labels that its rows have, and numbers of its columns or settings that make its rows."""
    study = read_study(name)
    labels = {key for one in study.sweeps for key in one.labels}
    labels |= {key for one in study.sweeps for part in (one.cases, one.digits.cases) for key in part}
    known = {*study.columns.values(), *study.rows, "data.train_size", "optimizer.lr"}
    known |= set(study.columns) if study.separation else set()
    for claim in study.claims:
        for cells in claim.cells.values():
            assert cells.of in known or cells.of.split(".")[0] in ("first", "last", "train"), (claim.says, cells.of)
            assert set(cells.where) <= labels | {"data set", "points", "method", "data.train_size"}, claim.says
