"""The tile planner as Python sees it; tests/cpp/emulated_arena_test.cpp tests the tiles themselves."""

import pytest

_C = pytest.importorskip("adafm_kernels._C", reason="needs the built host module")


def tiles(*layers):
    packed = memoryview(_C.plan_tiles(list(layers))).cast("I")
    return [tuple(packed[k : k + 4]) for k in range(0, len(packed), 4)]


def test_tiles_of_a_small_network():
    # [16, 64, 3, 3]: 8 vectors for each filter, 16 filters in one tile. [3, 5, 1, 1] with fixed gamma: a scalar tile.
    assert tiles((0, 0, 16, 64, 9, 0), (9216, 1024, 3, 5, 1, 1)) == [
        (0, 0, 128, 8 | 9 << 16),
        (1152, 128, 15 | 1 << 24 | 1 << 31, 5 | 1 << 16),
    ]


def test_a_row_longer_than_a_tile_is_divided():
    assert tiles((0, 0, 1, 1032, 2, 0)) == [(0, 0, 128, 129 | 2 << 16), (128, 128, 1, 129 | 2 << 16)]


def test_layers_without_weights_have_no_tiles():
    assert tiles() == tiles((0, 0, 0, 8, 9, 0), (0, 0, 8, 0, 9, 0), (0, 0, 8, 8, 0, 0)) == []


@pytest.mark.parametrize(
    ("layer", "part"),
    [
        ((4, 0, 8, 8, 9, 0), "weight offset 4 is not a multiple of 8"),
        ((0, 4, 8, 8, 9, 0), "pair offset 4 is not a multiple of 8"),
        ((1 << 35, 0, 8, 8, 9, 0), r"beyond 2\^35"),
        ((0, 0, 1, 65537, 9, 0), "I is 65537; expected at most 65535"),
        ((0, 0, 1, 8, 65536, 0), "taps are 65536; expected at most 65535"),
        ((0, 0, -1, 8, 9, 0), "O is -1; expected 0 or more"),
    ],
)
def test_what_a_tile_cannot_express_is_refused(layer, part):
    with pytest.raises(ValueError, match=f"layer 1: .*{part}"):
        _C.plan_tiles([(0, 0, 8, 8, 9, 0), layer])


def test_a_row_of_another_length_is_a_type_error():
    with pytest.raises(TypeError):
        _C.plan_tiles([(0, 0, 8, 8, 9)])
