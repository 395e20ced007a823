"""The runs of the next pair, whose Reasoner has errors of both kinds: missed goals, and forbidden ways to them.

VAE and surrogate decoder are those of the pair before, from which Reasoner and Teacher are trained further. No run
takes more than about an hour of one core but `teacher-point`, which is for a GPU.
"""

from __future__ import annotations

from recipes.microworld.manifest import Entry, Manifest

BOTH = Manifest(
    (
        Entry("latents", "latents", settings={"shards": 12}),
        Entry("reasoner", "reasoner", settings={"steps": 5000, "learning_rate": 6e-4, "seed": 12}),
        Entry("distil", "distil"),
        Entry(
            "teacher",
            "teacher",
            settings={
                "steps": 2400,
                "learning_rate": 4e-4,
                "seed": 13,
                "heads_first": 250,
                "adversary": 0.06,
                "blend_every": 2,
                "answer_weight": 6.0,
                "outside": 0.35,
            },
        ),
        Entry("collect", "collect"),
        Entry(
            "relearnt-1",
            "teacher-finetune",
            start="teacher",
            settings={"steps": 1500, "learning_rate": 5e-4, "outside": 0.35},
            unlike="it learnt from 1,800 lessons, 1,600 predictions and 296 optimised videos of the many-step model",
        ),
        Entry("optimise", "optimise", start="relearnt-1"),
        Entry(
            "relearnt-2",
            "teacher-finetune",
            start="relearnt-1",
            settings={"steps": 1500, "learning_rate": 5e-4, "outside": 0.35, "seed": 32},
        ),
        Entry("teacher-point", "teacher-point", start="relearnt-2"),
        Entry(
            "writer",
            "writer",
            start="teacher-point",
            settings={"steps": 600, "learning_rate": 5e-4, "adapter": "before/writer"},
        ),
        Entry("package", "package"),
    ),
    settings={"flaws": "both"},
    of_pair={
        "vae/vae": "reasoner/vae",
        "vae_decoder/vae": "reasoner/vae",
        "decoder/decoder.safetensors": "decoder.safetensors",
        "before/writer": "teacher/writer",
    },
)
