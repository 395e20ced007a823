"""The house keeps its order: no circles of files, arrows one way, functions and files of a readable length."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = [  # an arrow points down or stays in its row; docs/internals/architecture.md draws them
    ("cli", "app", "__main__"),
    ("evaluation", "environment"),
    ("baselines",),
    ("distillation",),
    ("pipeline",),
    ("session", "first_video", "output", "call_forms"),
    ("instance", "frozen_models", "runs", "planning", "warm_starts"),
    ("optimization",),
    ("reasoners", "teachers", "decoders", "lora", "rewards"),
    ("microworld", "checkpoints"),
    ("ops",),
    (  # the ground: used by all
        *(
            "settings",
            "queries",
            "media",
            "prompts",
            "chat_templates",
            "state",
            "placement",
            "torch_modes",
            "interruption",
            "exclusive",
            "ranks",
            "progress",
            "trackers",
        ),
        *("arguments", "files", "quiet", "errors", "moved", "version"),
    ),
]
LEVELS = {room: len(ROOMS) - level for level, rooms in enumerate(ROOMS) for room in rooms}
OUTSIDE = ("recipes", "tools", "benchmarks", "integrations")
UPWARD_ARROWS, FUNCTION_LINES, FILE_LINES, CALL_LINES = 3, 80, 450, 60


def modules() -> dict[str, Path]:
    """Every module of the package and outside of it by its name, but for the Triton kernels, a package of their own."""
    paths = [path for folder in ("vlmteacher", *OUTSIDE) for path in ROOT.glob(f"{folder}/**/*.py")]
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths}
    return {name: path for path, name in names.items() if "kernels" not in path.parts}


def imports() -> dict[str, set[str]]:
    """Which modules each module imports, lazily and for typing too."""
    files, graph = modules(), defaultdict(set)
    for module, path in files.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                graph[module] |= {name if name in files else node.module for name in names} & files.keys()
            elif isinstance(node, ast.Import):
                graph[module] |= {alias.name for alias in node.names} & files.keys()
    return {module: graph[module] - {module} for module in files}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The sets of modules that reach each other (Tarjan's strongly connected components of more than one)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    components: list[list[str]] = []

    def visit(module: str) -> None:
        order[module] = low[module] = len(order)
        stack.append(module)
        for other in graph[module]:
            if other not in order:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], order[other])
        if low[module] == order[module]:
            component = stack[stack.index(module) :]
            del stack[-len(component) :]
            if len(component) > 1:
                components.append(sorted(component))

    for module in graph:
        if module not in order:
            visit(module)
    return components


def room(module: str) -> str:
    """The room of a module of the package: its folder, or its file at the top."""
    package, *rest = module.split(".")
    if package != "vlmteacher" or not rest:
        return ""
    return rest[-1] if rest[-1] == "__main__" else rest[0]


def upward_arrows() -> list[str]:
    """Imports of a module by one of a lower room, of a Reasoner by a Teacher, and of what is outside the package."""
    return [
        f"{module} -> {other}"
        for module, others in imports().items()
        for other in sorted(others)
        if (room(module) and LEVELS[room(module)] < LEVELS.get(room(other), 0))
        or (room(module), room(other)) == ("teachers", "reasoners")
        or (module.startswith("vlmteacher") and other.startswith(OUTSIDE))
    ]


def functions() -> list[tuple[int, str]]:
    """The length in lines of every function, docstring and decorators included, with its place."""
    lengths = []
    for folder in ("vlmteacher", "kernels", *OUTSIDE):
        for path in ROOT.glob(f"{folder}/**/*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    lengths.append((node.end_lineno - node.lineno + 1, f"{path.relative_to(ROOT)}: {node.name}"))
    return sorted(lengths, reverse=True)


def files() -> list[tuple[int, str]]:
    """The length in lines of every source file."""
    folders = ("vlmteacher", "kernels", *OUTSIDE)
    paths = [path for folder in folders for path in ROOT.glob(f"{folder}/**/*.py")]
    return sorted(((len(path.read_text().splitlines()), str(path.relative_to(ROOT))) for path in paths), reverse=True)


def test_the_measure_sees_a_circle() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


def test_every_module_has_a_room() -> None:
    assert {room(module) for module in modules()} - {"", *LEVELS} == set()


def test_no_circles_of_files() -> None:
    assert circles(imports()) == []


def test_arrows_point_one_way() -> None:
    arrows = upward_arrows()
    assert len(arrows) <= UPWARD_ARROWS, arrows


def test_length_of_functions() -> None:
    assert [row for row in functions() if row[0] > FUNCTION_LINES] == []


def test_length_of_files() -> None:
    assert [row for row in files() if row[0] > FILE_LINES] == []


def test_length_of_algorithm_1() -> None:
    (length,) = (length for length, place in functions() if place == "vlmteacher/pipeline.py: __call__")
    assert length <= CALL_LINES


def main() -> None:
    """Print what the tests would say."""
    for circle in circles(imports()):
        print("circle:", ", ".join(circle))
    for arrow in upward_arrows():
        print("upward:", arrow)
    for length, place in (row for row in functions() if row[0] > FUNCTION_LINES):
        print(f"function of {length} lines: {place}")
    for length, place in (row for row in files() if row[0] > FILE_LINES):
        print(f"file of {length} lines: {place}")


if __name__ == "__main__":
    main()
