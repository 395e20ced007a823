"""A sweep on Ray: learning rates compared on held-out scenes of the microworld, in actors of this machine or a cluster.

python examples/sweep_on_ray.py --lr 3e-4 6e-4 --limit 10 --out runs/sweep [--ray auto] [--resume]

The same command with --resume goes on where it was interrupted. `vlmteacher bench --ray` does the same for one setting.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from vlmteacher.evaluation.microworld import Bench
from vlmteacher.evaluation.models import Models
from vlmteacher.evaluation.sweep import run_method


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lr", type=float, nargs="+", default=[3e-4, 6e-4], help="learning rates (default: 3e-4 6e-4)")
    parser.add_argument("--steps", type=int, help="updates at most (default: the pair's)")
    parser.add_argument("--limit", type=int, default=10, help="scenes (default: 10)")
    parser.add_argument("--workers", type=int, help="actors (default: one per GPU, or per processor without GPUs)")
    parser.add_argument("--ray", default="", metavar="ADDRESS", help="of a cluster (default: one on this machine)")
    parser.add_argument("--resume", action="store_true", help="go on with the sweep in --out")
    parser.add_argument("--out", type=Path, required=True, help="folder to write, seen by all machines")
    arguments = parser.parse_args()

    steps = {} if arguments.steps is None else {"max_steps": arguments.steps}
    print("learning rate  success  score  updates  seconds")
    for rate in arguments.lr:
        # the validation split is there to choose settings; `id` and `ood` are there to test the choice, once
        bench = Bench(models=Models(settings=tuple({"learning_rate": rate, **steps}.items())))
        folder = arguments.out / f"lr-{rate:g}"
        resume = arguments.resume and folder.exists()
        results = run_method(
            "teacher", bench, ["validation"], arguments.limit, 1, folder, arguments.workers, resume, ray=arguments.ray
        )
        cells = results["success_rate"], results["score"], results["updates_mean"], results["seconds_mean"]
        print("{:13g}  {:7.2f}  {:5.3f}  {:7.1f}  {:7.1f}".format(rate, *cells))


if __name__ == "__main__":
    main()
