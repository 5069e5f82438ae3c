"""Trip counts, products, bytes and live buffers of small compiled programs, against what their shapes say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sft_jax.planning.chips import CHIPS
from sft_jax.planning.flops import count_flops, count_kernel_flops
from sft_jax.planning.hlo import Instruction, Shape, parse_program, walk_executed
from sft_jax.planning.live import find_peak
from sft_jax.planning.roofline import count_work
from sft_jax.planning.topology import Topology
from sft_jax.planning.traffic import Collective, count_memory_bytes, find_collectives

ROWS, DIM, TRIPS = 32, 64, 5


def compile_text(function, *shapes, dtype=jnp.float32, **options):
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    return jax.jit(function, **options).lower(*arguments).compile().as_text()


def total_flops(text, unknown_trips=1):
    program = parse_program(text)
    return sum(
        e.times * count_flops(program, e.computation, e.instruction) for e in walk_executed(program, unknown_trips)
    )


def scanned(x, stack):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)[0]


def test_a_scanned_product_counts_once_a_round():
    text = compile_text(scanned, (ROWS, DIM), (TRIPS, DIM, DIM))
    assert total_flops(text) == TRIPS * 2 * ROWS * DIM * DIM


def test_loops_in_loops_multiply_and_the_backward_pass_counts():
    def loss(x, stack):
        twice = lambda x, _: (scanned(x, stack), None)  # noqa: E731
        return jnp.sum(jax.lax.scan(twice, x, None, length=3)[0])

    once = TRIPS * 2 * ROWS * DIM * DIM
    assert total_flops(compile_text(loss, (ROWS, DIM), (TRIPS, DIM, DIM))) == 3 * once
    assert total_flops(compile_text(jax.grad(loss, (0, 1)), (ROWS, DIM), (TRIPS, DIM, DIM))) == 9 * once


def test_a_loop_whose_end_is_data_runs_as_often_as_the_caller_says():
    def run(x, stack):
        return jax.lax.fori_loop(0, jnp.sum(x > 0), lambda i, x: x @ stack[0], x)

    text = compile_text(run, (ROWS, DIM), (TRIPS, DIM, DIM))
    assert total_flops(text) == 2 * ROWS * DIM * DIM
    assert total_flops(text, 7) == 7 * 2 * ROWS * DIM * DIM


@pytest.mark.parametrize(
    ("start", "end", "rounds", "step"), [(0, 7, 7, 1), (3, 7, 4, 1), (0, 8, 4, 2), (0, 7, 4, 2), (5, 5, 0, 1)]
)
def test_a_loop_counts_from_where_it_starts_by_what_it_adds(start, end, rounds, step):
    """As the compiler writes those of its own that take two rounds at once."""
    text = f"""HloModule m

%body (t: (u32[], f32[32,64])) -> (u32[], f32[32,64]) {{
  %by = u32[] constant({step})
  %t = (u32[], f32[32,64]{{1,0}}) parameter(0)
  %i = u32[] get-tuple-element(%t), index=0
  %x = f32[32,64]{{1,0}} get-tuple-element(%t), index=1
  %y = f32[32,32]{{1,0}} dot(%x, %x), lhs_contracting_dims={{1}}, rhs_contracting_dims={{1}}
  %j = u32[] add(%i, %by)
  ROOT %o = (u32[], f32[32,64]{{1,0}}) tuple(%j, %x)
}}

%cond (t.1: (u32[], f32[32,64])) -> pred[] {{
  %bound = u32[] constant({end})
  %t.1 = (u32[], f32[32,64]{{1,0}}) parameter(0)
  %i.1 = u32[] get-tuple-element(%t.1), index=0
  ROOT %lt = pred[] compare(%i.1, %bound), direction=LT
}}

ENTRY %main (x: f32[32,64]) -> (u32[], f32[32,64]) {{
  %x.1 = f32[32,64]{{1,0}} parameter(0)
  %from = u32[] constant({start})
  %a = (u32[], f32[32,64]{{1,0}}) tuple(%from, %x.1)
  ROOT %loop = (u32[], f32[32,64]{{1,0}}) while(%a), condition=%cond, body=%body
}}
"""
    assert total_flops(text) == rounds * 2 * 32 * 32 * 64


def test_loops_of_any_start_and_step_that_jax_compiles():
    def run(x, stack):
        body = lambda c: (c[0] + 3, c[1] @ stack[0])  # noqa: E731
        return jax.lax.while_loop(lambda c: c[0] < 20, body, (4, x))[1]

    assert total_flops(compile_text(run, (ROWS, DIM), (TRIPS, DIM, DIM))) == 6 * 2 * ROWS * DIM * DIM  # 4, 7 .. 19


# What the TPU compiler writes, which cannot be compiled in every place: products as convolutions, bounds as constants.
TPU_TEXT = """HloModule step, is_scheduled=true

%fused (p0: bf16[32,64], p1: bf16[64,128]) -> bf16[32,128] {
  %p0 = bf16[32,64]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %p1 = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %c = bf16[32,128]{1,0:T(8,128)(2,1)} convolution(%p0, %p1), dim_labels=bf_io->bf
}

%body (t: (s32[], bf16[32,64], bf16[64,128])) -> (s32[], bf16[32,64], bf16[64,128]) {
  %t = (s32[]{:T(128)}, bf16[32,64]{1,0:T(8,128)(2,1)S(1)}, bf16[64,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%t), index=0
  %x = bf16[32,64]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%t), index=1
  %w = bf16[64,128]{1,0:T(8,128)(2,1)} get-tuple-element(%t), index=2
  %y = bf16[32,128]{1,0:T(8,128)(2,1)} fusion(%x, %w), kind=kOutput, calls=%fused
  %k = bf16[32,128]{1,0:T(8,128)(2,1)} custom-call(%y), custom_call_target="x", frontend_attributes={kernel_metadata={
"note":"{\\"block\\": 8}"
}}, metadata={op_name="step/kernel"}
  %r = bf16[32,128]{1,0:T(8,128)(2,1)} all-reduce(%y), replica_groups=mesh['a'=2,'b'=4] {'b'}, to_apply=%add
  ROOT %o = (s32[]{:T(128)}, bf16[32,64]{1,0:T(8,128)(2,1)S(1)}, bf16[64,128]{1,0}) tuple(%i, %x, %w)
}

%cond (t.1: (s32[], bf16[32,64], bf16[64,128])) -> pred[] {
  %bound = s32[]{:T(128)} constant(6)
  %t.1 = (s32[]{:T(128)}, bf16[32,64]{1,0:T(8,128)(2,1)S(1)}, bf16[64,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%t.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %bound), direction=LT
}

ENTRY %main (a: (s32[], bf16[32,64], bf16[64,128])) -> (s32[], bf16[32,64], bf16[64,128]) {
  %a = (s32[]{:T(128)}, bf16[32,64]{1,0:T(8,128)(2,1)S(1)}, bf16[64,128]{1,0:T(8,128)(2,1)}) parameter(0)
  ROOT %loop = (s32[], bf16[32,64]{1,0:S(1)}, bf16[64,128]{1,0}) while(%a), condition=%cond, body=%body
}
"""


def test_the_tpu_compilers_text():
    program = parse_program(TPU_TEXT)
    assert total_flops(TPU_TEXT) == 6 * 2 * 32 * 64 * 128
    product = program.computations["body"]["y"]
    assert program.computations["body"]["k"].op_name == "step/kernel"  # on several lines
    # The input lies on the chip: only the weights are read and the result written.
    assert count_memory_bytes(program, "body", product) == 2 * (64 * 128 + 32 * 128)
    [reduced] = find_collectives(program, "body", program.computations["body"]["r"], 8)
    assert (reduced.kind, reduced.group, reduced.is_async) == ("all-reduce", (0, 1, 2, 3), False)
    assert reduced.wire_bytes == 2 * 3 / 4 * 2 * 32 * 128


def test_a_products_time_is_the_compilers_and_no_less_than_at_the_peak():
    """Of what has no product only the bytes count, whatever the compiler says."""
    chip, topology = CHIPS["v5p"], Topology(CHIPS["v5p"], (2, 2, 1))
    sizes = {"replica": 1, "fsdp": 4, "context": 1, "tensor": 1, "expert": 1}
    coords = np.array([(0, i // 2, i % 2, 0) for i in range(4)])

    def work(cycles):
        text = TPU_TEXT.replace("kind=kOutput,", f'kind=kOutput, backend_config={{"estimated_cycles":"{cycles}"}},')
        return count_work(parse_program(text.replace("op_name=", 'x={"estimated_cycles":"7000"}, op_name=')), topology,
                          sizes, coords, unknown_trips=1)  # fmt: skip

    at_peak = 6 * 2 * 32 * 64 * 128 / chip.flops_per_second
    kernel = 6 * 2 * 2 * 32 * 128 / chip.hbm_bytes_per_second  # its result and what it reads
    assert work(1000).compute_seconds == pytest.approx(at_peak)
    assert work(1000).product_seconds == pytest.approx(6 * 1000 / chip.clock_hertz)
    assert work(2**63 - 1).product_seconds == pytest.approx(at_peak)  # the compiler's "unknown"
    assert work(1).product_seconds == pytest.approx(at_peak)
    assert work(1000).busy_seconds == pytest.approx(6 * 1000 / chip.clock_hertz + kernel)


# A row of a stack, read and replaced, with all of it behind other names and in fusions of fusions.
DEEP_TEXT = """HloModule step, is_scheduled=true

%row (s: bf16[8,32,64], i: s32[]) -> bf16[32,64] {
  %s = bf16[8,32,64]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %flat = bf16[8,1,32,64]{3,2,1,0} bitcast(%s)
  %cut = bf16[1,1,32,64]{3,2,1,0} dynamic-slice(%flat, %i, %zero, %zero, %zero), dynamic_slice_sizes={1,1,32,64}
  ROOT %r = bf16[32,64]{1,0} bitcast(%cut)
}

%replace (s.1: bf16[8,32,64], r.1: bf16[32,64], i.1: s32[]) -> bf16[8,32,64] {
  %s.1 = bf16[8,32,64]{2,1,0} parameter(0)
  %r.1 = bf16[32,64]{1,0} parameter(1)
  %i.1 = s32[] parameter(2)
  %zero.1 = s32[] constant(0)
  %new = bf16[1,32,64]{2,1,0} bitcast(%r.1)
  ROOT %u = bf16[8,32,64]{2,1,0} dynamic-update-slice(%s.1, %new, %i.1, %zero.1, %zero.1)
}

%fused (s.2: bf16[8,32,64], i.2: s32[], w: bf16[64,64]) -> bf16[8,32,64] {
  %s.2 = bf16[8,32,64]{2,1,0} parameter(0)
  %i.2 = s32[] parameter(1)
  %w = bf16[64,64]{1,0} parameter(2)
  %x = bf16[32,64]{1,0} fusion(%s.2, %i.2), kind=kLoop, calls=%row
  %y = bf16[32,64]{1,0} convolution(%x, %w), dim_labels=bf_io->bf
  ROOT %z = bf16[8,32,64]{2,1,0} fusion(%s.2, %y, %i.2), kind=kLoop, calls=%replace
}

%gathered (s.3: bf16[8,32,64], i.3: s32[4]) -> bf16[4,32,64] {
  %s.3 = bf16[8,32,64]{2,1,0} parameter(0)
  %i.3 = s32[4]{0} parameter(1)
  ROOT %g = bf16[4,32,64]{2,1,0} gather(%s.3, %i.3), offset_dims={1,2}, slice_sizes={1,32,64}
}

ENTRY %main (a: bf16[8,32,64], at: s32[]{:S(6)}, b: bf16[64,64]) -> bf16[8,32,64] {
  %a = bf16[8,32,64]{2,1,0} parameter(0)
  %at = s32[]{:S(6)} parameter(1)
  %b = bf16[64,64]{1,0} parameter(2)
  %ids = s32[4]{0:S(1)} parameter(3)
  %room = bf16[8,32,64]{2,1,0} custom-call(), custom_call_target="AllocateBuffer"
  %ahead = ((bf16[64,64]{1,0}), bf16[32,64]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%b), slice={[0:32], [0:64]}
  %ahead.1 = bf16[32,64]{1,0:S(1)} slice-done(%ahead)
  %moved = (bf16[64,64]{1,0:S(1)}, bf16[64,64]{1,0}, u32[]{:S(2)}) copy-start(%b)
  %moved.1 = bf16[64,64]{1,0:S(1)} copy-done(%moved)
  %both = bf16[64,64]{1,0:S(1)} custom-call(%ahead.1, %ahead.1), custom_call_target="ConcatBitcast"
  %rows = ((bf16[8,32,64]{2,1,0}, s32[4]{0:S(1)}), bf16[4,32,64]{2,1,0}, s32[]{:S(2)}) call-start(%a, %ids), to_apply=%gathered
  %rows.1 = bf16[4,32,64]{2,1,0} call-done(%rows)
  ROOT %out = bf16[8,32,64]{2,1,0} fusion(%a, %at, %moved.1), kind=kOutput, calls=%fused
}
"""  # noqa: E501


@pytest.mark.parametrize(
    ("name", "num_bytes"),
    [
        ("out", 2 * (32 * 64 + 32 * 64)),  # a row is read and a row is written; the weights lie on the chip
        ("room", 0),
        ("ahead", 2 * 32 * 64),  # read where the prefetch starts, and once
        ("ahead.1", 0),
        ("moved", 2 * 64 * 64),
        ("moved.1", 0),
        ("both", 0),
        ("rows", 2 * 2 * 4 * 32 * 64),  # what the call gathers, read and written
        ("rows.1", 0),
    ],
)
def test_what_is_moved_counts_once_and_no_more_than_is_used(name, num_bytes):
    program = parse_program(DEEP_TEXT)
    assert count_memory_bytes(program, "main", program.computations["main"][name]) == num_bytes


def test_a_batched_product_written_as_a_window_counts_its_own_taps_only():
    """[4, 32, 64] @ [4, 64, 16] as the TPU compiler writes it: the batch is a window of 4 that meets one value."""
    text = """HloModule m

ENTRY %main (x: bf16[4,32,64], w: bf16[4,64,16]) -> bf16[4,32,16] {
  %x = bf16[4,32,64]{2,1,0} parameter(0)
  %w = bf16[4,64,16]{2,1,0} parameter(1)
  ROOT %c = bf16[4,32,16]{2,1,0} convolution(%x, %w), window={size=4 stride=3 lhs_dilate=4}, dim_labels=0bf_0io->0bf
}
"""
    assert total_flops(text) == 2 * 4 * 32 * 64 * 16


@pytest.mark.parametrize(
    ("kernel", "table", "pairs", "products"),
    [("fwd", (1, 8, 8), 36, 2), ("dkv", (1, 8, 8), 36, 4), ("dq", (1, 8, 8), 36, 3), ("fwd", (1, 8, 2), 15, 2)],
)
def test_attentions_kernel_counts_the_blocks_that_it_visits(kernel, table, pairs, products):
    heads, length, dim = 4, 1024, 128
    around = {
        "table": Instruction("table", (Shape("s8", table, False),), "parameter", (), "", False),
        **{
            name: Instruction(name, (Shape("bf16", (heads, length, dim), False),), "parameter", (), "", False)
            for name in "qkv"
        },
    }
    call = Instruction("c", (), "custom-call", tuple(around), f'op_name="a/splash_mha_{kernel}_segmented"', False)
    assert count_kernel_flops(around, call) == products * 2 * heads * pairs * (length // 8) ** 2 * dim


@pytest.mark.parametrize(
    ("name", "other", "flops"),
    [
        ("ragged-dot-none.1", (8, 384, 256), 2 * 1024 * 384 * 256),
        ("ragged-dot-none", (1024, 256), 2 * 1024 * 384 * 256),  # a gradient of the experts' matrices
        ("ragged-dot-metadata.1", (8, 384, 256), 0),
    ],
)
def test_a_ragged_dot_counts_each_row_once(name, other, flops):
    shapes = {"sizes": Shape("s32", (8,), False), "rows": Shape("bf16", (1024, 384), False)}
    shapes["other"] = Shape("bf16", other, False)
    around = {key: Instruction(key, (shape,), "parameter", (), "", False) for key, shape in shapes.items()}
    assert count_kernel_flops(around, Instruction(name, (), "custom-call", tuple(around), "", False)) == flops


@pytest.mark.parametrize(
    ("attributes", "group"),
    [
        ("replica_groups={{0,4},{1,5}}", (0, 4)),
        ("replica_groups=[4,2]<=[8]", (0, 1)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}", (0, 1, 4, 5)),
        ("replica_groups=mesh['a'=8] {'a':(2)2}", (0, 2)),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", (0, 1, 2, 3)),
    ],
)
def test_groups_in_all_their_spellings(attributes, group):
    line = f"  ROOT %g = f32[8,16]{{1,0}} all-gather(%x), {attributes}, dimensions={{0}}"
    text = (
        f"HloModule m\n\nENTRY %main (x: f32[4,16]) -> f32[8,16] {{\n  %x = f32[4,16]{{1,0}} parameter(0)\n{line}\n}}\n"
    )
    program = parse_program(text)
    [found] = find_collectives(program, "main", program.computations["main"]["g"], 8)
    assert found.group == group


def test_collectives_of_a_sharded_program_are_found_with_their_axis():
    mesh = jax.make_mesh((2, 4), ("replica", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    place = lambda *axes: jax.NamedSharding(mesh, jax.P(*axes))  # noqa: E731
    x = jax.ShapeDtypeStruct((ROWS, DIM), jnp.float32, sharding=place(("replica", "fsdp"), None))
    stack = jax.ShapeDtypeStruct((TRIPS, DIM, DIM), jnp.float32, sharding=place(None, "fsdp", None))
    program = parse_program(jax.jit(scanned).lower(x, stack).compile().as_text())
    sizes = {"replica": 2, "fsdp": 4, "context": 1, "tensor": 1, "expert": 1}
    coords = np.array([(0, i) for i in range(8)])
    work = count_work(program, Topology(CHIPS["cpu"], (8,)), sizes, coords, unknown_trips=1)
    [(key, (count, sent, seconds))] = work.collectives.items()
    assert key == ("all-gather", "fsdp", False)
    assert count == TRIPS
    assert sent == TRIPS * DIM * DIM * 4 * 3 / 4
    assert seconds == pytest.approx(sent / CHIPS["cpu"].link_bytes_per_second)


def test_an_all_gather_of_half_the_devices_takes_half_of_them():
    assert Collective("all-gather", 100.0, (0, 1), False).wire_bytes == 50


def test_what_lives_at_the_peak_is_near_the_compilers_figure():
    def loss(x, stack):
        body = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None))
        return jnp.sum(jax.lax.scan(body, x, stack)[0])

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((256, 256), (8, 256, 256))]
    compiled = jax.jit(jax.grad(loss)).lower(*shapes).compile()
    peak = find_peak(parse_program(compiled.as_text()))
    memory = compiled.memory_analysis()
    expected = memory.temp_size_in_bytes + memory.output_size_in_bytes
    assert 0.8 * expected <= peak.num_bytes <= 1.2 * expected
    largest = peak.buffers[0]  # the inputs of the eight layers
    assert (largest.shape.dims, largest.num_bytes) == ((8, 256, 256), 8 * 256 * 256 * 4)
