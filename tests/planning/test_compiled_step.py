import pytest

from sft_jax.planning.compiled_step import needed_hbm_bytes


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
