"""The nodes: thin, stateless classes of ComfyUI's V3 schema around `teaching`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, get_args

import comfy.lora
import comfy.model_management
import comfy.sd
import folder_paths
from comfy_api.latest import ComfyAPISync, ComfyExtension, io
from PIL import Image
from torch import Tensor

from vlmteacher import InputError
from vlmteacher.reasoners.presets import PRESETS
from vlmteacher.teachers.quantization import Quantize

from . import teaching

CATEGORY = "vlmteacher"
OWN, NONE, DEFAULT = "the reasoner's own", "none", "default"
Pipeline, Lora = io.Custom("TEACHER_PIPELINE"), io.Custom("LORA_MODEL")
PROMPT = "The task: what the video must show."
IMAGE = "The first frame, for models that take one."


class Interrupted(KeyboardInterrupt):
    """The user's interruption, as the library takes one: the state of the last step is kept."""


class LoadTeacherPipeline(io.ComfyNode):
    """Load a Reasoner, a Teacher and a surrogate decoder in main memory."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        transformers, loras = (
            folder_paths.get_filename_list("diffusion_models"),
            folder_paths.get_filename_list("loras"),
        )
        return io.Schema(
            node_id="VLMTeacherLoadPipeline",
            display_name="Load Teacher Pipeline",
            category=CATEGORY,
            description="A video model in diffusers' layout, and the vision-language model that teaches it.",
            inputs=[
                io.String.Input(
                    "reasoner",
                    default="",
                    placeholder="hub id or folder of a diffusers pipeline; blank: the packaged tiny one",
                    tooltip="Its text encoder and VAE are used, and its transformer where none is chosen below.",
                ),
                io.String.Input(
                    "teacher",
                    default="",
                    placeholder="hub id or folder of a VLM; blank: the packaged tiny one",
                    tooltip="A Qwen3-VL, Qwen2.5-VL or InternVL3 (-hf).",
                ),
                io.Combo.Input(
                    "transformer",
                    options=[OWN, *transformers],
                    default=OWN,
                    tooltip="The file that MODEL is loaded from, so that the LoRA is trained on the same weights.",
                ),
                io.Combo.Input(
                    "decoder",
                    options=[DEFAULT, *folder_paths.get_filename_list("vae_approx")],
                    default=DEFAULT,
                    tooltip="The surrogate decoder (TAEHV); default: the Reasoner's, from the hub.",
                ),
                io.Combo.Input("preset", options=[DEFAULT, *PRESETS], default=DEFAULT, tooltip="How it is sampled."),
                io.Combo.Input(
                    "few_step_lora",
                    options=[NONE, *loras],
                    default=NONE,
                    tooltip="Merged into the Reasoner, with its preset: the same LoRA that MODEL has.",
                ),
                io.Combo.Input("dtype", options=[DEFAULT, "bfloat16", "float16", "float32"], default=DEFAULT),
                io.Combo.Input(
                    "quantize",
                    options=[NONE, *get_args(Quantize)],
                    default=NONE,
                    tooltip="Weights of the Teacher; it then stays on the GPU.",
                ),
                io.Boolean.Input(
                    "offload", default=False, tooltip="Networks that are not at work wait in main memory."
                ),
                io.Combo.Input(
                    "transformer_low_noise",
                    options=[OWN, *transformers],
                    default=OWN,
                    optional=True,
                    tooltip="The second expert of Wan 2.2 A14B; the LoRA is for the first one.",
                ),
                io.Combo.Input("few_step_lora_low_noise", options=[NONE, *loras], default=NONE, optional=True),
            ],
            outputs=[Pipeline.Output("pipeline", display_name="pipeline")],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> str:
        names = [inputs.get(name) for name in ("reasoner", "teacher")]
        return teaching.fingerprint(*names, *(path for paths in _files(inputs).values() for path in paths))

    @classmethod
    def execute(cls, **inputs: Any) -> io.NodeOutput:
        files = _files(inputs)
        pipe = teaching.load(
            comfy.model_management.get_torch_device(),
            reasoner=inputs["reasoner"],
            teacher=inputs["teacher"],
            decoder=next(iter(files["decoder"]), None),
            transformer=files["transformer"],
            few_step_lora=files["few_step_lora"],
            preset=_chosen(inputs["preset"]),
            dtype=_chosen(inputs["dtype"]),
            quantize=_chosen(inputs["quantize"]),
            offload=inputs["offload"],
        )
        return io.NodeOutput(pipe)


class WriteTeacherQueries(io.ComfyNode):
    """Let the Teacher write its queries, to read and edit them."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VLMTeacherWriteQueries",
            display_name="Write Teacher Queries",
            category=CATEGORY,
            description="The yes/no questions that the video will be checked with, one a line and the goal first.",
            inputs=[
                Pipeline.Input("pipeline"),
                io.String.Input("prompt", multiline=True, tooltip=PROMPT),
                io.Image.Input("image", optional=True, tooltip=IMAGE),
            ],
            outputs=[io.String.Output("queries", display_name="queries")],
        )

    @classmethod
    def validate_inputs(cls, prompt: str | None = None) -> bool | str:
        return True if prompt is None else _checked(lambda: teaching.check_prompt(prompt))

    @classmethod
    def execute(cls, pipeline: Any, prompt: str, image: Tensor | None = None) -> io.NodeOutput:
        with _room(pipeline):
            return io.NodeOutput(teaching.write_queries(pipeline, prompt, image))


class OptimizeWithTeacher(io.ComfyNode):
    """Optimise a LoRA for one prompt and picture, and put it on MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        size: dict[str, Any] = {"default": 0, "min": 0, "max": 16384, "tooltip": "0: the model's own."}
        return io.Schema(
            node_id="VLMTeacherOptimize",
            display_name="Optimize LoRA with Teacher",
            category=CATEGORY,
            description="Test-time optimisation of a LoRA by the Teacher's answers about the video.",
            inputs=[
                Pipeline.Input("pipeline"),
                io.String.Input("prompt", multiline=True, tooltip=PROMPT),
                io.String.Input(
                    "queries",
                    multiline=True,
                    default="",
                    placeholder="the Teacher's yes/no questions, one a line, the goal first; blank: it writes them",
                ),
                io.Int.Input("seed", default=0, min=0, max=2**53 - 1, control_after_generate=True),
                io.Int.Input("num_frames", **size),
                io.Int.Input("height", **size),
                io.Int.Input("width", **size),
                io.String.Input(
                    "settings",
                    multiline=True,
                    default="",
                    placeholder="flags of `vlmteacher solve`: --max-steps 40 --lr 5e-5 --fit crop --check-final",
                ),
                io.String.Input(
                    "run_folder",
                    default="",
                    placeholder="blank: none",
                    tooltip="Folder in output/vlmteacher that records the run, with a report. An interrupted run of the"
                    " same inputs in it goes on.",
                ),
                io.Float.Input(
                    "strength", default=1.0, min=-10.0, max=10.0, step=0.01, tooltip="Of the LoRA on MODEL."
                ),
                io.Image.Input("image", optional=True, tooltip=IMAGE),
                io.Model.Input(
                    "model", optional=True, tooltip="The video model as ComfyUI has it, with the pipeline's weights."
                ),
            ],
            outputs=[
                io.Model.Output("patched", display_name="model"),
                Lora.Output("lora", display_name="lora"),
                io.Image.Output("frames", display_name="frames"),
                io.Image.Output("before", display_name="frames_before"),
                io.Image.Output("plot", display_name="plot"),
                io.String.Output("questions", display_name="queries"),
                io.String.Output("summary", display_name="summary"),
                io.Float.Output("fps", display_name="fps"),
            ],
        )

    @classmethod
    def validate_inputs(
        cls,
        prompt: str | None = None,
        queries: str | None = None,
        settings: str | None = None,
        run_folder: str | None = None,
    ) -> bool | str:
        """Refuse what needs no model before any is loaded. Inputs that are connected are None here."""

        def check() -> None:
            if prompt is not None:
                teaching.check_prompt(prompt)
            teaching.parse_queries(queries or "")
            teaching.parse_settings(settings or "")
            teaching.run_folder(run_folder or "", folder_paths.get_output_directory())

        return _checked(check)

    @classmethod
    def execute(
        cls,
        pipeline: Any,
        prompt: str,
        queries: str,
        seed: int,
        num_frames: int,
        height: int,
        width: int,
        settings: str,
        run_folder: str,
        strength: float,
        image: Tensor | None = None,
        model: Any = None,
    ) -> io.NodeOutput:
        folder = teaching.run_folder(run_folder, folder_paths.get_output_directory())
        if model is not None:
            blocks = teaching.parse_settings(settings).get("lora_blocks")
            check_model(model, teaching.lora_layers(pipeline.reasoner.transformer, blocks))
        with _room(pipeline):
            taught = teaching.optimise(
                pipeline,
                prompt,
                image,
                queries=queries,
                flags=settings,
                seed=seed,
                size=(num_frames, height, width),
                run_dir=folder,
                on_step=_report,
            )
        if model is not None:
            model, _ = comfy.sd.load_lora_for_models(model, None, taught.lora, strength, 0)
        return io.NodeOutput(
            model,
            taught.lora,
            taught.frames,
            taught.before,
            taught.plot,
            taught.queries,
            taught.summary,
            taught.fps,
        )


class TeacherExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [LoadTeacherPipeline, WriteTeacherQueries, OptimizeWithTeacher]


def check_model(model: Any, layers: dict[str, tuple[int, int]]) -> None:
    """Raise InputError where ComfyUI's MODEL lacks one of these layers, or has it in another size."""
    key_map, weights = comfy.lora.model_lora_keys_unet(model.model, {}), model.model.state_dict()
    for name, shape in layers.items():
        weight = weights.get(key_map.get(name))
        if weight is None or tuple(weight.shape) != shape:
            size = "nothing" if weight is None else " x ".join(map(str, weight.shape))
            raise InputError(
                f"model, a {type(model.model).__name__}, has {size} at {name}, where the pipeline's transformer has"
                f" {' x '.join(map(str, shape))}: load the same file in both"
            )


def _files(inputs: dict[str, Any]) -> dict[str, list[str]]:
    """The paths of the chosen files, by input; of two experts the high-noise one first."""
    folders = {"transformer": "diffusion_models", "decoder": "vae_approx", "few_step_lora": "loras"}
    return {
        name: [
            folder_paths.get_full_path_or_raise(folder, chosen)
            for each in (name, f"{name}_low_noise")
            if (chosen := _chosen(inputs.get(each, NONE)))
        ]
        for name, folder in folders.items()
    }


def _chosen(option: str) -> str | None:
    return None if option in (OWN, NONE, DEFAULT) else option


def _checked(check: Callable[[], object]) -> bool | str:
    """True, or the message of the InputError that `check` raises, as `validate_inputs` gives it."""
    try:
        check()
    except InputError as error:
        return str(error)
    return True


def _report(done: int, most: int, strip: Image.Image | None) -> None:
    """Show the progress and the latest one-step prediction. Raises Interrupted where the user asked for an end."""
    ComfyAPISync().execution.set_progress(done, max(most, 1), preview_image=strip)
    if comfy.model_management.processing_interrupted():
        raise Interrupted


@contextmanager
def _room(pipeline: Any) -> Iterator[None]:
    """Give the GPU to the pipeline for the time of the block, and ComfyUI's own exception to an interruption."""
    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()
    try:
        with teaching.at_work(pipeline, comfy.model_management.get_torch_device()):
            yield
    except Interrupted:
        comfy.model_management.throw_exception_if_processing_interrupted()
        raise
    finally:
        comfy.model_management.soft_empty_cache()
