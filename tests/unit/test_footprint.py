"""What an engine takes: the estimate, and what measurements make of it."""

from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.core import MeasuredLoad
from edge_agent.engines.manifest import LayerKind, Manifest, MemorySpec
from edge_agent.scheduling.footprint import AGREEING, correct, estimate, floor_bytes, kv_bytes
from edge_agent.scheduling.values import Footprint
from tests.support.chaos import examples
from tests.support.toy_engine import manifest

MIB = 1 << 20
ESTIMATE = Footprint(1200 * MIB, 1000 * MIB)
LEAST = 500 * MIB

sizes = st.integers(0, 4000 * MIB)


def measured(peak: int, steady: int, source: str = "process") -> MeasuredLoad:
    return MeasuredLoad(max(peak, steady), steady, source, 0.0)


measurements = st.builds(measured, sizes, sizes, st.sampled_from(["process", "available"]))
layers = st.builds(
    LayerKind,
    kind=st.just("full"),
    layers=st.integers(1, 60),
    bytes_per_token=st.integers(0, 4096),
    window_tokens=st.none() | st.integers(1, 4096),
    state_bytes=st.integers(0, 1 << 20),
)
manifests = st.lists(layers, max_size=3).map(lambda groups: changed(layers=tuple(groups)))
shapes = st.tuples(st.integers(1, 8), st.integers(256, 32_768))


def changed(**fields: Any) -> Manifest:
    return msgspec.structs.replace(manifest(), **fields)


class TestCaches:
    def test_a_full_layer_keeps_every_token(self):
        full = LayerKind(kind="full", layers=30, bytes_per_token=768)
        assert kv_bytes(changed(layers=(full,)), 2, 2048) == 2 * 30 * 2048 * 768

    def test_a_sliding_window_keeps_no_more_than_its_window(self):
        sliding = LayerKind(
            kind="sliding_window", layers=10, bytes_per_token=100, window_tokens=512
        )
        assert kv_bytes(changed(layers=(sliding,)), 1, 2048) == 10 * 512 * 100
        assert kv_bytes(changed(layers=(sliding,)), 1, 256) == 10 * 256 * 100

    def test_a_recurrent_state_does_not_grow_with_the_context(self):
        state = LayerKind(kind="recurrent", layers=4, state_bytes=9000)
        assert {kv_bytes(changed(layers=(state,)), 3, tokens) for tokens in (256, 8192)} == {
            3 * 4 * 9000
        }

    @examples(100)
    @given(manifests, shapes)
    def test_each_slot_takes_the_same_and_a_longer_context_no_less(self, engine, shape):
        slots, tokens = shape
        assert kv_bytes(engine, slots, tokens) == slots * kv_bytes(engine, 1, tokens)
        assert kv_bytes(engine, slots, tokens) <= kv_bytes(engine, slots, tokens + 1)


class TestEstimate:
    @examples(100)
    @given(manifests, shapes)
    def test_it_is_the_manifests_for_the_manifests_shape_and_follows_the_caches(
        self, engine, shape
    ):
        floor = floor_bytes(engine, engine.slots, engine.context_tokens)
        steady = max(engine.memory.steady_bytes, floor)
        engine = msgspec.structs.replace(
            engine, memory=MemorySpec(load_peak_bytes=2 * steady, steady_bytes=steady)
        )
        usual = estimate(engine, engine.slots, engine.context_tokens)
        assert usual == Footprint(2 * steady, steady)
        other = estimate(engine, *shape)
        more = kv_bytes(engine, *shape) - kv_bytes(engine, engine.slots, engine.context_tokens)
        assert other.steady_bytes == max(steady + more, floor_bytes(engine, *shape))
        assert other.load_peak_bytes == max(2 * steady + more, floor_bytes(engine, *shape))

    def test_the_least_is_weights_caches_and_the_prefix_cache(self):
        full = LayerKind(kind="full", layers=1, bytes_per_token=4)
        engine = changed(
            layers=(full,),
            memory=MemorySpec(load_peak_bytes=1, steady_bytes=1, prefix_cache_bytes=5000),
        )
        weights = sum(spec.size_bytes for spec in engine.files)
        assert weights > 0
        assert floor_bytes(engine, 2, 256) == weights + 2 * 256 * 4 + 5000


class TestCorrection:
    def test_without_measurements_it_is_the_estimate(self):
        assert correct(ESTIMATE, LEAST, []) == ESTIMATE

    @examples(200)
    @given(st.lists(measurements, max_size=12))
    def test_it_is_never_below_weights_caches_and_state_and_the_peak_never_below_the_rest(
        self, history
    ):
        found = correct(ESTIMATE, LEAST, history)
        assert found.load_peak_bytes >= found.steady_bytes >= LEAST

    @examples(200)
    @given(st.lists(measurements, max_size=12), sizes, sizes)
    def test_the_process_own_figure_raises_it_at_once(self, history, peak, steady):
        found = correct(ESTIMATE, LEAST, [*history, measured(peak, steady)])
        assert found.steady_bytes >= steady
        assert found.load_peak_bytes >= max(peak, steady)

    @examples(200)
    @given(st.lists(st.integers(1 * MIB, 999 * MIB), max_size=12))
    def test_it_is_lowered_only_after_five_in_a_row_that_agree(self, steadies):
        found = correct(ESTIMATE, 0, [measured(each, each) for each in steadies])
        windows = [
            steadies[at : at + AGREEING] for at in range(max(0, len(steadies) - AGREEING + 1))
        ]
        agree = any(min(window) >= 0.9 * max(window) for window in windows)
        assert agree or found == ESTIMATE

    def test_five_that_agree_lower_it_to_the_largest_of_them(self):
        history = [measured(700 * MIB, each * MIB) for each in (600, 610, 620, 615, 605)]
        assert correct(ESTIMATE, LEAST, history[:4]) == ESTIMATE
        assert correct(ESTIMATE, LEAST, history) == Footprint(700 * MIB, 620 * MIB)

    def test_measurements_that_differ_by_a_tenth_agree(self):
        history = [measured(700 * MIB, each * MIB) for each in (540, 600, 600, 600, 600)]
        assert correct(ESTIMATE, LEAST, history).steady_bytes == 600 * MIB

    def test_five_that_are_mistakes_of_measuring_lower_it_to_what_must_be_there(self):
        assert correct(ESTIMATE, LEAST, [measured(MIB, MIB)] * 5) == Footprint(LEAST, LEAST)

    def test_five_that_do_not_agree_leave_it(self):
        history = [measured(700 * MIB, each * MIB) for each in (600, 900, 620, 615, 605)]
        assert correct(ESTIMATE, LEAST, history).steady_bytes == ESTIMATE.steady_bytes

    def test_what_is_less_than_half_more_is_believed_whoever_took_it(self):
        history = [measured(1700 * MIB, 1400 * MIB, "available")]
        assert correct(ESTIMATE, LEAST, history) == Footprint(1700 * MIB, 1400 * MIB)
        history = [measured(1900 * MIB, 1600 * MIB, "available")]
        assert correct(ESTIMATE, LEAST, history) == Footprint(1800 * MIB, 1500 * MIB)

    @examples(100)
    @given(st.lists(sizes, max_size=12))
    def test_what_others_took_in_a_load_makes_it_half_as_large_again_at_most(self, falls):
        found = correct(ESTIMATE, 0, [measured(each, each, "available") for each in falls])
        assert found.steady_bytes <= 1.5 * ESTIMATE.steady_bytes
        assert found.load_peak_bytes <= 1.5 * ESTIMATE.load_peak_bytes
