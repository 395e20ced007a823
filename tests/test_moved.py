"""Import paths of earlier releases still work, and say the new one."""

import importlib
import sys

import pytest

from vlmteacher.moved import MOVED, MOVED_NAMES


@pytest.mark.parametrize("old", MOVED)
def test_module(old: str) -> None:
    sys.modules.pop(old, None)
    with pytest.warns(FutureWarning, match=f"{old} is now {MOVED[old]}"):
        module = importlib.import_module(old)
    assert module is importlib.import_module(MOVED[old])


@pytest.mark.parametrize("old", MOVED_NAMES)
def test_name(old: str) -> None:
    module, name = old.rsplit(".", 1)
    home, _, renamed = MOVED_NAMES[old].partition(":")
    with pytest.warns(FutureWarning, match=f"{old} is now {home}.{renamed or name}"):
        value = getattr(importlib.import_module(module), name)
    assert value is getattr(importlib.import_module(home), renamed or name)


def test_unknown_name() -> None:
    with pytest.raises(ImportError, match="no_such_name"):
        from vlmteacher.optimization import no_such_name  # noqa: F401
