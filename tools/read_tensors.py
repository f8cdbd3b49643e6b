"""Read the tensors of another project's file of weights, with nothing in it executed.

  from tools.read_tensors import read_tensors

A pickle is a program: what it names is imported, and what it names can be called. Files of weights
are pickles (.pkl) or hold one (.pth). Here such a program can name a few functions of ours and no
others, and it is refused where its result would take far more work than the file is long.
"""

import os
import pickle
import re
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the five modules

from model import WeightsError, check_archive, check_pickle


def make_array(data, kind, shape, order="C"):
    data = data.encode("latin1") if isinstance(data, str) else data  # a string of Python 2
    return np.frombuffer(data, kind.dtype).reshape(shape, order=order)


class PickledArray:
    """What a numpy array in a pickle becomes: `value`, made here and not by numpy's unpickling."""

    def __setstate__(self, state):
        _, shape, kind, fortran, data = state
        self.value = make_array(data, kind, shape, "F" if fortran else "C")


class PickledType:
    """What a numpy dtype in a pickle becomes: `dtype`, a type of number."""

    def __init__(self, code, *_):
        self.dtype = np.dtype(code if isinstance(code, str) else object)
        if self.dtype.kind not in "biufc":
            raise ValueError("it holds an array of something else than numbers")

    def __setstate__(self, state):
        self.dtype = self.dtype.newbyteorder(state[1])


class RestrictedUnpickler(pickle.Unpickler):
    """Reads arrays, numbers, strings and containers, and refuses every name but these few."""

    ALLOWED = {
        "numpy.core.multiarray._reconstruct": lambda *_: PickledArray(),
        "numpy.core.numeric._frombuffer": make_array,
        "numpy.core.multiarray.scalar": lambda kind, data: make_array(data, kind, ()),
        "numpy.ndarray": None,  # an argument of _reconstruct, never called
        "numpy.dtype": PickledType,
        "_codecs.encode": lambda text, encoding: text.encode("latin1"),
        "collections.OrderedDict": OrderedDict,
    }

    def find_class(self, module, name):
        full = f"{module}.{name}".replace("numpy._core.", "numpy.core.")
        if full not in self.ALLOWED:
            raise ValueError(f"it names {module}.{name}, which no weights need")
        return self.ALLOWED[full]


def unpickle(file):
    """What an open .pkl or .pth file holds, in bounded work."""
    if zipfile.is_zipfile(file):  # torch's format: a pickle, and the numbers beside it
        check_archive(file)
    else:
        file.seek(0)
        check_pickle(file)
        end = file.tell()
        file.seek(0)
        content = RestrictedUnpickler(file, encoding="latin1").load()
        if not isinstance(content, int):
            return content
        file.seek(end)  # torch's older format: a number, four more pickles, the numbers
        for _ in range(4):
            check_pickle(file)
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=True)


def tensors_in(content, size):
    """The tensors by name in what a file of `size` bytes held."""
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, not tensors")
    if {"config", "weights"} <= content.keys():
        raise ValueError("it is a checkpoint of this project, which needs no conversion")
    for key in ("model", "blobs"):
        if isinstance(content.get(key), dict):
            content = content[key]
    arrays = {str(name): getattr(value, "value", value) for name, value in content.items()}
    arrays = {n: v for n, v in arrays.items() if isinstance(v, np.ndarray | torch.Tensor)}
    if sum(array.nbytes for array in arrays.values()) > 2 * size:  # views of a few numbers
        raise ValueError("it has more numbers than bytes")
    for name, array in arrays.items():
        if isinstance(array, np.ndarray):
            arrays[name] = torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
    return arrays


def read_tensors(path):
    """The tensors of a .pkl or .pth file by their names there: those of its state dict.

    Raises WeightsError, in one sentence, for whatever else the file may hold.
    """
    try:
        with open(path, "rb") as file:
            return tensors_in(unpickle(file), os.path.getsize(path))
    except OSError as error:
        reason = error.strerror
    except Exception as error:  # whatever a truncated, foreign or malicious file brings about
        reason = f"{error}".partition("\n")[0][:200].rstrip(".") or type(error).__name__
        named = re.search(r"GLOBAL (\S+)", f"{error}")
        if named:  # torch's own message goes on to say how to execute it all the same
            reason = f"it names {named[1]}, which no weights need"
    raise WeightsError(f"{path} cannot be read as weights: {reason}.")
