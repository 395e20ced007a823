"""Draw the picture of docs/internals/surrogate_decoder.md: ``python -m tools.surrogate_picture``.

Three held-out videos of the microworld: the video, the decodings of the packaged VAE and surrogate decoder, four times
their difference. Prints the mean PSNR over 50 videos.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vlmteacher.decoders import load_decoder
from vlmteacher.microworld import world
from vlmteacher.pipeline import PACKAGED_PAIR
from vlmteacher.reasoners.loading import load_reasoner

PICTURE = Path(__file__).parents[1] / "docs/internals/surrogate_decoder.png"
COUNT, SHOWN, FRAMES = 50, 3, (0, 3, 6, 9, 12)


def main() -> None:
    """Decode held-out videos' latents by the VAE and the surrogate decoder; draw three, print the PSNR of all."""
    reasoner = load_reasoner(str(PACKAGED_PAIR / "reasoner"))
    decoder = load_decoder(PACKAGED_PAIR / "decoder.safetensors", reasoner)
    errors, sheet = [], []
    for index in range(COUNT):
        video = world.render(world.instance(index, seed=1)[0])
        with torch.no_grad():
            latents = reasoner.encode_video((video * 255).round().astype(np.uint8))
            vae, ours = (d.decode(latents).permute(0, 2, 3, 1).float().numpy() for d in (reasoner, decoder))
        errors.append([-10 * np.log10(np.mean((a - b) ** 2)) for a, b in ((vae, video), (ours, video), (ours, vae))])
        if index < SHOWN:
            rows = (video, vae, ours, np.abs(ours - vae) * 4)
            sheet.append(np.concatenate([np.concatenate([row[k] for k in FRAMES], 1) for row in rows]))
    pixels = (np.clip(np.concatenate(sheet, 1), 0, 1) * 255).round().astype(np.uint8)
    Image.fromarray(pixels).save(PICTURE, optimize=True)
    names = ("VAE against video", "surrogate against video", "surrogate against VAE")
    print(", ".join(f"{name} {value:.1f} dB" for name, value in zip(names, np.mean(errors, 0), strict=True)))


if __name__ == "__main__":
    main()
