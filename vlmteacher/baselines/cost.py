"""The cost of a method on one instance."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """The cost of a method on one instance.

    Attributes:
        seconds: wall time.
        generator_calls: videos that the Reasoner sampled.
        vlm_calls: texts that the Teacher wrote, and videos that it judged, one-step predictions among them; without
            writing queries.
    """

    seconds: float
    generator_calls: int
    vlm_calls: int
