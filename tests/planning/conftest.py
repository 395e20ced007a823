from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny_pair import tiny_decoder
from vlmteacher.decoders.taehv import SurrogateDecoder
from vlmteacher.reasoners import checkpointing


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny models' products are shorter than a LoRA's rank is at full size."""
    monkeypatch.setattr(checkpointing, "MIN_INNER", 8)


@pytest.fixture
def decoder(tmp_path: Path) -> SurrogateDecoder:
    return SurrogateDecoder.from_checkpoint(tiny_decoder(tmp_path / "decoder.safetensors"))
