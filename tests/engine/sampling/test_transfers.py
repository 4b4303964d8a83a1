from __future__ import annotations

import numpy as np
import torch

from engine.sampling.transfers import Readback, upload


def test_arrays_of_all_shapes_and_dtypes_arrive_as_they_were():
    arrays = [
        np.arange(5, dtype=np.int64),
        np.empty((0, 2), np.int64),
        np.array([[1.5, -0.0, np.inf]], np.float32),
        np.arange(12, dtype=np.int32).reshape(3, 4)[:, ::2],  # not contiguous
        np.empty(0, np.float64),
        np.array([2.0**-1074], np.float64),
    ]
    found = upload(arrays, torch.device("cpu"))
    for array, tensor in zip(arrays, found, strict=True):
        assert tensor.numpy().dtype == array.dtype
        assert tensor.shape == array.shape
        assert tensor.numpy().tobytes() == array.tobytes()


def test_what_is_read_back_is_what_was_there_when_that_began():
    tensor = torch.arange(4)
    readback = Readback(tensor)
    tensor.zero_()
    assert readback.wait().tolist() == [0, 1, 2, 3]
