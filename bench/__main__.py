# SPDX-License-Identifier: Apache-2.0
"""`python -m bench <command>`; `--help` lists the commands."""

from __future__ import annotations

import os
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
        kernels,
        ledger,
        pairs,
        pareto,
        peers,
        readme,
        resources,
        scorer_agreement,
        scorer_text,
        speed,
    )
    from bench.replicate import command as replicate

    commands = {
        "demo": demo.command,
        "demo-pairs": demo_pairs.command,
        "ledger": ledger.command,
        "replicate": replicate.command,
        "pareto": pareto.command,
        "peers": peers.command,
        "kernels": kernels.command,
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
    try:
        tyro.extras.subcommand_cli_from_dict(commands)
    except (ValueError, FileNotFoundError) as error:  # says what was expected, and what came
        if os.environ.get("ACTIVESEL_TRACEBACK"):
            raise
        sys.exit(f"error: {error}\n(ACTIVESEL_TRACEBACK=1 shows where)")


if __name__ == "__main__":
    main()
