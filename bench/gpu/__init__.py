# SPDX-License-Identifier: Apache-2.0
"""Everything a GPU can say about this package, in one command of less than eight minutes.

command -> {cases, device} -> {baselines, timing}; smoke runs by itself, under the sanitizer.
Needs torch, triton, pytest and a compiler, and nothing else.
"""
