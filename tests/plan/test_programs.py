"""What is counted in a program's jaxpr and in its compiled text, against sums by hand and the compiler's own count."""

import jax
import jax.numpy as jnp
import pytest

from ain_jax.plan import hlo, products

TEXT = """
HloModule jit_step, is_scheduled=true

%fused (p.0: bf16[28,64,8], p.1: s32[]) -> bf16[64,8] {
  %p.0 = bf16[28,64,8]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p.1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice.1 = bf16[1,64,8]{2,1,0:T(8,128)(2,1)} dynamic-slice(%p.0, %p.1, %zero, %zero)
}

%body (p: (s32[], bf16[64,8], bf16[28,64,8])) -> (s32[], bf16[64,8], bf16[28,64,8]) {
  %p = (s32[], bf16[64,8]{1,0}, bf16[28,64,8]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = bf16[64,8]{1,0} get-tuple-element(%p), index=1
  %w = bf16[28,64,8]{2,1,0} get-tuple-element(%p), index=2
  %taken = bf16[1,64,8]{2,1,0} fusion(%w, %i), kind=kLoop, calls=%fused
  %whole = bf16[512,8]{1,0} all-gather(%taken), channel_id=1, replica_groups=[8,8]<=[64], dimensions={0}
  %sum = bf16[64,8]{1,0:S(1)} all-reduce(%x), channel_id=2, replica_groups={{0,32},{1,33}}, to_apply=%add
  ROOT %out = (s32[], bf16[64,8]{1,0}, bf16[28,64,8]{2,1,0}) tuple(%i, %sum, %w)
}

%c (p: (s32[], bf16[64,8], bf16[28,64,8])) -> pred[] {
  %p.5 = (s32[], bf16[64,8]{1,0}, bf16[28,64,8]{2,1,0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}

ENTRY %main (a: bf16[64,8], b: bf16[28,64,8]) -> bf16[64,8] {
  %a = bf16[64,8]{1,0} parameter(0)
  %b = bf16[28,64,8]{2,1,0} parameter(1)
  %n = s32[] constant(0)
  %t = (s32[], bf16[64,8]{1,0}, bf16[28,64,8]{2,1,0}) tuple(%n, %a, %b)
  %loop = (s32[], bf16[64,8], bf16[28,64,8]) while(%t), condition=%c, body=%body, backend_config={TRIPS}
  %last = bf16[64,8]{1,0} get-tuple-element(%loop), index=1
  ROOT %copy = bf16[64,8]{1,0} copy(%last)
}
""".replace("{TRIPS}", '{"known_trip_count":{"n":"28"}}')


def test_collectives_count_as_often_as_their_loop_runs():
    gathered, reduced = hlo.Module(TEXT).collectives(chips_per_slice=32)
    block = 64 * 8 * 2
    assert (gathered.kind, gathered.count, gathered.bytes) == ("all-gather", 28, 28 * 8 * block)
    assert gathered.wire == 28 * 8 * block * 7 / 8 and not gathered.between_slices
    assert (reduced.kind, reduced.count, reduced.wire) == ("all-reduce", 28, 28 * block * 2 / 2)
    assert reduced.between_slices  # chips 0 and 32 are of two slices


@pytest.mark.parametrize(
    ("kind", "slices", "told", "wire"),
    [
        ("ALL_REDUCE", "1,2", "all-reduce", 1),
        ("ALL_REDUCE", "0:3", "all-reduce", 2 * 3 / 4),
        ("ALL_GATHER", "0:3", "all-gather", 3),
        ("REDUCE_SCATTER", "1,2", "reduce-scatter", 1 / 2),
        ("ALL_TO_ALL", "0:3", "all-to-all", 3 / 4),
        ("ONE_TO_ONE", "0->1", "collective-permute", 1),
    ],
)
def test_what_goes_to_other_slices_goes_through_the_hosts(kind, slices, told, wire):
    attributes = f'_xla_megascale_target="{{{slices}}}x{{0:31}}",_xla_megascale_transfer_type="{kind}"'
    sent = "%sent = (bf16[64,8]{1,0}, u32[], token[]) send(%a, %token), is_host_transfer=true, frontend_attributes="
    inside = TEXT.replace("  %last = ", f"  {sent}{{{attributes}}}\n  %last = ")
    loop = hlo.Module(inside).collectives(chips_per_slice=64)
    (found,) = [c for c in loop if c.between_slices]
    sent = 64 * 8 * 2
    assert (found.kind, found.count) == (told, 1)
    assert found.bytes == (4 * sent if told == "all-gather" else sent)  # of gathers, what is gathered
    assert found.wire == pytest.approx(wire * sent)
    plain = inside.replace(attributes, 'rendezvous="a host callback"')
    assert not [c for c in hlo.Module(plain).collectives(chips_per_slice=64) if c.between_slices]


def test_collectives_that_share_a_channel_are_several():
    """As `shard_map` writes them; inside fusions one that runs beside other work stands in each that carries it on."""
    line = next(line for line in TEXT.splitlines(True) if "all-gather(" in line)
    two = hlo.Module(TEXT.replace(line, line + line.replace("%whole", "%again"))).collectives()
    assert two[0].count == 2 * 28 and two[0].wire == 2 * hlo.Module(TEXT).collectives()[0].wire
    last = "  ROOT %copy = bf16[64,8]{1,0} copy(%last)"
    part = "%taken = bf16[64,8]{1,0} all-gather(%last), channel_id=7, replica_groups={{0,1}}, dimensions={0}"
    carried = (
        f"\n%step.N (q: bf16[64,8]) -> bf16[64,8] {{\n  %last = bf16[64,8]{{1,0}} parameter(0)\n  ROOT {part}\n}}\n"
    )
    calls = "".join(f"  %f.{n} = bf16[64,8]{{1,0}} fusion(%last), kind=kCustom, calls=%step.{n}\n" for n in (1, 2))
    both = "".join(carried.replace("step.N", f"step.{n}") for n in (1, 2))
    found = hlo.Module(both + TEXT.replace(last, calls + last)).collectives()
    assert sum(c.count for c in found if c.kind == "all-gather") == 28 + 1


def test_a_sum_of_parts_laid_into_zeros_is_a_gather():
    """As libtpu gathers over many chips; it sends twice what a gather would."""
    laid = "  %zeros = bf16[64,8]{1,0} broadcast(%i), dimensions={}\n"
    laid += "  %laid = bf16[64,8]{1,0} dynamic-update-slice(%zeros, %x, %i, %i)\n"
    laid += "  %start = (bf16[64,8]{1,0}, bf16[64,8]{1,0}, u32[]) copy-start(%laid)\n"
    laid += "  %done = bf16[64,8]{1,0} copy-done(%start)\n  %sum = "
    found = hlo.Module(TEXT.replace("  %sum = ", laid).replace("all-reduce(%x)", "all-reduce(%done)")).collectives()
    assert [c.kind for c in found] == ["all-gather", hlo.GATHER]
    assert found[1].wire == hlo.Module(TEXT).collectives()[1].wire == found[1].bytes  # of 2 chips: 2 x 1 / 2


def test_hbm_bytes():
    module, block = hlo.Module(TEXT), 64 * 8 * 2
    # a turn: a block read out of the stack, its number, the block written; 1 in and 8 out; 1 in and none out
    turn = (block + 4 + block) + (block + 8 * block) + block
    assert module.hbm_bytes(multiplied=False) == turn + 2 * block
    assert module.hbm_bytes() == 28 * turn + 2 * block
    assert not module.unknown_loops


def test_a_loop_that_only_its_condition_bounds():
    """As libtpu writes it: no trip count, and groups of chips by the axes of a mesh."""
    bound = "  %i.5 = s32[] get-tuple-element(%p.5), index=0\n  %n.5 = s32[] constant(28)\n"
    text = TEXT.replace(', backend_config={"known_trip_count":{"n":"28"}}', "")
    assert hlo.Module(text).collectives()[0].count == 1 and hlo.Module(text).times["body"] == 1
    text = text.replace(
        "  ROOT %yes = pred[] constant(true)", f"{bound}  ROOT %yes = pred[] compare(%i.5, %n.5), direction=LT"
    )
    text = text.replace("replica_groups=[8,8]<=[64]", "replica_groups=mesh['a'=8,'b'=8] {'b'}")
    gathered = hlo.Module(text).collectives()[0]
    assert (gathered.count, gathered.wire) == (28, 28 * 8 * 64 * 8 * 2 * 7 / 8)


def test_what_is_no_module():
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.Module("nothing")


def test_products_in_a_rematerialised_scan():
    def loss(w_NDD, x_BD):
        layer = jax.checkpoint(lambda x_BD, w_DD: (jnp.tanh(x_BD @ w_DD), None))
        return jax.lax.scan(layer, x_BD, w_NDD)[0].sum()

    w_NDD, x_BD = jnp.ones((5, 8, 8)), jnp.ones((3, 8))
    one = 2 * 3 * 8 * 8
    count = lambda f: products.flops(jax.make_jaxpr(f)(w_NDD, x_BD).jaxpr)
    assert count(loss) == 5 * one
    assert count(jax.grad(loss)) == 5 * 4 * one  # forwards, again, and two gradients
    assert count(jax.grad(lambda w, x: loss(jax.lax.stop_gradient(w), x) + w.sum())) == 5 * one


def test_hbm_bytes_beside_the_compilers_count():
    """Without a loop, the two counts of one program are near each other."""
    f = jax.jit(lambda a, b: jnp.tanh(a @ b) @ b.T)
    compiled = f.lower(jnp.ones((256, 512)), jnp.ones((512, 384))).compile()
    analysis = compiled.cost_analysis()
    assert analysis is not None
    assert hlo.Module(compiled.as_text()).hbm_bytes() == pytest.approx(analysis["bytes accessed"], rel=0.1)
