import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sft_jax.config_schema import MeshConfig
from sft_jax.experiment import COMPILER_OPTIONS
from sft_jax.planning.compiled_step import needed_hbm_bytes
from sft_jax.planning.topology import open_devices, parse_topology
from sft_jax.sharding import build_mesh


@pytest.mark.parametrize(
    ("message", "num_bytes"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 40.25G of 31.24G hbm. Exceeded",
            40.25 * 2**30,
        ),
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (16.50G) exceeds available HBM (15.75G).",
            16.5 * 2**30,
        ),
        ("RESOURCE_EXHAUSTED: E1001: CompileTimeScopedVmemOom: Ran out of memory in memory space vmem", None),
        ("INTERNAL: something else (1.00G) exceeds available HBM", None),
    ],
)
def test_the_compilers_messages(message, num_bytes):
    assert needed_hbm_bytes(message) == num_bytes


@pytest.mark.slow
def test_no_product_is_cut_where_the_torus_has_no_rings():
    pytest.importorskip("libtpu", reason="no TPU compiler here: pip install 'sft_jax[tpu]'")
    mesh = build_mesh(MeshConfig(), open_devices(parse_topology("v6e:4x4")))

    def compiled(options):
        shapes = (((16, 8192, 4096), P("fsdp")), ((4096, 14336), P("fsdp")))
        args = [jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=NamedSharding(mesh, spec)) for s, spec in shapes]
        lowered = jax.jit(jnp.matmul, out_shardings=NamedSharding(mesh, P("fsdp"))).lower(*args)
        return lowered.compile(compiler_options=options).as_text()

    assert "windowed_dot_general" in compiled(None)
    told = compiled(COMPILER_OPTIONS["tpu"])
    assert "windowed_dot_general" not in told
    assert " all-gather" in told
