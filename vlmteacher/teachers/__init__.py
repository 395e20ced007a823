"""Teachers: frozen vision-language models that write the questions and judge the frames. One file per family."""

from vlmteacher.teachers.base import Teacher, load_teacher

__all__ = ["Teacher", "load_teacher"]
