"""Files as `torch.save` writes them, without PyTorch: sound ones, and hostile ones that it would never write."""

import io
import pickle
import zipfile

import numpy as np


class Persistent:
    """A storage as `torch.save` refers to it."""

    def __init__(self, key="0", numel=4, kind="FloatStorage"):
        self.key, self.numel, self.kind = key, numel, kind


class Name:
    """A global name that the test's pickler writes without importing it."""

    def __init__(self, module, name):
        self.module, self.name = module, name


class Call:
    """`function(*arguments)` in a pickle."""

    def __init__(self, module, name, *arguments):
        self.name, self.arguments = Name(module, name), arguments


def assemble(value, protocol=2):
    """A pickle of plain values, `Call`s, `Name`s and `Persistent`s, written opcode by opcode."""
    out = io.BytesIO()

    def emit(item):
        if isinstance(item, Name):
            out.write(b"c" + f"{item.module}\n{item.name}\n".encode())
        elif isinstance(item, Call):
            emit(item.name)
            emit(tuple(item.arguments))
            out.write(b"R")
        elif isinstance(item, Persistent):
            emit(("storage", Name("torch", item.kind), item.key, "cpu", item.numel))
            out.write(b"Q")
        elif isinstance(item, tuple):
            out.write(b"(")
            for part in item:
                emit(part)
            out.write(b"t")
        elif isinstance(item, dict):
            out.write(b"}(")
            for key, part in item.items():
                emit(key)
                emit(part)
            out.write(b"u")
        else:
            out.write(
                pickle.dumps(item, 2)[2:-1].split(b"q\x00")[0] if isinstance(item, str) else pickle.dumps(item, 2)[2:-1]
            )

    out.write(bytes([0x80, protocol]))
    emit(value)
    out.write(b".")
    return out.getvalue()


def archive(path, data_pickle, storages=(), compression=zipfile.ZIP_STORED, extra=()):
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", data_pickle)
        for key, content in dict(storages).items():
            file.writestr(f"archive/data/{key}", content)
        for name, content in dict(extra).items():
            file.writestr(f"archive/{name}", content)
    return path


def rebuilt(storage=None, offset=0, shape=(2, 2), strides=(2, 1)):
    return Call("torch._utils", "_rebuild_tensor_v2", storage or Persistent(), offset, shape, strides, False, None)


def write_pt(path, tensors, root="", **beside):
    """A file of float32 arrays as `torch.save` writes it, without PyTorch; below `root`, with more `beside` it."""
    storages, dictionary = {}, {}
    for name, array in tensors.items():
        storage = Persistent(str(len(storages)), array.size)
        strides = tuple(stride // 4 for stride in np.empty(array.shape, np.float32).strides)
        dictionary[name] = rebuilt(storage, 0, array.shape, strides)
        storages[storage.key] = array.astype(np.float32).tobytes()
    return archive(path, assemble({root: dictionary, **beside} if root else dictionary), storages)
