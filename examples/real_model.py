"""A published few-step video model, taught by a published VLM, on one GPU. The first call downloads 33 GB or more.

python examples/real_model.py --image first.png --prompt "The red ball rolls into the box." --out runs/real

A step at the default size needs about 49 GB on the GPU; --offload keeps what a step does not need in main memory.
"""

from __future__ import annotations

import argparse

import torch
from diffusers.utils import export_to_video

from vlmteacher import TeacherPipeline
from vlmteacher.planning import format_plan, make_plan

REASONER = "quanhaol/Wan2.2-TI2V-5B-Turbo"  # four steps, image and text to video
TEACHER = "Qwen/Qwen3-VL-4B-Instruct"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--image", help="the first frame")
    parser.add_argument("--out", default="runs/real", help="run folder to write (default: runs/real)")
    parser.add_argument("--num-frames", type=int, default=49)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--offload", action="store_true", help="idle networks wait in main memory")
    parser.add_argument("--plan-only", action="store_true", help="print FLOPs and memory of a step, and stop")
    arguments = parser.parse_args()

    size = {"num_frames": arguments.num_frames, "height": arguments.height, "width": arguments.width}
    place = "cpu" if arguments.offload else "device"
    print(format_plan(make_plan(REASONER, TEACHER, **size, memory=80, text_encoder=place)))
    if arguments.plan_only:
        return

    pipe = TeacherPipeline.from_pretrained(reasoner=REASONER, teacher=TEACHER, offload=arguments.offload)
    queries = pipe.write_queries(arguments.prompt, arguments.image)
    print("The Teacher asks:", *queries.questions, sep="\n  ")
    out = pipe(
        arguments.prompt,
        arguments.image,
        **size,
        queries=queries,
        fit="crop",
        generator=torch.Generator().manual_seed(0),
        run_dir=arguments.out,
    )
    print(out)
    print(out.verdict)
    export_to_video(out.frames, f"{arguments.out}/shown.mp4", fps=int(out.fps))


if __name__ == "__main__":
    main()
