# SPDX-License-Identifier: Apache-2.0
"""`python -m bench kernels`: every operator beside its twin in torch, by pytest-benchmark."""

from bench.kernels.table import NAME as NAME
from bench.kernels.table import command as command
from bench.kernels.table import text as text
