"""The metrics for `evaluate` equal counts by hand."""

import pytest

from mtp_trl.evaluation.metrics import Acceleration, BlockAgreement, FinalAnswer


def test_acceleration_is_tokens_per_pass():
    assert Acceleration().compute(predictions=[[3, 1, 4], [2, 2]]) == {"acceleration": 12 / 5}


def test_block_agreement_counts_up_to_the_first_difference():
    found = BlockAgreement().compute(predictions=[[1, 2, 3, 4], [5, 6], [7]], references=[[1, 2, 9, 4], [5, 6], [7, 8]])
    assert found == {"block_agreement": (2 + 2 + 1) / (4 + 2 + 2), "identical": pytest.approx(1 / 3)}


def test_final_answer_reads_the_number_after_the_marker():
    texts = ["so 3 + 4 = 7\n#### 7", "#### 1,200", "no mark 5", "#### 8 #### 9"]
    found = FinalAnswer().compute(predictions=texts, references=["#### 7", "1200", "5", "#### 9"])
    assert found["final_answer"] == 0.5
    assert found["standard_error"] == pytest.approx((1 / 3 / 4) ** 0.5)


def test_metrics_have_a_description_and_a_citation():
    for metric in (Acceleration(), BlockAgreement(), FinalAnswer()):
        assert "2602.06019" in metric.citation
        assert metric.description
