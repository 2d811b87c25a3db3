# SPDX-License-Identifier: Apache-2.0
"""Online data selection for training: score a super-batch, keep the rows worth training on."""

from activesel.cache import ReferenceCache, write_cache
from activesel.cache_files import fingerprint, row_id
from activesel.joint import joint_select
from activesel.operands import Forward, Head, Pairs
from activesel.select import Selection, sample, score, select
from activesel.selector import Selector

__version__ = "0.1.0"
__all__ = [
    "Forward",
    "Head",
    "Pairs",
    "ReferenceCache",
    "Selection",
    "Selector",
    "fingerprint",
    "joint_select",
    "row_id",
    "sample",
    "score",
    "select",
    "write_cache",
]
