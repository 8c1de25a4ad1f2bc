"""The class that follows the top one, which runs keep where people named nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from weighed import drawn_factors, drawn_places

from autolabel.teacher.decide import Evidence, second_class, top_class, top_classes
from autolabel.teacher.feed import Feed
from autolabel.teacher.networks.fields import InMemory

CPU = torch.device("cpu")


def test_it_is_the_second_of_a_stable_sort_also_among_equals() -> None:
    values = torch.randint(0, 4, (2, 5, 30, 40), generator=torch.Generator().manual_seed(0)).float()
    winners, _ = top_class(values)
    expected = np.argsort(-values.numpy(), axis=1, kind="stable")[:, 1]
    assert np.array_equal(second_class(values, winners).numpy(), expected)


@pytest.mark.parametrize("probable", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_it_is_the_teachers_own_whatever_polygons_say(temperature: float, probable: bool) -> None:
    """In bands, of a batch with two images; codes are the same with and without it."""
    logits = 2 * torch.randn(2, 19, 60, 1024, generator=torch.Generator().manual_seed(0))
    values = logits.softmax(dim=1) * 0.7 if probable else logits
    places = np.stack([drawn_places((60, 1024), 19, seed=seed) for seed in (0, 1)])
    evidence = Evidence(torch.from_numpy(places), torch.from_numpy(drawn_factors(19).table.T.copy()), 0.75)
    field = InMemory(values, probable=probable)
    settings = {"classes": 19, "device": CPU, "temperature": temperature, "evidence": evidence}
    found, plain = (top_classes(field, 2, second=second, **settings) for second in (True, False))  # type: ignore[arg-type]
    assert found.seconds is not None and plain.seconds is None
    expected = np.argsort(-values.numpy(), axis=1, kind="stable")[:, 1]
    assert np.array_equal(found.seconds.numpy(), expected)
    assert all(torch.equal(one, other) for one, other in zip(found[:4], plain[:4], strict=True))
    one, other = Feed(CPU).download(found.first(1), classes=19, edges=(0.5,), own=True)[0], found.seconds[0].numpy()
    assert one.own is not None and one.second is not None and np.array_equal(one.second, other)


def test_one_class_has_no_second() -> None:
    field = InMemory(torch.zeros(1, 1, 4, 4))
    assert top_classes(field, 1, classes=1, device=CPU, second=True).seconds is None
