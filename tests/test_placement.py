"""How many workers of which size fit where."""

import pytest

from polyprompt.config import ComputeConfig
from polyprompt.placement import Group, Room, holds, worker

GPU_NODE = {"CPU": 48.0, "GPU": 4.0, "memory": 1e11}
HEAD = {"CPU": 0.0, "memory": 1e10}


@pytest.mark.parametrize(
    ("node", "need", "count"),
    [
        (GPU_NODE, {"CPU": 4.0, "GPU": 1.0}, 4),
        (GPU_NODE, {"CPU": 16.0, "GPU": 1.0}, 3),
        (GPU_NODE, {"CPU": 1.0, "GPU": 0.1}, 40),
        (HEAD, {"CPU": 1.0}, 0),
    ],
)
def test_what_a_machine_holds(node: dict[str, float], need: dict[str, float], count: int) -> None:
    assert holds(node, need) == count


def test_workers_that_fit_now() -> None:
    compute = ComputeConfig(num_workers=8, use_gpu=True, cpus_per_worker=4)
    assert worker(compute) == {"CPU": 4.0, "GPU": 1.0}
    room = Room(compute, [HEAD, GPU_NODE, GPU_NODE], [])
    assert room.fits
    assert "8 workers of 4 CPU, 1 GPU" in room.text
    assert "0 CPU, 0 GPU: 0; 48 CPU, 4 GPU: 4; 48 CPU, 4 GPU: 4" in room.text
    assert "at once" in room.text


def test_workers_that_the_autoscaler_brings() -> None:
    compute = ComputeConfig(num_workers=8, use_gpu=True, cpus_per_worker=4)
    room = Room(compute, [HEAD], [Group("head", HEAD, 0), Group("gpu", GPU_NODE, 8)])
    assert not room.fits
    assert "the autoscaler has 8 of 'gpu', 48 CPU, 4 GPU: 4 each" in room.text
    assert "0 of 8 fit now" in room.text
    assert "'head'" not in room.text
    assert "any number" in Room(compute, [HEAD], [Group("gpu", GPU_NODE, -1)]).text


def test_as_many_workers_as_there_is_room_for() -> None:
    compute = ComputeConfig(num_workers=(1, 6), use_gpu=True, cpus_per_worker=4)
    room = Room(compute, [HEAD, GPU_NODE], [])
    assert room.fits
    assert "1 to 6 workers of 4 CPU, 1 GPU" in room.text
    assert "the run gets its 4 at once" in room.text
    assert not Room(compute, [HEAD], []).fits


def test_workers_that_never_come() -> None:
    compute = ComputeConfig(num_workers=8, use_gpu=True, cpus_per_worker=4)
    text = Room(compute, [HEAD], [Group("gpu", GPU_NODE, 1)]).text
    assert "never gets them: there are places for 4. Lower compute.num_workers" in text
    # Nothing is known of an autoscaler: whoever looks after the cluster may add machines.
    assert "never" not in Room(compute, [HEAD], []).text
