# SPDX-License-Identifier: Apache-2.0
"""`python -m bench.gpu` is `python -m bench gpu`."""

from bench.gpu.command import main

if __name__ == "__main__":
    main()
