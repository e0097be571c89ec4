"""Reading compiled text: collectives, the loops that they stand in, and what the compiler says when it refuses."""

import pytest

from lm_jax.errors import UserError
from lm_jax.planning.compiled import _refusal
from lm_jax.planning.hlo import Collective, collectives, num_bytes

# As the compilers write it: layouts with parentheses in braces, comments in tuples, loops without a count of trips
LOOPS = """\
HloModule jit_f, is_scheduled=true, entry_computation_layout={(f32[8,128]{1,0:T(8,128)})->f32[8,128]{1,0:T(8,128)}}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%a, %b)
}

%inner_body (p: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %p = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %x = f32[8,128]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %all-reduce.1 = f32[8,128]{1,0:T(8,128)} all-reduce(%x), channel_id=1, replica_groups={{0,1},{2,3}}, to_apply=%add, metadata={op_name="inner"}
  ROOT %t = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) tuple(%i, %all-reduce.1)
}

%inner_condition (p: (s32[], f32[8,128])) -> pred[] {
  %limit = s32[]{:T(128)} constant(7)
  %p = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%outer_body (p: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %two = s32[]{:T(128)} constant(2)
  %p = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %x = f32[8,128]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %start = (s32[]{:T(128)}, /*index=1*/f32[8,128]{1,0:T(8,128)}) tuple(%two, %x)
  %while.1 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) while(%start), condition=%inner_condition, body=%inner_body
  %gather-start = (f32[8,128]{1,0:T(8,128)}, f32[32,128]{1,0:T(8,128)}) all-gather-start(%x), channel_id=2, replica_groups=[1,4]<=[4], dimensions={0}
  %gather-done = f32[32,128]{1,0:T(8,128)} all-gather-done(%gather-start)
  ROOT %t = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) tuple(%j, %y)
}

%outer_condition (p: (s32[], f32[8,128])) -> pred[] {
  %p = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %n = s32[]{:T(128)} get-tuple-element(%p), index=1
  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT
}

%started (p0: bf16[4,64]) -> bf16[4,64,4] {
  %p0 = bf16[4,64]{1,0} parameter(0)
  ROOT %all-gather.7 = bf16[4,64,4]{1,0,2} all-gather(%p0), channel_id=3, replica_groups=mesh['x'=2,'y'=4] {'y'}, dimensions={2}
}

%finished (p0: bf16[4,64]) -> bf16[4,64,4] {
  %p0 = bf16[4,64]{1,0} parameter(0)
  ROOT %all-gather.8 = bf16[4,64,4]{1,0,2} all-gather(%p0), channel_id=3, replica_groups=mesh['x'=2,'y'=4] {'y'}, dimensions={2}
}

%cheap (p: f32[16]) -> f32[16] {
  ROOT %p = f32[16]{0} parameter(0)
}

%dear (p: f32[16]) -> f32[16] {
  %p = f32[16]{0} parameter(0)
  ROOT %permute = f32[16]{0} collective-permute(%p), channel_id=4, source_target_pairs={{0,1},{1,0}}
}

ENTRY %main (arg: f32[8,128]) -> f32[8,128] {
  %arg = f32[8,128]{1,0:T(8,128)} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %first = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) tuple(%zero, %arg)
  %while.2 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) while(%first), condition=%OUTER, body=%outer_bodyKNOWN
  %w = bf16[4,64]{1,0} parameter(1)
  %fusion.1 = bf16[4,64,4]{1,0,2} fusion(%w), kind=kCustom, calls=%started
  %fusion.2 = bf16[4,64,4]{1,0,2} fusion(%w), kind=kCustom, calls=%finished
  %v = f32[16]{0} parameter(2)
  %conditional.1 = f32[16]{0} conditional(%flag, %v, %v), branch_computations={%cheap, %dear}
  ROOT %out = f32[8,128]{1,0:T(8,128)} get-tuple-element(%while.2), index=1
}
"""  # noqa: E501


def text(known: str = "", condition: str = "outer_condition") -> str:
    return LOOPS.replace("KNOWN", known).replace("OUTER", condition)


def by_kind(found: list[Collective]) -> dict[str, Collective]:
    assert len({c.kind for c in found}) == len(found)
    return {c.kind: c for c in found}


def test_a_collective_runs_as_often_as_its_loops():
    """3 trips that the compiler notes, times 5 from the inner condition: from 2 up to 7."""
    found = collectives(text(', backend_config={"known_trip_count":{"n":"3"},"x":[]}'), 8)
    own = [c for c in found if c.source == "inner"]
    assert own == [Collective("all-reduce", 8 * 128 * 4, 2, 15, True, "inner")]
    assert own[0].wire_bytes == 15 * 2 * (8 * 128 * 4) // 2  # each of two sends half of it twice


def test_a_loop_of_unknown_length_counts_once_and_says_so():
    found = collectives(text(), 8)
    assert [(c.runs, c.certain) for c in found if c.source == "inner"] == [(5, False)]
    assert all(c.certain for c in found if c.kind == "collective-permute")


def test_every_kind_of_group_and_start():
    found = collectives(text(', backend_config={"known_trip_count":{"n":"1"}}'), 8)
    asynchronous, fused = (c for c in found if c.kind == "all-gather")
    assert (asynchronous.bytes, asynchronous.group) == (32 * 128 * 4, 4)  # its operand is none of it
    assert asynchronous.wire_bytes == 32 * 128 * 4 * 3 // 4
    assert (fused.bytes, fused.group, fused.runs) == (4 * 64 * 4 * 2, 4, 1)  # in two fusions, one gather
    permute = by_kind([c for c in found if c.kind == "collective-permute"])["collective-permute"]
    assert (permute.bytes, permute.wire_bytes, permute.runs) == (64, 64, 1)  # the branch that moves something
    assert len(found) == 4


def test_num_bytes():
    assert num_bytes("f32[2,3]{1,0:T(8,128)S(1)}") == 24
    assert num_bytes("(bf16[2,3]{1,0}, /*index=1*/pred[5], s32[], u4[3])") == 12 + 5 + 4 + 2
    assert num_bytes("(f8e4m3fn[7], token[])") == 7


@pytest.mark.parametrize(
    ("message", "numbers"),
    [
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (256.50G) exceeds available HBM (15.75G). HLO module: jit_f.\nSee https://openxla.org",
            (256.5, 15.75),
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.25G "
            "of 15.75G hbm. Exceeded hbm capacity by 4.50G.",
            (20.25, 15.75),
        ),
    ],
)
def test_what_does_not_fit_is_read_from_the_refusal(message, numbers):
    assert _refusal("train", message) == tuple(n * 2**30 for n in numbers)


@pytest.mark.parametrize("message", ["INTERNAL: no\nmore", "RESOURCE_EXHAUSTED: Used 17M of 16M vmem"])
def test_another_refusal_is_an_error(message):
    with pytest.raises(UserError, match=r"the train program does not compile: (INTERNAL: no|RESOURCE)"):
        _refusal("train", message)
