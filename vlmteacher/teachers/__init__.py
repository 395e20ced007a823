"""Teachers: frozen vision-language models that ask the questions and judge the frames. One file per model family."""

from vlmteacher.teachers.base import Teacher, load_teacher

__all__ = ["Teacher", "load_teacher"]
