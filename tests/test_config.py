"""MTPDistillConfig: the docstring describes each field for readers and for the command line."""

from __future__ import annotations

from dataclasses import dataclass, fields

import pytest
from transformers import HfArgumentParser
from trl import DistillationConfig

from mtp_trl import MTPDistillConfig
from mtp_trl.training.config import described_once


def test_the_help_of_a_field_is_its_entry_in_the_docstring():
    help_text = " ".join(HfArgumentParser(MTPDistillConfig).format_help().split())
    assert "Mask slots appended to every text; regions are drawn until the slots are full." in help_text
    assert "Initial learning rate. The default is the paper's" in help_text
    inherited = next(field for field in fields(DistillationConfig) if field.name == "learning_rate")
    assert "paper" not in inherited.metadata["help"]


def test_a_field_without_an_entry_is_refused():
    with pytest.raises(ValueError, match=r"Config\.b has no entry in its docstring's Parameters"):

        @described_once
        @dataclass
        class Config:
            """A configuration.

            Parameters:
                a (`int`):
                    The first, in %.
            """

            a: int = 1
            b: int = 2


def test_percent_signs_are_escaped_and_names_can_share_an_entry():
    @described_once
    @dataclass
    class Config:
        """A configuration.

        Parameters:
            a, b (`int`):
                Both, in %.
        """

        a: int = 1
        b: int = 2

    assert [field.metadata["help"] for field in fields(Config)] == ["Both, in %%."] * 2
    HfArgumentParser(Config).format_help()
