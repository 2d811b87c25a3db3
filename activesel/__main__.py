# SPDX-License-Identifier: Apache-2.0
"""`python -m activesel <command>`; `--help` lists the commands."""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from typing import Any

from activesel import doctor, ops


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m activesel", description=sys.modules["activesel"].__doc__
    )
    commands = parser.add_subparsers(dest="command", required=True)
    what = "which backend takes what here, why, and whether it is right"
    example = (
        "on every node of a cluster: python -m activesel doctor --require cuda --require triton"
    )
    add = commands.add_parser("doctor", help=what, description=what, epilog=example).add_argument
    add("--json", action="store_true", help="one JSON object on one line, and nothing else")
    say = "exit with 1 where it cannot do its stages (cuda, triton: on every GPU, at least one)"
    add("--require", action="append", default=[], choices=tuple(ops.KERNELS), help=say)
    what = "score a data set once with a reference; goes on where it was interrupted"
    add = commands.add_parser("cache", help=what, description=what).add_argument
    add("--model", required=True, help="file written by activesel.models.save")
    add("--data", required=True, metavar="MODULE:FUNCTION", help="returns the batches")
    add("--out", required=True, metavar="FOLDER")
    add("--kind", choices=("loss", "embeddings"), default="loss")
    add("--loss", choices=("softmax", "sigmoid"), default="softmax")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="of embeddings")
    add("--preprocessing", default="", metavar="TEXT", help="whatever else scores depend on")
    add("--batch", type=int, default=1024, help="rows scored at a time (%(default)s)")
    add("--shard-rows", type=int, default=1 << 18, help="rows of a file (%(default)s)")
    add("--device", default="cpu")
    add("--overwrite", action="store_true", help="remove the cache that is there")
    what = "one HTML page about runs, or about result files of the bench; works offline"
    page = commands.add_parser("report", help=what, description=what)
    page.add_argument("paths", nargs="+", metavar="RUN.json", help="of one data set")
    page.add_argument("-o", "--out", default="report.html", metavar="PAGE", help="(%(default)s)")
    given = parser.parse_args(argv)
    if given.command == "doctor":
        return 0 if doctor.report(given.json, given.require) else 1
    if given.command == "report":
        return _report(page, given.paths, given.out)
    return _cache(parser, **{k: v for k, v in vars(given).items() if k != "command"})


def _cache(
    parser: argparse.ArgumentParser, model: str, data: str, out: str, device: str, **how: Any
) -> int:
    import torch

    from activesel import cache, models

    logging.basicConfig(format="%(message)s", level=logging.INFO)
    module, _, function = data.partition(":")
    try:
        batches = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        parser.error(f"--data must be MODULE:FUNCTION, got {data!r}: {error}")
    how["dtype"] = how["dtype"] and getattr(torch, how["dtype"])
    kind = models.ViT if how["kind"] == "loss" else models.DualEncoder
    try:
        scorer = models.load(model, device, kind=kind)
        made = cache.write_cache(out, scorer, batches(), **how)
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        parser.error(str(error))
    print(f"{out}: {made.kind} of {len(made)} rows")
    return 0


def _report(parser: argparse.ArgumentParser, paths: list[str], out: str) -> int:
    from activesel.loop.report import report

    try:
        print(report(paths, out))
    except (ValueError, RuntimeError, OSError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
