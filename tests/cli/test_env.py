from __future__ import annotations

import json

from tests.conftest import Run


def test_env(run: Run) -> None:
    status, out, _ = run("env", "--json")
    assert status == 0 and {"cpu", "triton", "cuda"} <= set(json.loads(out)["backends"])
    status, out, _ = run("env")
    assert status == 0 and "torch" in out
