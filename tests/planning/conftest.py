from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny_pair import tiny_decoder
from vlmteacher.decoders.taehv import SurrogateDecoder
from vlmteacher.reasoners import checkpointing


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lower the threshold: the tiny models' products are shorter than a full-size LoRA's rank."""
    monkeypatch.setattr(checkpointing, "MIN_INNER", 8)


@pytest.fixture
def decoder(tmp_path: Path) -> SurrogateDecoder:
    return SurrogateDecoder.from_checkpoint(tiny_decoder(tmp_path / "decoder.safetensors"))
