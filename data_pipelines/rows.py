"""Some rows of a stored array, chosen by an index and gathered when they are read."""

from typing import Any

import numpy as np


class Rows:
    """Rows of an array, in the order of an index; read like a NumPy array, never written.

    Every split of a data set is an index of this kind into one file. No pixel is copied until it
    is read.

    Attributes:
      shape: the shape of the selected rows together.
      dtype: that of the array.
      nbytes: the bytes of the selected rows.
    """

    def __init__(self, array: np.ndarray, index: np.ndarray):
        """Selects `array[index]`.

        Args:
          array: (n, …), may be memory-mapped.
          index: (m,) integers below n.
        """
        self._array, self._index = array, index
        self.shape = (len(index), *array.shape[1:])
        self.dtype = array.dtype
        self.nbytes = array.itemsize * int(np.prod(self.shape))

    def __len__(self) -> int:
        """Returns the number of rows."""
        return len(self._index)

    def __getitem__(self, key: Any) -> np.ndarray:
        """Gathers the rows that `key` selects.

        In a tuple, the first part selects rows, and the others, slices and integers, select within
        each row.
        """
        first, *rest = key if isinstance(key, tuple) else (key,)
        index = self._index[first]
        return self._array[index][(slice(None),) * np.ndim(index) + tuple(rest)]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Gathers all rows."""
        if copy is False:
            raise ValueError("the rows of an index cannot be read without a copy")
        return self._array[self._index].astype(dtype or self.dtype, copy=False)


Stored = np.ndarray | Rows
