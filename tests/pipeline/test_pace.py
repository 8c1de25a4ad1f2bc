"""With too few threads a GPU waits for images; with too many they take memory, and cores from other GPUs."""

from __future__ import annotations

import pytest

from autolabel.pipeline.pace import HostNeeds, HostPace
from autolabel.pipeline.preview import cores_in_words


def pace(*, images: int, host: float, cpu: float, device: float) -> HostPace:
    found = HostPace()
    found.images, found.host, found.cpu, found.device = images, host, cpu, device
    return found


@pytest.mark.parametrize(
    ("host", "device", "most", "threads"),
    [
        (0.5, 1.0, 8, 2),  # a slow device: one thread keeps pace, one more is for slow images
        (2.5, 1.0, 8, 4),
        (2.5, 1.0, 2, 2),  # there are no more cores
        (100.0, 1.0, 8, 8),
        (0.0, 1.0, 8, 1),
    ],
)
def test_threads_follow_from_host_and_device_and_never_exceed_the_cores(
    host: float, device: float, most: int, threads: int
) -> None:
    assert pace(images=4, host=host, cpu=host, device=device).threads(now=4, most=most) == threads


def test_before_anything_is_measured_the_threads_stay_as_they_are_and_nothing_is_said() -> None:
    assert HostPace().threads(now=4, most=6) == 4
    assert HostPace().needs(6) is None


def test_time_at_the_device_is_counted_once_however_many_batches_are_there() -> None:
    found = HostPace()
    with found.on_device(2), found.on_device(3):
        pass
    assert found.images == 5
    first = found.device
    with found.on_host():
        pass
    assert found.device == first  # the host's time is not the device's


def test_words_say_how_many_cores_keep_the_gpu_busy_and_what_to_do() -> None:
    enough, lacking = HostNeeds(60, 90, 2), pace(images=10, host=0, cpu=0.6, device=0.18).needs(2)
    assert (enough.wanted, enough.busy) == (1, 1.0)
    assert cores_in_words(enough) == "60 ms of CPU time beside 90 ms of the GPU an image: 1 core of 2 keep it busy"
    assert lacking is not None
    assert (lacking.wanted, lacking.busy) == (4, pytest.approx(0.6))
    assert cores_in_words(lacking).startswith(
        "60 ms of CPU time beside 18 ms of the GPU an image: 2 cores can keep it busy for at most 60 % of the time, 4"
        " would do; "
    )
