# SPDX-License-Identifier: Apache-2.0
"""Options of `python -m pytest bench/kernels`."""


def pytest_addoption(parser):
    parser.addoption("--scale", default="smoke", choices=("smoke", "full", "gpu"), help="sizes")
