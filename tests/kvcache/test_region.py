import pytest

from kvcache.region import GENERATION_BYTES, RegionLayout


@pytest.mark.parametrize(("num_blocks", "data_offset"), [(1, 4096), (512, 4096), (513, 8192)])
def test_blocks_begin_at_a_page_after_the_generations(num_blocks, data_offset):
    layout = RegionLayout(num_blocks, 100)
    assert layout.data_offset == data_offset
    assert layout.num_bytes == data_offset + 100 * num_blocks


def test_without_generations_there_are_only_blocks():
    layout = RegionLayout(3, 100, has_generations=False)
    assert (layout.data_offset, layout.num_bytes, layout.block_offset(2)) == (0, 300, 200)


def test_neither_blocks_nor_generations_overlap_and_all_lie_inside():
    layout = RegionLayout(700, 48)
    spans = [(layout.generation_offset(b), GENERATION_BYTES) for b in range(700)]
    spans += [(layout.block_offset(b), layout.block_bytes) for b in range(700)]
    ends = [offset + size for offset, size in spans]
    assert all(end <= offset for end, (offset, _) in zip(ends, spans[1:], strict=False))
    assert ends[-1] == layout.num_bytes
