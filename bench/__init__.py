# SPDX-License-Identifier: Apache-2.0
"""Measurements: what selection gains, and what it costs."""
