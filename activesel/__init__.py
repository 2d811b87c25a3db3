# SPDX-License-Identifier: Apache-2.0
"""Online data selection for training: score a super-batch, keep the rows worth training on."""

from activesel.operands import Forward, Head
from activesel.select import Selection, sample, score, select
from activesel.selector import Selector

__version__ = "0.1.0"
__all__ = ["Forward", "Head", "Selection", "Selector", "sample", "score", "select"]
