"""Run folders: names, encoders, states of other runs and models, two processes, more steps, signals."""

from __future__ import annotations

import io
import json
import os
import pickle
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import Run, Solve
from tests.tiny_pair import PROMPT, QUERIES
from tests.trust.forking import Forks
from tests.trust.report import count
from tests.trust.test_kills import same
from vlmteacher.errors import InputError, OutputError
from vlmteacher.files import LOCK, claimed, write_text
from vlmteacher.interruption import Interrupted, endings_interrupt, uninterrupted
from vlmteacher.media import write_video
from vlmteacher.pipeline import TeacherPipeline
from vlmteacher.queries import QuerySet
from vlmteacher.runs.folder import FILES, FORM, RECORD, STATE
from vlmteacher.state import write_state


def call(pipe: TeacherPipeline, **keywords: Any) -> Any:
    values: dict[str, Any] = {"queries": QuerySet.from_dict(QUERIES), "max_steps": 2, "rank": 2, "learning_rate": 0.03}
    values |= {"generator": torch.Generator().manual_seed(0), "teacher_frames": 4, "progress": False}
    return pipe(PROMPT, **values | keywords)


@pytest.fixture(scope="module")
def finished(pipe: TeacherPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    call(pipe, run_dir=folder)
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, to change."""
    folder = tmp_path / "run"
    folder.mkdir()
    for file in finished.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def no_step(*_: Any) -> None:
    pytest.fail("a step was made")


# ---------------------------------------------------------------- names


@pytest.mark.parametrize("name", ["12:30", "-y", "--out", "a\nline", "100%d", "c:d/e", "ein Läufer", "pipe:1", "'q\""])
def test_any_name_of_a_folder(
    pipe: TeacherPipeline, finished: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    call(pipe, run_dir=name)
    same(tmp_path / name, finished)


@pytest.mark.parametrize("name", [b"v\xff.mp4", b"a:b.mp4", b"-i.mp4", b"a\nb.mp4", b"%03d.mp4"])
def test_any_name_of_a_video(tmp_path: Path, name: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    import imageio.v3 as iio

    monkeypatch.chdir(tmp_path)
    frames = np.full((5, 16, 24, 3), 90, np.uint8)
    write_video(Path(os.fsdecode(name)), frames, 8)
    (file,) = (Path(os.fsdecode(each)) for each in os.listdir(os.fsencode(tmp_path)))
    assert os.fsencode(file) == name
    assert iio.imread(file.read_bytes(), extension=".mp4", plugin="FFMPEG").shape == frames.shape


def test_a_pipe_or_a_device_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    """Renaming a finished file over /dev/null would end it for every program."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OutputError, match="it is a device or a pipe, no file"):
        write_text(tmp_path / "pipe", "text")
    assert (tmp_path / "pipe").is_fifo() and os.listdir(tmp_path) == ["pipe"]


def test_a_name_that_is_no_text(run: Run, solve: Solve, tmp_path: Path) -> None:
    status, _, err = run(*solve(tmp_path / "a\udcffb"))
    assert status == 2 and len(err.splitlines()) == 1 and os.listdir(tmp_path) == []


# ---------------------------------------------------------------- the encoder


FAILING = {
    "says why": 'for last; do :; done; head -c 100 /dev/zero > "${last#file:}"; echo "no codec libx264" >&2; exit 1',
    "says nothing": 'for last; do :; done; head -c 100 /dev/zero > "${last#file:}"; exit 0',
    "crashes": "kill -SEGV $$",
    "loses frames": 'case "$*" in *-y*) exec REAL "${@:1:$(($#-1))}" -frames:v 3 "${@: -1}";; *) exec REAL "$@";; esac',
}


@pytest.mark.parametrize("how", [*FAILING, "is not there"])
def test_a_failing_encoder_keeps_the_rest(
    pipe: TeacherPipeline, finished: Path, tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from imageio_ffmpeg import get_ffmpeg_exe

    monkeypatch.chdir(tmp_path)
    encoder = tmp_path / "ffmpeg"
    if how in FAILING:
        encoder.write_text("#!/bin/bash\n" + FAILING[how].replace("REAL", get_ffmpeg_exe()) + "\n")
        encoder.chmod(0o755)
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setenv("IMAGEIO_FFMPEG_EXE", str(encoder))
        with pytest.raises(OutputError, match=r"before\.mp4 cannot be written \(") as raised:
            call(pipe, run_dir=folder)
    assert "\n" not in str(raised.value) and ("no codec libx264" in str(raised.value)) == (how == "says why")
    assert {file.name for file in folder.iterdir()} == {*FILES} - {"before.mp4", "after.mp4"}
    kept = {file.name: file.stat().st_ino for file in folder.iterdir() if file.name != "report.html"}  # it has videos
    assert (folder / "lora.safetensors").read_bytes() == (finished / "lora.safetensors").read_bytes()
    call(pipe, run_dir=folder, resume=True, callback_on_step_end=no_step)
    same(folder, finished)
    assert {name: (folder / name).stat().st_ino for name in kept} == kept  # only what was missing was written
    count("an encoder that fails", 1, "LoRA and the rest kept, resumed without a step")


@pytest.mark.parametrize("missing", [name for name in FILES if name not in (RECORD, STATE)])
def test_a_finished_run_gets_what_it_lacks(pipe: TeacherPipeline, copy: Path, finished: Path, missing: str) -> None:
    (copy / missing).unlink()
    call(pipe, run_dir=copy, resume=True, callback_on_step_end=no_step)
    same(copy, finished)


# ---------------------------------------------------------------- damaged and foreign states


class Code:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (os.environ["TRUST_CODE"],)


def damaged(state: bytes) -> dict[str, bytes]:
    content = torch.load(io.BytesIO(state), weights_only=True)

    def saved(value: object, **options: Any) -> bytes:
        torch.save(value, file := io.BytesIO(), **options)
        return file.getvalue()

    flipped = bytearray(state)
    at = state.index(next(iter(content["lora"].values())).numpy().tobytes()[:16])
    flipped[at] ^= 1
    return {
        "empty": b"",
        "zeros": bytes(len(state)),
        "cut off": state[: len(state) // 2],
        "without its end": state[:-1],
        "one bit flipped": bytes(flipped),
        "text": b"step 3\n" * 1000,
        "a pickle with code": pickle.dumps(Code()),
        "a torch file with code": saved(Code()),
        "an old torch file": saved(content, _use_new_zipfile_serialization=False),
        "another program's": saved({"model": torch.zeros(3), "epoch": 3}),
        "a tensor": saved(torch.zeros(3)),
        "of the version before": saved({name: value for name, value in content.items() if name not in ("form", "run")}),
        "of another version": saved(content | {"form": "vlmteacher run 999"}),
        "of another run": saved(content | {"run": "0" * 64}),
        "huge": saved(content | {"more": torch.zeros(2**25)}),
    }


def broken(content: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """States of this run and version whose tensors or history are others."""
    name, value = next(iter(content["lora"].items()))
    for what, tensor in {
        "a shape that broadcasts": value[:1],
        "another dtype": value.double(),
        "no tensor": 3,
    }.items():
        yield f"a LoRA of {what}", content | {"lora": content["lora"] | {name: tensor}}
    yield "a LoRA without a layer", content | {"lora": {k: v for k, v in content["lora"].items() if k != name}}
    optimizer = content["optimizer"]
    for entry, tensor in {"exp_avg": torch.zeros(1), "exp_avg_sq": torch.zeros(3, 3).double()}.items():
        moments = optimizer["state"] | {0: optimizer["state"][0] | {entry: tensor}}
        yield f"an optimizer of another {entry}", content | {"optimizer": optimizer | {"state": moments}}
    yield (
        "an optimizer without a parameter",
        content | {"optimizer": optimizer | {"state": {k: v for k, v in optimizer["state"].items() if k}}},
    )
    yield "no history", {k: v for k, v in content.items() if k != "history"}
    yield "a history that lacks a step", content | {"history": content["history"][1:]}
    yield "a history of text", content | {"history": "two"}
    yield "a best LoRA of another shape", content | {"best": (1.0, {name: value[:1]})}
    yield "a pull toward other latents", content | {"anchor": torch.zeros(1)}
    for entry in ("optimizer", "lora", "rungs", "stopped"):
        yield f"no {entry}", {k: v for k, v in content.items() if k != entry}


def test_a_state_that_cannot_be_gone_on_from(
    pipe: TeacherPipeline, copy: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRUST_CODE", str(tmp_path / "code"))
    state = copy / STATE
    content = torch.load(finished / STATE, weights_only=True)
    cases = {**damaged((finished / STATE).read_bytes()), "a directory": None}
    for what, value in broken({name: value for name, value in content.items() if name != "form"}):
        write_state(state, FORM, value)
        cases[what] = state.read_bytes()
    before = {name: (copy / name).read_bytes() for name in FILES if name != STATE}
    for what, data in cases.items():
        state.unlink()
        state.mkdir() if data is None else state.write_bytes(data)
        with pytest.raises(InputError, match="delete it to start again, or give another --out") as raised:
            call(pipe, run_dir=copy, resume=True, max_steps=4)
            pytest.fail(what)
        assert str(state) in str(raised.value) and "\n" not in str(raised.value), what
        assert {name: (copy / name).read_bytes() for name in before} == before, what
        if data is None:
            state.rmdir()
            state.touch()
    assert not (tmp_path / "code").exists()
    state.unlink()
    assert call(pipe, run_dir=copy, resume=True).lora == (finished / "lora.safetensors").read_bytes()
    count("a damaged or foreign state.pt", len(cases), "refused in one line with the remedy; no code run")


def test_a_record_that_cannot_be_read(pipe: TeacherPipeline, copy: Path) -> None:
    texts = ["", "{", "[]", "null", '{"config": {"seed": "0"}}', "[" * 100_000, '{"config": {"seed": 1}, "queries": 3}']
    for text in texts:
        (copy / RECORD).write_text(text)
        with pytest.raises(InputError, match=r"nothing to resume in .* give another --out") as raised:
            call(pipe, run_dir=copy, resume=True)
        assert "\n" not in str(raised.value)
    count("a damaged or foreign run.json", len(texts), "refused in one line with the remedy")


def test_models_that_changed_under_the_same_name(pipe: TeacherPipeline, copy: Path) -> None:
    networks = {"reasoner": pipe.reasoner.networks.values(), "teacher": [pipe.teacher.model], "decoder": [pipe.decoder]}
    tried = 0
    parameters = ((part, [*network.named_parameters()][:3]) for part, each in networks.items() for network in each)
    for part, (name, parameter) in ((part, item) for part, items in parameters for item in items):
        good = parameter.detach().clone()
        parameter.data.mul_(1.01).add_(0.001)
        with pytest.raises(InputError, match=rf"another fingerprints\.{part}"):
            call(pipe, run_dir=copy, resume=True)
            pytest.fail(name)
        parameter.data.copy_(good)
        tried += 1
    config = pipe.reasoner.vae.config
    pipe.reasoner.vae.register_to_config(latents_std=[2 * value for value in config.latents_std])
    with pytest.raises(InputError, match=r"another fingerprints\.reasoner"):
        call(pipe, run_dir=copy, resume=True)
    pipe.reasoner.vae.register_to_config(latents_std=config.latents_std)
    call(pipe, run_dir=copy, resume=True, callback_on_step_end=no_step)
    count("a model that changed under the same path", tried + 1, "refused by name")


# ---------------------------------------------------------------- one at a time


def test_a_folder_in_use_is_refused(forks: Forks, run: Run, solve: Solve, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with claimed(folder):
        for flags in ((), ("--resume",)):
            other = forks.run(solve(folder, *flags))
            assert other.status == 2 and "another process" in other.err and len(other.err.splitlines()) == 1
            status, _, err = run(*solve(folder, *flags))  # another thread would meet the same
            assert status == 2 and "another process" in err
        assert [file.name for file in folder.iterdir()] == [LOCK]
    assert not folder.exists()
    count("a second process in a run folder", 4, "refused at once")


def test_never_two_at_once(tmp_path: Path) -> None:
    inside, most, entered = [], [0], [0]

    def enter() -> None:
        for _ in range(50):
            try:
                with claimed(tmp_path / "a" / "folder"):
                    inside.append(1)
                    most[0] = max(most[0], len(inside))
                    entered[0] += 1
                    time.sleep(0.0005)
                    inside.pop()
            except InputError:
                pass

    threads = [threading.Thread(target=enter) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] and entered[0] > 8


def test_what_dead_processes_left_is_removed(pipe: TeacherPipeline, copy: Path, finished: Path) -> None:
    own = (".run.12.json", ".notes.1.txt", ".env.2024")  # the user's
    for name in (".state.77.partial.pt", f".after.{os.getpid()}.partial.mp4", LOCK, *own):
        (copy / name).write_text("half")
    call(pipe, run_dir=copy, resume=True)
    for name in own:
        (copy / name).unlink()
    same(copy, finished)


# ---------------------------------------------------------------- more steps


@pytest.fixture(scope="module")
def longer(pipe: TeacherPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run with four steps."""
    folder = tmp_path_factory.mktemp("longer") / "run"
    call(pipe, run_dir=folder, max_steps=4)
    return folder


def test_more_steps_go_on(pipe: TeacherPipeline, copy: Path, finished: Path, longer: Path) -> None:
    made: list[int] = []
    call(pipe, run_dir=copy, resume=True, max_steps=4, callback_on_step_end=lambda _, step, __: made.append(step))
    assert made == [2, 3]
    same(copy, longer)
    call(pipe, run_dir=copy, resume=True, max_steps=None, callback_on_step_end=no_step)  # those of last time
    same(copy, longer)
    with pytest.raises(InputError, match="holds 4 steps already: max_steps must be at least that"):
        call(pipe, run_dir=copy, resume=True, max_steps=3)
    same(copy, longer)


def test_fewer_steps_than_were_meant(pipe: TeacherPipeline, finished: Path, tmp_path: Path) -> None:
    def stop(_: Any, step: int, __: Any) -> None:
        if step == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call(pipe, run_dir=tmp_path, max_steps=9, callback_on_step_end=stop)
    call(pipe, run_dir=tmp_path, resume=True, callback_on_step_end=no_step)
    same(tmp_path, finished)


# ---------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_keeps_the_last_step(pipe: TeacherPipeline, longer: Path, tmp_path: Path, number: int) -> None:
    def stop(_: Any, step: int, __: Any) -> None:
        if step == 2:
            signal.raise_signal(number)

    with pytest.raises(KeyboardInterrupt) as raised, endings_interrupt():
        call(pipe, run_dir=tmp_path, max_steps=4, callback_on_step_end=stop)
    if number != signal.SIGINT:
        assert isinstance(raised.value, Interrupted) and raised.value.status == 128 + number
    for steps in (json.loads((tmp_path / RECORD).read_text())["steps"], torch.load(tmp_path / STATE)["history"]):
        assert len(steps) == 3
    made: list[int] = []
    call(pipe, run_dir=tmp_path, resume=True, max_steps=4, callback_on_step_end=lambda _, step, __: made.append(step))
    assert made == [3]
    same(tmp_path, longer)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_the_command_line(forks: Forks, solve: Solve, tmp_path: Path, number: int) -> None:
    folder = tmp_path / "run"
    again = signal.SIGTERM if number == signal.SIGHUP else signal.SIGHUP  # as a session that is closed sends both
    signals = [(0.0, number), (0.001, again), (0.002, again)]
    stopped = forks.run(solve(folder, max_steps=10_000), signals=signals, when=str(folder / STATE))
    assert stopped.status in (128 + number, 128 + again)  # Python handles those that wait in the order of their numbers
    assert stopped.err.splitlines()[-1].endswith("interrupted; the same with --resume goes on")
    assert "Traceback" not in stopped.err, stopped.err
    record = json.loads((folder / RECORD).read_text())
    assert record["stopped"] == "interrupted" and len(record["steps"]) == len(torch.load(folder / STATE)["history"])


def test_ignored_signals_stay_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with endings_interrupt():
            signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_an_interruption_that_a_library_takes_for_an_error_is_one() -> None:
    with pytest.raises(Interrupted) as raised, endings_interrupt():
        try:
            signal.raise_signal(signal.SIGTERM)
        except BaseException as error:
            raise InputError("a damaged file") from error
    assert raised.value.status == 143


def test_an_interruption_that_is_swallowed_ends_the_next_step(pipe: TeacherPipeline, tmp_path: Path) -> None:
    def swallow(_: Any, step: int, __: Any) -> None:
        if step == 1:
            with suppress(BaseException):
                signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted), endings_interrupt():
        call(pipe, run_dir=tmp_path, max_steps=4, callback_on_step_end=swallow)
    assert len(torch.load(tmp_path / STATE)["history"]) == 2


def test_what_must_be_whole_is_not_interrupted() -> None:
    done: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            done.append(1)
        done.append(2)
    assert done == [1] and signal.getsignal(signal.SIGINT) is signal.default_int_handler
