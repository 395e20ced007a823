"""The runs of the next pair, whose Reasoner has errors of both kinds: missed goals, and forbidden ways to them.

VAE and surrogate decoder are those of the pair before, from which Reasoner and Teacher are trained further. No run
takes more than about an hour of one core but `teacher-point`, which is for a GPU.
"""

from __future__ import annotations

from recipes.microworld.manifest import Entry, Manifest

BOTH = Manifest(
    (
        Entry("latents", "latents"),
        Entry("reasoner", "reasoner", settings={"steps": 6000, "learning_rate": 6e-4, "seed": 12}),
        Entry("distil", "distil"),
        Entry("teacher", "teacher", settings={"steps": 3000, "learning_rate": 6e-4, "seed": 13}),
        Entry("collect", "collect"),
        Entry("relearnt-1", "teacher-finetune", start="teacher", settings={"steps": 1500}),
        Entry("optimise", "optimise", start="relearnt-1"),
        Entry("relearnt-2", "teacher-finetune", start="relearnt-1", settings={"steps": 1500, "seed": 32}),
        Entry("teacher-point", "teacher-point", start="relearnt-2"),
        Entry("writer", "writer", start="teacher-point"),
        Entry("package", "package"),
    ),
    settings={"flaws": "both"},
    of_pair={
        "vae/vae": "reasoner/vae",
        "vae_decoder/vae": "reasoner/vae",
        "decoder/decoder.safetensors": "decoder.safetensors",
    },
)
