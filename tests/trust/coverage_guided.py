"""The targets of `fuzz.py` under atheris, which follows the branches that an input reaches: `make fuzz-atheris`.

    python -m tests.trust.coverage_guided [SECONDS] [DIR]

The first byte of an input chooses the target, hypothesis makes the example of the others. An input that fails is
written to DIR (`.`), and ends the run with exit status 1. Needs `pip install atheris`.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any


def main(seconds: int, found: Path) -> None:
    try:
        import atheris
    except ImportError:
        sys.exit("atheris is not installed: pip install atheris (Linux, Python up to 3.13)")
    os.environ |= {"HF_HUB_OFFLINE": "1", "VLMTEACHER_CHECK_DECODER": "0"}
    with atheris.instrument_imports(include=["vlmteacher"]):
        import vlmteacher.cli
        import vlmteacher.decoders
        import vlmteacher.distillation.distill
        import vlmteacher.evaluation.tables
        import vlmteacher.lora.formats
        import vlmteacher.media
        import vlmteacher.pipeline
        import vlmteacher.state  # noqa: F401
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st

    from tests.trust import fuzz
    from tests.trust.report import count

    tried: Counter[str] = Counter()
    targets = [target for target in fuzz.TARGETS if target.cost < 10]  # whole models take longer than they tell

    def one(target: fuzz.Target) -> Any:
        @settings(deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(st.data())
        def trial(data: Any) -> None:
            example = data.draw(target.inputs)
            tried[target.name] += 1
            fuzz.check(target, example)

        return trial.hypothesis.fuzz_one_input

    trials = [one(target) for target in targets]

    def feed(data: bytes) -> None:
        if data:
            trials[data[0] % len(trials)](data[1:])
        if sum(tried.values()) % 500 == 0:
            report(tried)

    def report(tried: Counter[str]) -> None:
        (found / "tried.txt").write_text("\n".join(f"{name}: {number}" for name, number in tried.items()) + "\n")

    found.mkdir(parents=True, exist_ok=True)
    options = [
        f"-max_total_time={seconds}",
        "-max_len=8192",
        "-timeout=60",
        f"-artifact_prefix={found}/",
        "-rss_limit_mb=8192",
    ]
    atheris.Setup([sys.argv[0], *options], feed)
    atheris.Fuzz()
    for name, number in tried.items():
        count(f"fuzzed by coverage: {name}", number, "a value, or one line")


if __name__ == "__main__":
    given = sys.argv[1:]
    main(int(given[0]) if given else 300, Path(given[1]) if len(given) > 1 else Path())
