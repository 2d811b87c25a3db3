# SPDX-License-Identifier: Apache-2.0
"""`python -m bench <command>`; `--help` lists the commands."""

from __future__ import annotations

import tyro

from bench import classify, demo, readme, speed


def main() -> None:
    tyro.extras.subcommand_cli_from_dict(
        {
            "demo": demo.command,
            "classify": classify.command,
            "speed": speed.command,
            "readme": readme.command,
        }
    )


if __name__ == "__main__":
    main()
