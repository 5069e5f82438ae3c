import re
from unittest.mock import Mock

import jax
import numpy as np
import pytest

from sft_jax.config_schema import MeshConfig
from sft_jax.datatypes import ConfigError
from sft_jax.planning.topology import open_devices, parse_topology
from sft_jax.sharding import build_mesh, device_coords


@pytest.mark.parametrize(
    ("name", "ours", "num_chips"),
    [
        ("v5p:4x4x4", "v5p:4x4x4", 64),
        ("v5p-128", "v5p:4x4x4", 64),
        ("v4-16", "v4:2x2x2", 8),
        ("v5litepod-16", "v5e:4x4", 16),
        ("v6e-256", "v6e:16x16", 256),
        ("v7x:2x2x1", "tpu7x:2x2x1", 4),
        ("cpu:8", "cpu:8", 8),
    ],
)
def test_both_spellings_are_read(name, ours, num_chips):
    topology = parse_topology(name)
    assert (topology.name, topology.num_chips) == (ours, num_chips)


def test_a_chip_of_two_devices_and_slices_count():
    assert parse_topology("tpu7x:2x2x1", 2).num_devices == 16


@pytest.mark.parametrize("name", ["v9:4x4", "v5p", "v5p:4x4", "v6e:0x4", "v5p-7", "v5p-129", "v6e-17", "cpu-8", ""])
def test_an_unknown_name_is_refused_with_those_known(name):
    with pytest.raises(ConfigError, match=f"--topology={re.escape(name)}.*v5p:2x2x1 to v5p:16x16x16.*v6e:1x1"):
        parse_topology(name)


@pytest.mark.parametrize(
    ("name", "wraps"),
    [
        ("v5p:4x4x4", (True, True, True)),
        ("v5p:2x4x4", (False, False, False)),
        ("v6e:16x16", (True, True)),
        ("v6e:8x16", (False, True)),
        ("v6e:4x4", (False, False)),
    ],
)
def test_links_wrap_only_where_they_are(name, wraps):
    assert parse_topology(name).wraps == wraps


def test_slices_that_divide_no_axis_are_refused():
    devices = [Mock(spec=jax.Device, slice_index=number // 4) for number in range(8)]
    with pytest.raises(ConfigError, match=r"mesh\.fsdp: is 1, over 2 slices.*Set config\.mesh\.replica=2"):
        build_mesh(MeshConfig(fsdp=1, tensor=8), devices)


@pytest.mark.slow
@pytest.mark.parametrize(("axes", "axis"), [({"replica": 2}, 0), ({"fsdp": 4, "tensor": 2}, 1)])
def test_the_slices_lie_along_one_axis(axes, axis):
    pytest.importorskip("libtpu", reason="no TPU compiler here: pip install 'sft_jax[tpu]'")
    mesh = build_mesh(MeshConfig(**axes), open_devices(parse_topology("v5e:2x2", num_slices=2)))
    slices = device_coords(mesh)[:, 0].reshape(mesh.devices.shape)
    first, second = np.split(slices, 2, axis)
    assert set(first.flat) == {0}
    assert set(second.flat) == {1}


@pytest.mark.slow
def test_an_axis_may_be_part_of_a_dimension_of_the_torus():
    pytest.importorskip("libtpu", reason="no TPU compiler here: pip install 'sft_jax[tpu]'")
    mesh = build_mesh(MeshConfig(fsdp=32, tensor=2), open_devices(parse_topology("v5p:4x4x4")))
    places = device_coords(mesh).reshape(32, 2, -1)
    assert np.all(np.abs(places[:, 0] - places[:, 1]).sum(axis=1) == 1)  # the two of each pair are neighbours
