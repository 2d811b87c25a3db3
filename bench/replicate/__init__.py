# SPDX-License-Identifier: Apache-2.0
"""The papers' numbers, published and measured here: `python -m bench replicate`."""
