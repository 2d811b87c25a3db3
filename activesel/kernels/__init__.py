# SPDX-License-Identifier: Apache-2.0
"""Triton kernels, one operation per file: the jit functions and their launcher."""
