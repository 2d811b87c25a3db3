# SPDX-License-Identifier: Apache-2.0
"""Reference training loops: data, training, evaluation, plots."""
