# SPDX-License-Identifier: Apache-2.0
"""`python -m activesel <command>`; `--help` lists the commands."""

from __future__ import annotations

import argparse
import sys

from activesel import doctor


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m activesel", description=sys.modules["activesel"].__doc__
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "doctor", help="which backend takes what here, why, and whether it is right"
    )
    parser.parse_args(argv)
    return 0 if doctor.report() else 1


if __name__ == "__main__":
    sys.exit(main())
