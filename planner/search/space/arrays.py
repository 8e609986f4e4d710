"""Names for the arrays of the search. numpy does not tell them apart, so signatures do."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
Indices = NDArray[np.int64]  # rows of some table

Sizes = NDArray[np.int64]  # GPUs of pools, [n, P]; 0 where a family has fewer than P pools
Families = NDArray[np.int64]  # places in the list of families that a search looks at
Kinds = NDArray[np.int64]  # places in the list of the cluster's kinds of GPU
Pools = NDArray[np.int64]  # places in the list of pools that differ in their tables
SizeStepNumbers = NDArray[np.int64]  # see `SizeSteps`
Levels = NDArray[np.int64]  # of memory: see `level_of`
