"""Whether two checkouts of the project give the same results, to the bit.

    python -m tests.equal_results OLD NEW [--only NAME]...

OLD and NEW are checkouts with the extension built. Each case of `CASES` runs in both, on one thread, and the files that
it leaves are compared: JSON without what a clock or a path says, all else by its bytes. Exit status 1: some differ.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PICTURE = "from vlmteacher.microworld.world import instance, render; from PIL import Image; import sys;\
 frame = render(instance(5, 3)[0])[0]; Image.fromarray((frame * 255).round().astype('uint8')).save(sys.argv[1])"
INSTANCE = ["solve", "--image", "{out}/first.png", "--prompt", "Move the red ball into the blue box.", "--seed", "3"]
REMEDIES = ["--preserve", "--frame-jitter", "1", "--pull", "0.1", "--final-samples", "2", "--keep", "best"]
BENCH = ["bench", "microworld", "--seed", "3", "--workers", "1", "--out", "{out}/sweep"]
CASES = {
    "demo": [["demo", "--out", "{out}/run"]],
    "remedies": [
        [*INSTANCE, "--max-steps", "3", "--out", "{out}/run", *REMEDIES],
    ],
    "target": [
        [*INSTANCE, "--max-steps", "2", "--out", "{out}/run", "--target", "last_step", "--lora-blocks", "last:1"]
    ],
    "resume": [
        [*INSTANCE, "--max-steps", "2", "--out", "{out}/run"],
        [*INSTANCE, "--max-steps", "4", "--out", "{out}/run", "--resume"],
        ["lora", "convert", "{out}/run/lora.safetensors", "--to", "comfyui", "-o", "{out}/comfyui.safetensors"],
    ],
    "teacher": [[*BENCH, "--method", "teacher", "--limit", "6"]],
    "pass": [[*BENCH, "--method", "pass@5", "--split", "ood", "--limit", "4"]],
    "goal-only": [[*BENCH, "--method", "goal-only", "--limit", "2"]],
    "export": [["microworld", "export", "--out", "{out}/data", "--count", "20", "--flawed"]],
    "plan": [["plan", "--json", "--reasoner", "packaged", "--teacher", "packaged"]],
}
CLOCK = re.compile(r"seconds|time|version|per_instance|s_per|wall|date|path|out$|threads|memory")


def plain(value: Any, root: str) -> Any:
    """JSON without the entries that a clock, a version or a path makes."""
    if isinstance(value, dict):
        return {name: plain(each, root) for name, each in value.items() if not CLOCK.search(name)}
    if isinstance(value, list):
        return [plain(each, root) for each in value]
    return value.replace(root, "") if isinstance(value, str) else value


def digests(directory: Path, tree: Path) -> dict[str, str]:
    """A hash of every result under `directory`, by its name there."""
    result = {}
    for path in sorted(directory.rglob("*")):
        if not path.is_file() or path.suffix == ".html" or path.name in ("README.md", "state.pt"):
            continue  # pages repeat what run.json says, with its seconds
        content = path.read_bytes()
        if path.suffix == ".json":
            content = json.dumps(plain(json.loads(content), str(tree)), sort_keys=True).encode()
        elif path.suffix == ".jsonl":
            rows = [plain(json.loads(line), str(tree)) for line in content.splitlines()]
            content = json.dumps(rows, sort_keys=True).encode()
        result[str(path.relative_to(directory))] = hashlib.sha256(content).hexdigest()[:16]
    return result


def results(tree: Path, commands: list[list[str]]) -> dict[str, str]:
    """The digests of what the commands leave, with the package of `tree`. Raises SystemExit when one fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tree), "PYTHONWARNINGS": "ignore"}
    with tempfile.TemporaryDirectory() as out:
        subprocess.run([sys.executable, "-c", PICTURE, f"{out}/first.png"], cwd=out, env=environment, check=True)
        for number, command in enumerate(commands):
            line = [sys.executable, "-m", "vlmteacher", *(word.replace("{out}", out) for word in command)]
            done = subprocess.run(line, cwd=out, env=environment, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{tree}: {' '.join(command)}: exit status {done.returncode}\n{done.stderr}")
            if "--json" in command:
                Path(out, f"{number}.json").write_text(done.stdout)
        return digests(Path(out), tree)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--only", action="append", choices=CASES, metavar="NAME", help="; may be given several times")
    arguments = parser.parse_args()
    different = 0
    for name in arguments.only or CASES:
        old, new = (results(tree.resolve(), CASES[name]) for tree in (arguments.old, arguments.new))
        wrong = [file for file in old | new if old.get(file) != new.get(file)]
        different += len(wrong)
        print(f"{name:<10} {len(old)} files, {', '.join(wrong) + ' differ' if wrong else 'equal'}", flush=True)
    sys.exit(different > 0)


if __name__ == "__main__":
    main()
