"""How the packaged models are made, stage by stage; each resumes where it was stopped.

vae -> vae-decoder, decoder, latents -> reasoner -> distil -> (teacher) -> collect -> teacher-finetune -> optimise ->
teacher-finetune -> teacher-point -> writer -> package. The encoder of the video distance stands by itself. Every stage
reads its predecessors from the same folder.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from vlmteacher.errors import InputError
from vlmteacher.placement import find_device

STAGES = (
    "vae",
    "vae-decoder",
    "decoder",
    "latents",
    "reasoner",
    "distil",
    "teacher",
    "collect",
    "teacher-finetune",
    "optimise",
    "teacher-point",
    "writer",
    "package",
    "encoder",
)
NEEDS = {
    "vae-decoder": ("vae/vae",),
    "decoder": ("vae/vae",),
    "latents": ("vae/vae",),
    "reasoner": ("vae/vae", "latents"),
    "distil": ("reasoner/reasoner",),
    "collect": ("distil/pipeline", "decoder/decoder.safetensors"),
    "teacher-finetune": ("teacher/state.pt", "collect"),
    "optimise": ("distil/pipeline", "decoder/decoder.safetensors", "finetune/teacher"),
    "teacher-point": ("teacher/tokenizer", "distil/pipeline", "decoder/decoder.safetensors", "finetune/teacher"),
    "writer": ("teacher/tokenizer", "point/teacher"),
    "package": (
        "distil/pipeline",
        "vae_decoder/vae",
        "decoder/decoder.safetensors",
        "point/teacher",
        "writer/writer",
    ),
}
STARTS = {  # the parts of a pair that a stage may start from
    "vae": "reasoner/vae",
    "decoder": "decoder.safetensors",
    "reasoner": "reasoner",
    "teacher": "teacher",
}
DEFAULTS = {
    "max_steps": 60,
    "threshold": 0.22,
    "learning_rate": 6e-4,
    "rank": 16,
    "teacher_frames": 12,
    "final_samples": 5,
}


def run(stage: str, out: Path, init: Path | None = None, device: str = "cpu") -> None:
    """Run one stage in the folder `out`, from scratch or from the weights of the pair in the folder `init`.

    device: of `teacher-point`; the others are for the CPU.

    Raises InputError: another device than the stage can use; an earlier stage's result is not there, `init` is no pair,
    or its part has other sizes.
    """
    if init and not (init / "pair.json").exists():
        raise InputError(f"{init} holds no pair.json: --init takes the folder of a pair")
    if init and stage not in STARTS:
        raise InputError(f"stage {stage} starts from no other weights: leave out --init ({', '.join(STARTS)} take it)")
    if device != "cpu" and stage != "teacher-point":
        raise InputError(f"stage {stage} is for the CPU: leave out --device {device}, which teacher-point alone takes")
    start = init / STARTS[stage] if init else None
    for need in NEEDS.get(stage, ()):
        if not (out / need).exists():
            raise InputError(f"stage {stage} needs {out / need}: run the stage that makes it first")
    if stage == "vae":
        from recipes.microworld import vae

        vae.main(out / "vae", start)
    elif stage == "vae-decoder":
        from recipes.microworld import vae

        vae.refine(out / "vae/vae", out / "vae_decoder")
    elif stage == "decoder":
        from recipes.microworld import decoder

        decoder.main(out / "decoder", out / "vae/vae", start)
    elif stage == "latents":
        from recipes.microworld import reasoner

        reasoner.encode_dataset(out / "vae/vae", out / "latents")
    elif stage == "reasoner":
        from recipes.microworld import reasoner

        reasoner.main(out / "reasoner", out / "latents", out / "vae/vae", start)
    elif stage == "distil":
        distil(out)
    elif stage == "teacher":
        from recipes.microworld.teacher import lesson

        lesson.main(out / "teacher", start)
    elif stage in ("collect", "optimise"):
        from recipes.microworld import collect

        collect.main(out, optimise=stage == "optimise")
    elif stage == "teacher-finetune":
        from recipes.microworld.teacher import lesson

        lesson.finetune(out / "teacher/state.pt", out / "collect", out / "finetune")
    elif stage == "teacher-point":
        from recipes.microworld.teacher import point

        point.main(out, out / "point", find_device(device, "--device"))
    elif stage == "writer":
        from recipes.microworld.teacher import writer

        writer.main(out / "point", out / "writer")
    elif stage == "package":
        package(out, out / "pair")
    elif stage == "encoder":
        from recipes.microworld import encoder

        encoder.main(out / "encoder")
    else:
        raise InputError(f"stage {stage!r} is not there: it can be {', '.join(STAGES)}")


def distil(out: Path) -> None:
    """The four-step student of the many-step Reasoner, by DMD2 on instances with the flaw."""
    from recipes.microworld.training import fast_attention, load_config
    from vlmteacher.distillation.distill import Settings, run
    from vlmteacher.distillation.trainer import STATE
    from vlmteacher.microworld import world
    from vlmteacher.microworld.export import export

    config = load_config("distil")
    videos = config.pop("videos")
    export(out / "videos", videos["count"], videos["seed"], flawed=True, chosen=world.FAMILIES)
    paths = {"reasoner": str(out / "reasoner/reasoner"), "data": str(out / "videos"), "out": str(out / "distil")}
    with fast_attention():
        run(Settings.from_dict(config | paths), resume=(out / "distil" / STATE).exists())


def package(trained: Path, pair: Path) -> None:
    """Write the pair's directory in half precision: the Reasoner with its refined VAE, the decoder, the Teacher."""
    import torch
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from transformers import Qwen3VLForConditionalGeneration, UMT5EncoderModel

    from recipes.microworld import reasoner
    from recipes.microworld.teacher import writer
    from vlmteacher.checkpoints.pretrained import load_network, load_tokenizer
    from vlmteacher.decoders.taehv import SurrogateDecoder
    from vlmteacher.microworld import world

    half = torch.float16
    pair.mkdir(parents=True, exist_ok=True)
    source = trained / "distil/pipeline"
    reasoner.save_pipeline(
        pair / "reasoner",
        load_network(WanTransformer3DModel, source / "transformer", dtype=torch.float32).to(half),
        load_network(UMT5EncoderModel, source / "text_encoder", dtype=torch.float32).to(half),
        load_tokenizer(source / "tokenizer"),
        load_network(AutoencoderKLWan, trained / "vae_decoder/vae", dtype=torch.float32).to(half),
    )
    many_step = load_network(WanTransformer3DModel, trained / "reasoner/reasoner/transformer", dtype=torch.float32).to(
        half
    )
    many_step.save_pretrained(pair / "many_step")
    SurrogateDecoder.from_checkpoint(trained / "decoder/decoder.safetensors").to(half).save(
        pair / "decoder.safetensors"
    )
    teacher = trained / "point/teacher"
    shutil.copytree(teacher, pair / "teacher", dirs_exist_ok=True)
    load_network(Qwen3VLForConditionalGeneration, teacher, dtype=half).save_pretrained(pair / "teacher")
    writer.attach(trained / "writer/writer", pair / "teacher")
    for config in pair.rglob("config.json"):  # diffusers writes down where a part was loaded from
        content = json.loads(config.read_text())
        if content.pop("_name_or_path", None):
            config.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    scene, prompt = world.instance(EXAMPLE, seed=0)
    description = {
        "reasoner": "reasoner",
        "teacher": "teacher",
        "decoder": "decoder.safetensors",
        "many_step": "many_step",
        "defaults": DEFAULTS,
        "example": {"prompt": prompt, "scene": scene.to_json(), "seed": 0},
    }
    (pair / "pair.json").write_text(json.dumps(description, indent=2) + "\n")


EXAMPLE = 134  # index of the demo's instance in the held-out split 0
