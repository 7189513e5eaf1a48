"""What programs cost on devices that are not there is read rightly from what XLA has compiled."""

import importlib
import importlib.util
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

BENCH = Path(__file__).parent.parent / "experiments" / "bench"


@pytest.fixture
def module(monkeypatch):
    """What imports a module of `compiled/`."""
    monkeypatch.syspath_prepend(BENCH)
    return lambda name: importlib.import_module(f"compiled.{name}")


@pytest.fixture
def traffic(module):
    return module("traffic").traffic


def hlo(entry, *others, header="HloModule m"):
    """A module whose ENTRY has these lines, and other computations."""
    body = "\n".join(f"  {line}" for line in entry.strip().splitlines())
    return "\n\n".join([header, *others, f"ENTRY %main (p: f32[]) -> f32[] {{\n{body}\n}}"])


def computation(name, lines):
    body = "\n".join(f"  {line.strip()}" for line in lines.strip().splitlines())
    return f"%{name} (p: f32[]) -> f32[] {{\n{body}\n}}"


def test_a_program_as_xla_prints_it(traffic):
    text = jax.jit(lambda x, y: jnp.tanh(x) + y).lower(jnp.ones(1000), jnp.ones(1000)).compile()
    found = traffic(text.as_text(), "cpu")
    assert (found.bytes, found.most_bytes, found.launches) == (12_000, 12_000, 1)
    assert found.movers[0].shape == "f32[1000]"

    def loop(x):
        return jax.lax.scan(lambda c, _: (c @ c, None), x, length=7)[0]

    found = traffic(jax.jit(loop).lower(jnp.ones((64, 64))).compile().as_text(), "cpu")
    assert found.operations == {"f32": 7 * 2 * 64**3}
    assert found.unknown_loops == ()


def test_operands_and_results_of_kernels(traffic):
    found = traffic(
        hlo("""
            %p = f32[10,100]{1,0} parameter(0)
            %q = bf16[100]{0} parameter(1)
            %t = (f32[10,100]{1,0}, /*index=1*/bf16[100]{0}) tuple(%p, %q)
            %g = f32[10,100]{1,0} get-tuple-element(%t), index=0
            %b = f32[1000]{0} bitcast(%g)
            %n = f32[1000]{0} negate(%b), metadata={op_name="jit(f)/neg (a { b"}
            %c = f32[1000]{0} copy(%n)
            ROOT %s = pred[1000]{0} compare(%c, %n), direction=GT
        """),
        "cuda",
    )
    assert found.bytes == 8000 + 8000 + (8000 + 1000)
    assert found.launches == 3
    assert found.largest(1)[0].opcode == "compare"
    assert {x.operation for x in found.movers} == {"jit(f)/neg (a { b", ""}


def test_a_fusion_reads_what_its_result_needs(traffic):
    """Of two rows, through arithmetic; nothing of what only its shape is asked of."""
    fused = computation(
        "rows",
        """
        %a = f32[8,1000]{1,0} parameter(0)
        %i = s32[] parameter(1)
        %z = s32[] constant(0)
        %all = f32[8,1000]{1,0} abs(%a)
        %one = f32[1,1000]{1,0} dynamic-slice(%all, %i, %z), dynamic_slice_sizes={1,1000}
        %two = f32[1,1000]{1,0} slice(%all), slice={[3:4], [0:1000]}
        %sum = f32[1,1000]{1,0} add(%one, %two)
        ROOT %half = f32[1,500]{1,0} slice(%sum), slice={[0:1], [0:500]}
        """,
    )
    entry = """
        %x = f32[8,1000]{1,0} parameter(0)
        %n = s32[] parameter(1)
        ROOT %f = f32[1,500]{1,0} fusion(%x, %n), kind=kLoop, calls=%rows
    """
    assert traffic(hlo(entry, fused), "cuda").bytes == 2 * 500 * 4 + 4 + 500 * 4


def test_one_kernel_reads_an_array_once(traffic):
    """Sixteen slices of it, or all of it twice."""
    fused = computation(
        "twice",
        """
        %a = f32[1000]{0} parameter(0)
        %b = f32[1000]{0} parameter(1)
        %r = f32[1000]{0} reverse(%a), dimensions={0}
        %s = f32[1000]{0} add(%a, %r)
        ROOT %m = f32[1000]{0} multiply(%s, %b)
        """,
    )
    entry = """
        %x = f32[1000]{0} parameter(0)
        ROOT %f = f32[1000]{0} fusion(%x, %x), kind=kLoop, calls=%twice
    """
    assert traffic(hlo(entry, fused), "cuda").bytes == 4000 + 4000


UPDATE = """
    %a = f32[100,1000]{1,0} parameter(0)
    %v = f32[1,1000]{1,0} parameter(1)
    %i = s32[] parameter(2)
    %z = s32[] constant(0)
"""


def test_an_update_in_place_writes_what_is_new(traffic):
    fused = computation(
        "update",
        UPDATE
        + """
        ROOT %u = f32[100,1000]{1,0} dynamic-update-slice(%a, %v, %i, %z)
        """,
    )
    made = computation(
        "made",
        UPDATE
        + """
        %c = f32[100,1000]{1,0} negate(%a)
        ROOT %u = f32[100,1000]{1,0} dynamic-update-slice(%c, %v, %i, %z)
        """,
    )
    used = computation(
        "used",
        UPDATE
        + """
        %u = f32[100,1000]{1,0} dynamic-update-slice(%a, %v, %i, %z)
        ROOT %n = f32[100,1000]{1,0} negate(%u)
        """,
    )
    whole, row = 400_000, 4_000
    expected = {"update": 2 * row + 4, "made": 2 * whole + row + 4, "used": 2 * whole + row + 4}
    for name, bytes_ in expected.items():
        entry = f"""
            %x = f32[100,1000]{{1,0}} parameter(0)
            %y = f32[1,1000]{{1,0}} parameter(1)
            %n = s32[] parameter(2)
            ROOT %f = f32[100,1000]{{1,0}} fusion(%x, %y, %n), kind=kLoop, calls=%{name}
        """
        assert traffic(hlo(entry, fused, made, used), "cuda").bytes == bytes_, name


def test_tiles_are_filled_up_and_fast_memory_is_free(traffic):
    entry = """
        %x = f32[30,1000]{1,0:T(8,128)} parameter(0)
        %s = f32[30,1000]{1,0:T(8,128)S(1)} negate(%x)
        %m = pred[30,1000]{0,1:T(8,128)(4,1)} compare(%s, %s), direction=GT
        ROOT %r = f32[30]{0:T(128)S(1)} reduce(%s, %s), dimensions={1}, to_apply=%add
    """
    assert traffic(hlo(entry), "tpu").bytes == 32 * 1024 * 4 + 128 * 1000
    # On a GPU the space of that number is ordinary memory, and there are no tiles.
    plain = entry.replace(":T(8,128)(4,1)", "").replace(":T(8,128)", ":").replace(":T(128)", ":")
    plain = plain.replace(":}", "}")
    assert traffic(hlo(plain), "cuda").bytes == 2 * 120_000 + (120_000 + 30_000) + 120_000 + 120


def test_asynchronous_copies_and_slices_move_what_they_move(traffic):
    """What a TPU brings to fast memory before it is used, and takes back from there."""
    slow, fast = "f32[8,1024]{1,0:T(8,128)}", "f32[8,1024]{1,0:T(8,128)S(1)}"
    part = "f32[8,128]{1,0:T(8,128)S(1)}"
    entry = f"""
        %x = {slow} parameter(0)
        %cs = ({fast}, {slow}, u32[]{{:S(2)}}) copy-start(%x)
        %cd = {fast} copy-done(%cs)
        %ss = (({slow}), {part}, s32[]) slice-start(%x), slice={{[0:8], [0:128]}}
        %sd = {part} slice-done(%ss)
        %n = {fast} negate(%cd)
        %os = ({slow}, {fast}, u32[]{{:S(2)}}) copy-start(%n)
        ROOT %od = {slow} copy-done(%os)
    """
    found = traffic(hlo(entry), "tpu")
    whole = 8 * 1024 * 4
    assert sorted(x.bytes for x in found.movers) == [0, whole // 8, whole, whole]
    wrapped = computation(
        "wrapped",
        f"""
        %a = {slow} parameter(0)
        ROOT %c = {fast} copy(%a)
        """,
    )
    entry = f"""
        %x = {slow} parameter(0)
        %as = (({slow}), {fast}, u32[]) async-start(%x), calls=%wrapped
        %au = (({slow}), {fast}, u32[]) async-update(%as)
        ROOT %ad = {fast} async-done(%au)
    """
    assert traffic(hlo(entry, wrapped), "tpu").bytes == whole


def loop_of(counter, limit, direction="LT", start="%zero", attributes="", compare="%i, %n"):
    condition = computation(
        "condition",
        f"""
        %p = (s32[], s32[], f32[1000]{{0}}) parameter(0)
        %i = s32[] get-tuple-element(%p), index=0
        %bound = s32[] get-tuple-element(%p), index=1
        %n = s32[] constant({limit})
        ROOT %less = pred[] compare({compare}), direction={direction}
        """,
    )
    body = computation(
        "body",
        f"""
        %p = (s32[], s32[], f32[1000]{{0}}) parameter(0)
        %i = s32[] get-tuple-element(%p), index=0
        %one = s32[] constant(1)
        %two = s32[] constant(2)
        %next = s32[] {counter}
        %bound = s32[] get-tuple-element(%p), index=1
        %x = f32[1000]{{0}} get-tuple-element(%p), index=2
        %y = f32[1000]{{0}} negate(%x)
        ROOT %t = (s32[], s32[], f32[1000]{{0}}) tuple(%next, %bound, %y)
        """,
    )
    kind = "(s32[], s32[], f32[1000]{0})"
    entry = f"""
        %zero = s32[] constant(0)
        %ten = s32[] constant(10)
        %given = s32[] parameter(0)
        %x = f32[1000]{{0}} parameter(1)
        %t = (s32[], s32[], f32[1000]{{0}}) tuple({start}, %given, %x)
        ROOT %w = {kind} while(%t), condition=%condition, body=%body{attributes}
    """
    return hlo(entry, condition, body)


@pytest.mark.parametrize(
    ("text", "times"),
    [
        (loop_of("add(%i, %one)", 12), 12),
        (loop_of("add(%one, %i)", 12, start="%ten"), 2),
        (loop_of("add(%i, %two)", 5), 3),
        (loop_of("add(%i, %one)", 5, direction="LE"), 6),
        (loop_of("subtract(%i, %two)", 0, direction="GT", start="%ten"), 5),
        (loop_of("add(%i, %one)", 12, start="%ten", direction="GE"), None),
        (loop_of("add(%i, %one)", 12, start="%given"), None),  # from where it is given
        (loop_of("add(%i, %one)", 12, compare="%i, %bound"), None),  # to where it is given
        (loop_of("multiply(%i, %two)", 12), None),
        (
            loop_of(
                "multiply(%i, %two)",
                12,
                attributes=', backend_config={"known_trip_count":{"n":"9"},"known_init_step":{}}',
            ),
            9,
        ),
    ],
)
def test_how_often_a_loop_runs(traffic, text, times):
    found = traffic(text, "cuda")
    negated = [x for x in found.movers if x.opcode == "negate"]
    assert [(x.bytes, x.times) for x in negated] == [(8000 * (times or 1), times or 1)]
    assert found.unknown_loops == (() if times else ("w",))


def test_a_conditional_has_a_cheapest_and_a_dearest_branch(traffic):
    copies = [
        computation(
            f"copies{count}",
            "\n".join(
                ["%x0 = f32[1000]{0} parameter(0)"]
                + [
                    f"{'ROOT ' * (i == count - 1)}%x{i + 1} = f32[1000]{{0}} copy(%x{i})"
                    for i in range(count)
                ]
            ),
        )
        for count in (1, 2, 3)
    ]
    before = """
        %p = pred[] parameter(0)
        %x = f32[1000]{0} parameter(1)
        %n = f32[1000]{0} negate(%x)
    """
    for words in (
        "true_computation=%copies3, false_computation=%copies2",
        "branch_computations={%copies3, %copies2}",
    ):
        entry = f"{before}\n ROOT %c = f32[1000]{{0}} conditional(%p, %n, %n), {words}"
        found = traffic(hlo(entry, *copies), "cuda")
        assert (found.bytes, found.most_bytes, found.launches) == (24_000, 32_000, 3)


CALL = 'custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/fold/pallas_call"}'
PALLAS = f"""
    %x = f32[8,1000]{{1,0}} parameter(0)
    ROOT %k = (f32[1000]{{0}}, u8[8,125]{{1,0}}) custom-call(%x, %x, %x), {CALL}
"""


def test_a_pallas_kernel_reads_every_array_once_or_what_is_known(traffic, module):
    found = traffic(hlo(PALLAS), "tpu")
    assert found.bytes == 32_000 + 4000 + 1000
    assert found.unknown_kernels == ("jit(f)/fold/pallas_call",)
    moved = module("kernels").Moved((8000, 4000, 0), (1000, 2000))
    for sure in (True, False):
        found = traffic(hlo(PALLAS), "tpu", lambda *_, sure=sure: moved._replace(sure=sure))
        assert found.bytes == 4 * 12_000 + 4000 + 2000
        assert bool(found.unknown_kernels) != sure


def add_rows(rows, x_ref, scale_ref, out_ref):
    def add(row, total):
        return total + x_ref[row] * scale_ref[0]

    total = jax.lax.fori_loop(0, rows, add, jnp.zeros(out_ref.shape, jnp.float32))
    out_ref[...] = total + x_ref[0]


def add_some_rows(rows, x_ref, scale_ref, out_ref):
    """As many as a number in memory says."""
    last = scale_ref[1].astype(jnp.int32)
    zeros = jnp.zeros(out_ref.shape, jnp.float32)
    out_ref[...] = jax.lax.fori_loop(0, last, lambda row, total: total + x_ref[row], zeros)


def pallas_sum(x, scale, body=add_rows, name="add_rows", index=lambda i: (0, i)):
    rows, size = x.shape
    return pl.pallas_call(
        partial(body, rows),
        grid=(pl.cdiv(size, 128),),
        in_specs=[pl.BlockSpec((rows, 128), index), pl.BlockSpec((8,), lambda i: (0,))],
        out_specs=pl.BlockSpec((128,), lambda i: (i,)),
        out_shape=jax.ShapeDtypeStruct((size,), jnp.float32),
        name=name,
    )(x, scale)


X, SCALE = jax.ShapeDtypeStruct((4, 1000), jnp.float32), jax.ShapeDtypeStruct((8,), jnp.float32)


def call_of(module, name, *shapes):
    """A custom call at a place with that name, and the types of what it takes."""
    hlo = module("hlo")
    place = f'metadata={{op_name="jit(f)/jit(g)/{name}/pallas_call"}}'
    types = [hlo.Array("f32", shape) for shape in shapes]
    return hlo.Instruction("k", types[0], "custom-call", (), "", place), types


def test_what_a_pallas_kernel_moves(module):
    """Blocks as they change on a TPU, loads on a GPU; a ragged last block as far as it goes."""

    def found(platform, cache_bytes=1e9, **options):
        kernels = module("kernels").Kernels(platform, cache_bytes)
        with kernels.noted():
            jax.jit(partial(pallas_sum, **options)).trace(X, SCALE)
        return kernels.find(*call_of(module, "add_rows", X.shape, SCALE.shape))

    assert found("tpu") == ((4000, 8), (1000,), True)
    assert found("tpu", index=lambda i: (0, 0)) == ((4 * 128, 8), (1000,), True)
    assert found("tpu", body=add_some_rows) == ((4000, 8), (1000,), True)
    # Eight programs; a row is loaded five times, of which the last is in the cache, or is not.
    assert found("cuda") == ((4000, 8 * 4), (1000,), True)
    assert found("cuda", cache_bytes=100) == ((8 * 5 * 128, 8 * 4), (8 * 128,), True)
    # How many rows are loaded is not known; each is taken to be, once.
    assert found("cuda", body=add_some_rows) == ((4000, 8), (1000,), False)


def test_blocks_that_scalars_may_choose(module):
    """The scalars are read once; where an index map looks at them, nobody knows."""

    def copy(scalars, x_ref, out_ref):
        out_ref[...] = x_ref[...] * scalars[0]

    def gathered(index, scalars, x):
        grid = pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(4,),
            in_specs=[pl.BlockSpec((8, 128), index)],
            out_specs=pl.BlockSpec((8, 128), lambda i, scalars: (0, i)),
        )
        shape = jax.ShapeDtypeStruct((8, 512), jnp.float32)
        return pl.pallas_call(copy, grid_spec=grid, out_shape=shape, name="copy")(scalars, x)

    scalars = jax.ShapeDtypeStruct((5,), jnp.float32)
    x = jax.ShapeDtypeStruct((8, 2048), jnp.float32)
    for index, expected in (
        (lambda i, scalars: (0, 2 * i), ((5, 4 * 1024), (4096,), True)),
        (lambda i, scalars: (0, scalars[i].astype(jnp.int32)), None),
    ):
        kernels = module("kernels").Kernels("tpu", 0)
        with kernels.noted():
            jax.jit(partial(gathered, index)).trace(scalars, x)
        assert kernels.find(*call_of(module, "copy", (5,), x.shape)) == expected


def test_kernels_are_known_by_name_and_shapes(module):
    kernels = module("kernels").Kernels("tpu", 0)
    other = {"index": lambda i: (0, 0)}
    before = pl.pallas_call
    with kernels.noted():
        for options in ({"name": "a"}, {"name": "b"}, {"name": "c"}, {"name": "c"} | other):
            jax.jit(partial(pallas_sum, **options)).trace(X, SCALE)

        @jax.jit
        def looped(x, scale):
            add = partial(pallas_sum, name="looped")
            return jax.lax.scan(lambda c, _: (c + add(x, scale), None), x[0], length=3)[0]

        looped.trace(X, SCALE)
    assert pl.pallas_call is before
    for name in ("a", "b", "looped"):
        assert kernels.find(*call_of(module, name, X.shape, SCALE.shape)).operands == (4000, 8)
    assert kernels.find(*call_of(module, "a", (8, 1000), SCALE.shape)) is None
    assert kernels.find(*call_of(module, "d", X.shape, SCALE.shape)) is None
    assert kernels.find(*call_of(module, "c", X.shape, SCALE.shape)) is None  # either of two


@pytest.mark.parametrize(
    ("opcode", "operand", "result", "crosses"),
    [
        ("all-reduce", "f32[1000]{0}", "f32[1000]{0}", 2 * 3 * 1000),
        ("all-gather", "f32[1000]{0}", "f32[4000]{0}", 3 * 4000),
        ("reduce-scatter", "f32[4000]{0}", "f32[1000]{0}", 3 * 4000),
        ("all-to-all", "f32[4000]{0}", "f32[4000]{0}", 3 * 4000),
        ("collective-permute", "f32[1000]{0}", "f32[1000]{0}", 4000),
        ("all-reduce-start", "f32[1000]{0}", "f32[1000]{0}", 2 * 3 * 1000),
        ("all-gather-start", "f32[1000]{0}", "((f32[1000]{0}), f32[4000]{0})", 3 * 4000),
    ],
)
def test_what_crosses_between_devices(traffic, opcode, operand, result, crosses):
    meshed = "mesh['a'=2,'b'=2,'c'=2] {'a','c'}"
    for groups, devices in (
        *(("{{0,1,2,3},{4,5,6,7}}", 8), ("[2,4]<=[8]", 8)),
        *((meshed, 8), ("{}", 4)),
    ):
        entry = f"""
            %x = {operand} parameter(0)
            ROOT %c = {result} {opcode}(%x), replica_groups={groups}, metadata={{op_name="psum"}}
        """
        text = hlo(entry, header=f"HloModule m, num_partitions={devices}")
        (found,) = traffic(text, "cuda").collectives
        assert (found.link_bytes, found.group, found.operation) == (crosses, 4, "psum")


def test_a_collective_within_a_loop_or_a_fusion_is_seen(traffic):
    fused = computation(
        "fused",
        """
        %a = f32[1000]{0} parameter(0)
        ROOT %r = f32[1000]{0} all-reduce(%a), replica_groups={{0,1}}, to_apply=%add
        """,
    )
    text = loop_of("add(%i, %one)", 12).replace(
        "f32[1000]{0} negate(%x)", "f32[1000]{0} fusion(%x), kind=kCustom, calls=%fused"
    )
    (found,) = traffic(text.replace("ENTRY", f"{fused}\n\nENTRY"), "tpu").collectives
    assert (found.times, found.link_bytes) == (12, 12 * 4000)


def test_operations_of_matrix_products(traffic):
    dims = "lhs_contracting_dims={2}, rhs_batch_dims={0}, rhs_contracting_dims={1}"
    summed = {"lhs_contracting_dimensions": ["1"], "rhs_contracting_dimensions": ["0"]}
    gemm = {"gemm_backend_config": {"dot_dimension_numbers": summed}}
    config = json.dumps(gemm, separators=(",", ":"))
    call = f'custom_call_target="__cublas$gemm", backend_config={config}'
    products = f"""
        %a = bf16[5,7,11]{{2,1,0}} parameter(0)
        %b = bf16[5,11,13]{{2,1,0}} parameter(1)
        %d = f32[5,7,13]{{2,1,0}} dot(%a, %b), lhs_batch_dims={{0}}, {dims}
        %x = f32[7,11]{{1,0}} parameter(2)
        %y = f32[11,13]{{1,0}} parameter(3)
        ROOT %g = (f32[7,13]{{1,0}}, s8[4194304]{{0}}) custom-call(%x, %y), {call}
    """
    found = traffic(hlo(products), "cuda")
    assert found.operations == {"bf16": 2 * 5 * 7 * 11 * 13, "f32": 2 * 7 * 11 * 13}
    assert found.movers[1].bytes == 4 * (7 * 11 + 11 * 13 + 7 * 13)  # and not the scratch memory


@pytest.mark.parametrize(("backward", "products"), [("", 2), ("Backward", 5)])
def test_operations_of_attention_by_cudnn(traffic, backward, products):
    config = {"cudnn_fmha_backend_config": {"intermediate_tensor_shape": {}}}
    shape = config["cudnn_fmha_backend_config"]["intermediate_tensor_shape"]
    shape |= {"element_type": "BF16", "dimensions": ["6", "3", "50", "50"]}
    q, scratch = "bf16[6,50,3,64]{3,2,1,0}", "u8[1048576]{0}"
    for separators in ((", ", ": "), (",", ":")):
        words = f"backend_config={json.dumps(config, separators=separators)}"
        target = f'custom_call_target="__cudnn$fmhaSoftmax{backward}"'
        entry = f"""
            %q = {q} parameter(0)
            %k = {q} parameter(1)
            ROOT %o = ({q}, {scratch}) custom-call(%q, %k, %k), {target}, {words}
        """
        found = traffic(hlo(entry), "cuda")
        assert found.operations == {"bf16": products * 2 * 6 * 3 * 50 * 50 * 64}
        assert found.bytes == 3 * 2 * 6 * 50 * 3 * 64


@pytest.mark.parametrize("dilation", [1, 2])
def test_operations_of_convolutions_are_those_that_xla_counts(traffic, dilation):
    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(
            *(x, kernel, (1, 2), ((1, 2), (0, 1))),
            lhs_dilation=(dilation, 1),
            rhs_dilation=(1, dilation),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    done = jax.jit(convolve).lower(jnp.ones((3, 16, 18, 5)), jnp.ones((3, 5, 5, 7))).compile()
    cost = done.cost_analysis()
    assert isinstance(cost, dict)
    assert traffic(done.as_text(), "cpu").operations == {"f32": cost["flops"]}


def test_a_text_that_is_no_module_is_refused(traffic):
    with pytest.raises(ValueError, match="ENTRY"):
        traffic("module @jit_f {\n}", "cpu")


def test_an_unknown_table_or_device_is_refused(tmp_path):
    for options, words in (
        (["--tables", "prices"], "found 'prices', expected some of aggregator"),
        (["--devices", "h100,v9"], "found 'v9', expected some of h100"),
    ):
        command = [sys.executable, BENCH / "bench_compiled.py", *options, "--out", tmp_path]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert words in done.stderr
        assert "Traceback" not in done.stderr


def test_the_programs_of_an_experiment_come_from_shapes_alone(module):
    experiments = module("experiments")
    whole = experiments.experiment("vitb32", jax.devices()[:2], memory_bytes=1e12)
    found = {name: make() for name, make in experiments.parts_of_round(whole).items()}
    assert list(found) == ["download", "training", "exchange", "clients' unify", "aggregation"]
    for program in found.values():
        leaves = jax.tree.leaves(program.arguments)
        assert not [x for x in leaves if isinstance(x, jax.Array)]
        assert (
            max((x.nbytes for x in leaves if not isinstance(x, jax.ShapeDtypeStruct)), default=0)
            < 1000
        )
        assert program.floor_bytes() > 0
    # All slots' vectors cross once, from slots to parameters, and nothing is made of them.
    vectors = 4 * found["exchange"].more["trained"] * whole.cut.slots
    assert found["exchange"].floor_bytes() == 2 * (vectors + (4 + 1) * whole.cut.slots)
    assert found["exchange"].more["all slots"] >= 60


def compiled_rows(table, device, tmp_path, *options):
    """What the benchmark says of a table, where the compilers are."""
    needed = "jax_cuda12_plugin" if device == "h100" else "libtpu"
    if importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed: pip install -e '.[compilers]'")
    command = [sys.executable, BENCH / "bench_compiled.py", "--tables", table, *options]
    command += ["--devices", device, "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / f"{table}.json").read_text())["rows"]
    assert all("failed" not in row for row in rows), done.stdout
    return {row["program"]: row for row in rows}


@pytest.mark.slow
@pytest.mark.parametrize("device", ["h100", "v5e"])
def test_dense_arrays_on_an_absent_device(device, tmp_path):
    """Each input of the naive unify is read four times or so, and its masks are made in full."""
    rows = compiled_rows("aggregator", device, tmp_path, "--only", "naive unify")
    assert set(rows) == {"naive unify, T = 8, d = 10M", "naive unify, T = 30, d = 3M"}
    for row in rows.values():
        assert 4 < row["x floor"] < 12
        assert row["temporary bytes"] > 5e7
        assert row["unknown loops"] == []
