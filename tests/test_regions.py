"""Regions: how they are drawn and laid out."""

import pytest
import torch

from mtp_trl.modeling.attention import chunk_by_position, window_by_position
from mtp_trl.training.regions import (
    Regions,
    compact_left_padding,
    pack_regions,
    row_generator,
    sample_regions,
    student_forced_ids,
    suffix_regions,
)

MASK, PAD, K = 63, 2, 6


def drawn(rows: int = 3, *, step: int = 0, k_min: int = 2, slots: int = 20) -> Regions:
    return sample_regions(
        [4] * rows,
        [18] * rows,
        k_min=k_min,
        k_max=K,
        slots=slots,
        generators=[row_generator(7, step, row) for row in range(rows)],
    )


def texts() -> tuple[torch.Tensor, torch.Tensor]:
    lengths_B = torch.tensor([20, 16, 18])
    clean_BN = torch.randint(3, 60, (3, 20), generator=torch.Generator().manual_seed(0))
    return clean_BN.masked_fill(torch.arange(20) >= lengths_B[:, None], PAD), lengths_B


def test_every_slot_is_used():
    regions = drawn(50)
    assert ((regions.size_BR - 1).clamp(min=0).sum(1) == 20).all()


def test_sizes_and_anchors_cover_their_ranges_and_stay_in_them():
    regions = drawn(400, slots=60)
    sizes = regions.size_BR[regions.size_BR > 0]
    anchors = regions.anchor_BR[regions.size_BR > 0]
    assert set(sizes.tolist()) == set(range(2, K + 1))
    assert set(anchors.tolist()) == set(range(4, 19))


def test_a_row_draws_the_same_regions_whatever_else_is_in_the_batch():
    whole = drawn(4)
    single = sample_regions([4], [18], k_min=2, k_max=K, slots=20, generators=[row_generator(7, 0, 2)])
    width = single.size_BR.shape[1]
    assert torch.equal(whole.size_BR[2, :width], single.size_BR[0])
    assert torch.equal(whole.anchor_BR[2, :width], single.anchor_BR[0])
    assert not torch.equal(drawn(4, step=1).anchor_BR[2], whole.anchor_BR[2])


def test_a_fixed_block_size_that_divides_the_slots_gives_equal_regions():
    sizes = drawn(5, k_min=K, slots=20).size_BR
    assert sizes.tolist() == [[K, K, K, K]] * 5


@pytest.mark.parametrize("wrong", [{"k_min": 1, "slots": 8}, {"k_min": 9, "slots": 8}, {"k_min": 2, "slots": 0}])
def test_invalid_sizes_are_refused(wrong):
    with pytest.raises(ValueError, match=r"k_min|slots"):
        sample_regions([0], [3], k_max=8, generators=[row_generator(0, 0, 0)], **wrong)


def test_a_row_without_completion_is_refused():
    with pytest.raises(ValueError, match="completion token"):
        sample_regions([3], [2], k_min=2, k_max=4, slots=4, generators=[row_generator(0, 0, 0)])


def test_packed_row_equals_regions_written_out_by_hand():
    clean_BN, lengths_B = texts()
    regions = Regions(torch.tensor([[5, 9, 5]] * 3), torch.tensor([[3, 2, 4], [3, 2, 4], [4, 4, 0]]))
    layout = pack_regions(clean_BN, lengths_B, regions, k_max=K, slots=6, mask_token_id=MASK)
    for row in range(3):
        column = 20
        for region in range(3):
            anchor, size = int(regions.anchor_BR[row, region]), int(regions.size_BR[row, region])
            slots = list(range(column, column + max(size - 1, 0)))
            columns = [anchor, *slots][:size]
            read = layout.read_BRK[row, region][layout.drawn_BRK[row, region]] - row * 26
            assert read.tolist() == columns
            for index, slot in enumerate(slots):
                assert layout.ids_XT[row, slot] == MASK
                assert layout.positions_XT[row, slot] == anchor + 1 + index
                seen = layout.allowed_XTT[row, slot].nonzero().flatten().tolist()
                assert seen == [*range(anchor + 1), *slots[: index + 1]]
            column += len(slots)
    text = layout.allowed_XTT[:, :20]
    assert torch.equal(text[..., :20], torch.ones(20, 20, dtype=torch.bool).tril().expand(3, -1, -1))
    assert not text[..., 20:].any()


def test_suffix_rows_are_prefix_and_slots():
    clean_BN, lengths_B = texts()
    regions = drawn()
    layout = suffix_regions(clean_BN, lengths_B, regions, k_max=K, mask_token_id=MASK, pad_token_id=PAD)
    rows, width = regions.size_BR.shape
    T = layout.ids_XT.shape[1]
    for row in range(rows):
        for region in range(width):
            size, anchor = int(regions.size_BR[row, region]), int(regions.anchor_BR[row, region])
            if not size:
                continue
            line = rows + row * width + region
            expected = [*clean_BN[row, : anchor + 1].tolist(), *[MASK] * (size - 1)]
            assert layout.ids_XT[line][layout.valid_XT[line]].tolist() == expected
            read = layout.read_BRK[row, region][layout.drawn_BRK[row, region]]
            assert read[0] == row * T + anchor
            assert (read[1:] - line * T).tolist() == list(range(anchor + 1, anchor + size))


@pytest.mark.parametrize("packed", [True, False])
def test_student_forcing_puts_position_j_into_slot_j(packed):
    clean_BN, lengths_B = texts()
    regions = drawn()
    layout = (
        pack_regions(clean_BN, lengths_B, regions, k_max=K, slots=20, mask_token_id=MASK)
        if packed
        else suffix_regions(clean_BN, lengths_B, regions, k_max=K, mask_token_id=MASK, pad_token_id=PAD)
    )
    rollout_BRK = torch.arange(layout.drawn_BRK.numel()).view(layout.drawn_BRK.shape) + 100
    forced = student_forced_ids(layout, rollout_BRK)
    for row, region in (regions.size_BR > 0).nonzero().tolist():
        size = int(regions.size_BR[row, region])
        slots = layout.read_BRK[row, region, 1:size]
        assert forced.flatten()[slots].tolist() == rollout_BRK[row, region, : size - 1].tolist()
    untouched = layout.ids_XT != MASK
    assert torch.equal(forced[untouched], layout.ids_XT[untouched])


def test_windows_and_chunks_are_measured_in_positions():
    positions_XT = torch.tensor([[0, 1, 2, 3, 2, 3]])
    everything = torch.ones(1, 6, 6, dtype=torch.bool)
    near = window_by_position(everything, positions_XT, window=2)
    assert near[0, 4].tolist() == [False, True, True, True, True, True]
    same = chunk_by_position(everything, positions_XT, chunk=2)
    assert same[0, 4].tolist() == [False, False, True, True, True, True]


def test_left_padding_is_compacted():
    ids_BN = torch.tensor([[PAD, PAD, 5, 6], [7, 8, 9, PAD], [PAD, 7, PAD, 8]])
    mask_BN = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0], [0, 1, 0, 1]])
    ids, lengths = compact_left_padding(ids_BN, mask_BN, pad_token_id=PAD)
    assert ids.tolist() == [[5, 6, PAD], [7, 8, 9], [7, 8, PAD]]
    assert lengths.tolist() == [2, 3, 2]
