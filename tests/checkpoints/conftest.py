from __future__ import annotations

from pathlib import Path

import pytest

from tests.reasoners import tiny_checkpoints, tiny_hunyuan, tiny_ltx
from tests.tiny_teacher import tiny_glm4v, tiny_internvl, tiny_qwen3_vl, tiny_qwen25_vl, tiny_smolvlm


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories of tiny checkpoints, by family."""
    root = tmp_path_factory.mktemp("families")
    return {
        "wan": tiny_checkpoints.wan21_i2v(root / "wan"),
        "ltx": tiny_ltx.tiny_ltx_pipeline(root / "ltx"),
        "hunyuan": tiny_hunyuan.tiny_hunyuan_pipeline(root / "hunyuan"),
        "qwen3_vl": tiny_qwen3_vl(root / "qwen3_vl"),
        "qwen25_vl": tiny_qwen25_vl(root / "qwen25_vl"),
        "internvl": tiny_internvl(root / "internvl"),
        "glm4v": tiny_glm4v(root / "glm4v"),
        "smolvlm": tiny_smolvlm(root / "smolvlm"),
    }
