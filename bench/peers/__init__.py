# SPDX-License-Identifier: Apache-2.0
"""`python -m bench peers`: side by side with what a user would pick instead."""

from bench.peers.table import NAME as NAME
from bench.peers.table import command as command
from bench.peers.table import text as text
