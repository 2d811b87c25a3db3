# SPDX-License-Identifier: Apache-2.0
"""`python -m bench <command>`; `--help` lists the commands."""

from __future__ import annotations

import sys


def main() -> None:
    if sys.argv[1:2] == ["gpu"]:  # before tyro, which a GPU machine may lack
        from bench.gpu.command import main as gpu

        gpu(sys.argv[2:])  # exits
    import tyro

    from bench import (
        agreement,
        classify,
        demo,
        demo_pairs,
        joint,
        pairs,
        readme,
        resources,
        scorer_agreement,
        scorer_text,
        speed,
    )

    tyro.extras.subcommand_cli_from_dict(
        {
            "demo": demo.command,
            "demo-pairs": demo_pairs.command,
            "classify": classify.command,
            "pairs": pairs.command,
            "speed": speed.command,
            "joint": joint.command,
            "agreement": agreement.command,
            "scorer-agreement": scorer_agreement.command,
            "scorer-cost": scorer_text.command,
            "resources": resources.command,
            "readme": readme.command,
        }
    )


if __name__ == "__main__":
    main()
