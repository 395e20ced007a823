"""VLMs that answer requests about images: behind an OpenAI-compatible endpoint, or loaded from a directory."""

from __future__ import annotations

import io
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.parse import urlsplit

from PIL import Image

from vlmteacher.errors import InputError, MissingExtra, first_line
from vlmteacher.media import ImageInput, data_url, read_image
from vlmteacher.placement import find_devices, find_dtype
from vlmteacher.prompts import whole_sentences
from vlmteacher.state import fingerprint
from vlmteacher.teachers.base import ANSWER_TOKENS, Teacher, check_free_text, load_teacher, read_style
from vlmteacher.teachers.prompt import THOUGHT

if TYPE_CHECKING:
    from openai import OpenAI, OpenAIError

Part: TypeAlias = str | Image.Image
"""A text or an image of a request."""

LOCAL = "local:"  # before the directory or hub id of a VLM without an endpoint
RETRIES = 8  # by the client, with its own back-off
TIMEOUT = 180.0  # seconds of one attempt
JPEG_QUALITY = 95
LOCAL_TOKENS = 2048  # at most, of a local VLM's answer to `ask`


class EndpointError(RuntimeError):
    """An endpoint gave no answer to a request: a time-out, an error of the server, or one of the request itself."""


class VLM(ABC):
    """A vision-language model that answers in free text.

    name: for captions.
    """

    name: str

    @abstractmethod
    def ask(self, system: str, content: Sequence[Part]) -> str:
        """Return the model's whole reply to texts and images in their order, thoughts included.

        system: the instructions before them. Raises EndpointError where this request cannot be answered, InputError
        where none can.
        """

    @abstractmethod
    def answer(self, text: str, images: Sequence[ImageInput] = (), max_tokens: int = ANSWER_TOKENS) -> str:
        """Answer as `Teacher.answer` does, without thoughts. Raises as `ask` does."""

    @abstractmethod
    def described(self) -> dict[str, Any]:
        """Return what the replies depend on as plain data for JSON."""


class RemoteVLM(VLM):
    """A model behind an OpenAI-compatible endpoint.

    Args:
        model: its name there.
        url: of the endpoint, up to ``/chat/completions``.
        key: environment variable with the API key; an endpoint without keys needs none. It is written nowhere.
        label: of the model, for messages.
        timeout: seconds of one attempt; there are `RETRIES` more.

    Raises InputError for a URL that cannot be used or holds a secret; MissingExtra.
    """

    def __init__(self, model: str, url: str, key: str, label: str = "VLM", timeout: float = TIMEOUT) -> None:
        check_url(url, key)
        self.name, self.url, self.timeout = model, url, timeout
        self._variable, self._key = key, os.environ.get(key, "").strip()
        self._label = f"{label} {model} at {url}"
        self._client = _client(url, self._key, timeout)

    def described(self) -> dict[str, Any]:
        return {"model": self.name, "url": self.url}

    def ask(self, system: str, content: Sequence[Part]) -> str:
        messages = [
            {"role": "system", "content": system},
            {"role": "user", "content": [_part(part) for part in content]},
        ]
        return self._complete(messages)[0]

    def answer(self, text: str, images: Sequence[ImageInput] = (), max_tokens: int = ANSWER_TOKENS) -> str:
        content = [*(_part(read_image(image)) for image in images), _part(text)]
        written, is_cut = self._complete([{"role": "user", "content": content}], max_completion_tokens=max_tokens)
        answer = without_thought(written)
        if is_cut and not answer:
            raise InputError(
                f"{self._label} thinks for more than the {max_tokens} tokens of an answer: take a model that answers"
                " without a thought before it"
            )
        return whole_sentences(answer) if is_cut else answer

    def _complete(self, messages: list[Any], **settings: Any) -> tuple[str, bool]:
        """Return the reply to a chat, and whether it was cut off at its limit of tokens."""
        import openai

        try:
            completion = self._client.chat.completions.create(model=self.name, messages=messages, **settings)
        except (openai.OpenAIError, ValueError) as error:  # ValueError: a body that is no JSON
            failure = self._failure(error)
        else:
            try:
                choice = completion.choices[0]
                return choice.message.content or "", choice.finish_reason == "length"
            except (AttributeError, IndexError, TypeError):
                failure = EndpointError(f"{self._label} answers with something that is no chat completion")
        raise failure  # without the client's error, whose request has the key

    def _failure(self, error: OpenAIError | ValueError) -> Exception:
        import openai

        if isinstance(error, (openai.AuthenticationError, openai.PermissionDeniedError)):
            return InputError(
                f"{self._label} refuses the request (status {error.status_code}): set {self._variable} to a key that"
                " may use this model"
            )
        if isinstance(error, openai.NotFoundError):
            return InputError(
                f"{self._label} does not exist (status 404): check the model's name, and that the URL is the part"
                " before /chat/completions"
            )
        if isinstance(error, openai.RateLimitError) and error.code == "insufficient_quota":
            return InputError(f"{self._label} has no quota left for this key: the same with --resume goes on later")
        if isinstance(error, openai.APITimeoutError):
            return EndpointError(f"{self._label} gives no answer within {self.timeout:g} s, {RETRIES + 1} times")
        reason = first_line(error.__cause__ or error)
        reason = reason.replace(self._key, "...") if self._key else reason
        if isinstance(error, openai.APIConnectionError):
            return InputError(f"{self._label} cannot be reached ({reason[:200]}): start it, or give another URL")
        return EndpointError(f"{self._label} gives no answer: {reason[:300]}")


class LocalVLM(VLM):
    """A VLM of one of the Teachers' families.

    source: directory or hub id. weights: fingerprint of the model.
    """

    def __init__(self, source: str, teacher: Teacher, weights: str) -> None:
        self.name, self.teacher, self.weights = f"{LOCAL}{source}", teacher, weights

    def described(self) -> dict[str, Any]:
        return {"model": self.name, "weights": self.weights}

    def ask(self, system: str, content: Sequence[Part]) -> str:
        images = [part for part in content if not isinstance(part, str)]
        try:
            return self.teacher.answer("\n".join(_texts(system, content)), images, LOCAL_TOKENS)
        except InputError as error:  # this request is too long for the model
            raise EndpointError(f"{self.name}: {error}") from error

    def answer(self, text: str, images: Sequence[ImageInput] = (), max_tokens: int = ANSWER_TOKENS) -> str:
        return self.teacher.answer(text, images, max_tokens)


def check_url(url: str, key: str) -> None:
    """Raise InputError for a URL that is none, or that holds a secret: URLs are written into results.

    key: the environment variable for secrets.
    """
    try:
        parts = urlsplit(url)
    except ValueError:  # an unfinished IPv6 address
        parts = urlsplit("")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise InputError(f"the URL of {parts.hostname} holds more than host and path: put a key into {key} instead")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError(f"{url!r} is no URL of an endpoint: give one like http://localhost:8000/v1")


def is_local(model: str) -> bool:
    """Whether a name is that of a VLM without an endpoint."""
    return model.startswith(LOCAL)


def check_vlm(model: str, url: str | None, flag: str, key: str) -> None:
    """Raise InputError for a model without a URL, a local one with a URL or without free text; MissingExtra.

    flag: the one that gives the model; that of the URL has the same name and ``-url``.
    """
    if not is_local(model):
        if url is None:
            raise InputError(
                f"{flag} {model} needs {flag}-url URL, its endpoint; {flag} {LOCAL}DIR loads a VLM instead"
            )
        check_url(url, key)
        _import_client()
        return
    if url is not None:
        raise InputError(f"{flag} {model} is no model of an endpoint: leave out {flag}-url {url}")
    source = model.removeprefix(LOCAL)
    check_free_text(read_style(source), f"{flag} {model}", "take an instruction-tuned VLM")


def same_model(model: str, source: str) -> bool:
    """Whether a VLM is, by its name or place, the model of this directory or hub id."""
    name = model.removeprefix(LOCAL)
    return name == source or (is_local(model) and os.path.realpath(name) == os.path.realpath(source))


@lru_cache(maxsize=4)
def find_vlm(model: str, url: str | None, key: str, label: str, timeout: float = TIMEOUT) -> VLM:
    """Return a VLM, once for each process: the model of this name behind `url`, or the one of ``local:SOURCE``.

    A local one is on the GPU in bfloat16 where there is a GPU, on the CPU in float32 elsewhere.
    """
    if is_local(model):
        source = model.removeprefix(LOCAL)
        devices = find_devices(None)
        teacher: Any = load_teacher(source, find_dtype(devices)).to(devices["teacher"])
        return LocalVLM(source, teacher, fingerprint({"vlm": teacher.model}))
    assert url is not None
    return RemoteVLM(model, url, key, label, timeout)


def without_thought(text: str) -> str:
    """Return what follows the thoughts of a reply; nothing where it ends inside one."""
    tags = list(THOUGHT.finditer(text))
    if not tags:
        return text.strip()
    return text[tags[-1].end() :].strip() if tags[-1]["closes"] else ""


def jpeg_url(image: Image.Image) -> str:
    """Return an RGB image as a data URL."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return data_url("image/jpeg", buffer.getvalue())


def _part(part: Part) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    return {"type": "image_url", "image_url": {"url": jpeg_url(part)}}


def _texts(system: str, content: Sequence[Part]) -> Iterable[str]:
    """Yield the texts of a request whose images stand before them all, with a mark in the place of each image."""
    yield system
    number = 0
    for part in content:
        if isinstance(part, str):
            yield part
        else:
            number += 1
            yield f"[image {number}]"


def _import_client() -> type[OpenAI]:
    try:
        from openai import OpenAI
    except ImportError as error:
        raise MissingExtra("a VLM behind a URL needs the package openai: pip install 'vlmteacher[judge]'") from error
    return OpenAI


def _client(url: str, key: str, timeout: float) -> OpenAI:
    # A placeholder where there is no key: without one the client would take OPENAI_API_KEY, which is for another host.
    client = _import_client()(base_url=url, api_key=key or "none", timeout=timeout, max_retries=RETRIES)
    client.organization = client.project = None  # taken from the environment too
    return client
