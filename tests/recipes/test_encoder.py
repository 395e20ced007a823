"""The encoder of the video distance: its training writes a file that loads."""

from __future__ import annotations

import numpy as np

from recipes.microworld import encoder as recipe
from recipes.microworld import training
from vlmteacher.evaluation.video_distance import features, load_encoder


def test_encoder_is_trained_to_a_file_that_loads(tmp_path):
    config = {"batch": 2, "steps": 2, "learning_rate": 1e-3, "seed": 0}
    recipe.train_encoder(training.Run(tmp_path, tmp_path, training.load_config("encoder") | config))
    encoder = load_encoder(tmp_path / "encoder.safetensors")
    found = features(encoder, [recipe.sample(np.random.default_rng(k))[0] for k in range(3)])
    assert found.shape == (3, 64) and found.isfinite().all()
