"""The hub through its real client, against a server on the loopback interface."""

import os
import socket

import huggingface_hub.constants
import numpy as np
import pytest

from audiozoo.errors import SourceError
from audiozoo.hub import resolve
from weights_conversion.readers import open_tensors, write_safetensors

from .hub_server import HubServer

NAME = "zoo/tiny"


@pytest.fixture(autouse=True)
def _online(monkeypatch):
    """The other tests run offline; this one's network is its own server. No proxy, no token, no long waits."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@pytest.fixture
def weights(tmp_path):
    (path,) = write_safetensors(tmp_path / "made", [("w", np.arange(50_000, dtype=np.float32))])
    return path.read_bytes()


@pytest.fixture
def hub(weights):
    files = {
        "config.json": b'{"architectures": ["Tiny"]}',
        "tokenizer.json": b"{}",
        "vocab.txt": b"a\nb\n",
        "README.md": b"# tiny",
        "model.safetensors": weights,
        "pytorch_model.bin": b"pickle" * 1000,
        "pytorch_model.bin.index.json": b"{}",
        "onnx/config.json": b"{}",
        "flax_model.msgpack": b"flax" * 1000,
        "tf_model.h5": b"tf" * 1000,
        "onnx/model.onnx": b"onnx" * 1000,
        "model.fp16.safetensors": b"variant",
    }
    with HubServer({NAME: files}) as server:
        yield server


@pytest.fixture
def get(hub, tmp_path):
    def get(name=NAME, **options):
        return resolve(name, endpoint=hub.endpoint, cache_dir=tmp_path / "cache", **options)

    return get


def visible(directory):
    """Files in the cache that a reader could take for complete."""
    return [
        file
        for file in directory.rglob("*")
        if file.is_file() and ".incomplete" not in file.name and "snapshots" in file.parts
    ]


@pytest.fixture
def offline(monkeypatch):
    return lambda: monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def test_a_path_is_itself(tmp_path, monkeypatch):
    assert resolve(tmp_path) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    assert resolve(f"~/{tmp_path.name}") == tmp_path
    with pytest.raises(SourceError, match="does not exist"):
        resolve(tmp_path / "nothing" / "here")
    for name in ("not a name at all!", "zoo/tiny.git", "zoo/tiny/model.safetensors", 300 * "x"):
        with pytest.raises(SourceError, match="does not exist"):
            resolve(name)


def test_download_takes_one_copy_of_the_weights(hub, get):
    path = get()
    assert sorted(os.listdir(path)) == ["config.json", "model.safetensors", "tokenizer.json", "vocab.txt"]
    assert sorted(hub.downloads()) == ["config.json", "model.safetensors", "tokenizer.json", "vocab.txt"]
    assert open_tensors(path).read("w")[-1] == 49_999


@pytest.mark.parametrize(
    ("files", "taken"),
    [
        (("pytorch_model.bin", "model.bin", "model.onnx"), ["pytorch_model.bin"]),
        (("voice.onnx", "voice.th", "voice.pt"), ["voice.pt", "voice.th"]),
        (("voice.pth", "voice.safetensors"), ["voice.safetensors"]),
        (("a.pth", "a.model", "a.yaml", "a.tiktoken", "a.py"), ["a.model", "a.pth", "a.tiktoken", "a.yaml"]),
        (
            ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"),
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"],
        ),
        (
            ("pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json", "flax_model.msgpack"),
            ["pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"],
        ),
        (("model.bin", "vocabulary.txt"), ["model.bin", "vocabulary.txt"]),
        (("voice.onnx", "voice.onnx.json"), ["voice.onnx", "voice.onnx.json"]),
        (("params/_METADATA", "params/d/0", "config.json"), ["0", "_METADATA", "config.json"]),
    ],
)
def test_which_files_are_taken(hub, get, offline, files, taken):
    hub.repositories[NAME] = {file: file.encode() for file in files}
    path = get()
    assert sorted(hub.downloads()) == taken
    offline()
    assert get() == path


def test_second_call_downloads_nothing(hub, get):
    first = get()
    hub.requests.clear()
    assert get() == first
    assert hub.downloads() == []


def test_patterns_and_then_the_rest(hub, get):
    path = get(patterns=("config.json", "tokenizer.json", "absent.json"))
    assert sorted(os.listdir(path)) == ["config.json", "tokenizer.json"]
    hub.requests.clear()
    assert sorted(os.listdir(get())) == ["config.json", "model.safetensors", "tokenizer.json", "vocab.txt"]
    assert sorted(hub.downloads()) == ["model.safetensors", "vocab.txt"]
    with pytest.raises(SourceError, match=r"zoo/tiny holds none of the files nothing\.json, \*\.flac\."):
        get(patterns=("nothing.json", "*.flac"))


def test_offline_with_and_without_the_cache(hub, get, offline, monkeypatch, tmp_path):
    path = get(revision="main")
    hub.requests.clear()
    offline()
    assert get() == path
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert resolve(NAME) == path
    assert get(patterns=("config.json",)) == path
    with pytest.raises(SourceError, match="zoo/other is not in the local cache, and HF_HUB_OFFLINE is set"):
        get("zoo/other")
    with pytest.raises(SourceError, match="at revision v9 is not in the local cache"):
        get(revision="v9")
    with pytest.raises(
        SourceError, match=r"In the local cache, zoo/tiny holds none of the files \*\.flac; and HF_HUB_OFFLINE is set"
    ):
        get(patterns=("*.flac",))
    assert hub.requests == []
    (path.parents[1] / "refs" / "main").write_text("")  # as where a disk was full
    with pytest.raises(SourceError, match="zoo/tiny is not in the local cache"):
        get()


def test_offline_with_half_a_snapshot(hub, get, offline):
    get(patterns=("config.json",))
    offline()
    with pytest.raises(
        SourceError, match=r"In the local cache, zoo/tiny holds no weights .*; and HF_HUB_OFFLINE is set"
    ):
        get()


def test_a_server_that_is_gone(hub, get, tmp_path):
    path = get()
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
    assert resolve(NAME, endpoint=endpoint, cache_dir=tmp_path / "cache") == path
    with pytest.raises(SourceError, match="zoo/other is not in the local cache, and the hub cannot be reached"):
        resolve("zoo/other", endpoint=endpoint, cache_dir=tmp_path / "cache")


def test_a_hub_that_refuses_a_token(hub, get, monkeypatch):
    """It is there and says what is wrong; a model without any need of the token is still found in the cache."""
    path = get()
    said = "Invalid credentials in Authorization header"
    monkeypatch.setattr(hub, "answer", lambda request, body: hub.fail(request, 401, "", said))
    assert get() == path
    with pytest.raises(SourceError, match=rf"and the hub answers 401 \({said}, the token in HF_TOKEN"):
        get("zoo/other")


def test_a_mistake_of_ours_is_not_put_on_the_connection(get, monkeypatch):
    monkeypatch.setattr("audiozoo.hub.snapshot_download", lambda *_, **__: {}["commit"])
    with pytest.raises(KeyError, match="commit"):
        get()


def test_a_cache_that_cannot_be_written(get, tmp_path):
    path = get()
    reference = tmp_path / "cache" / "models--zoo--tiny" / "refs" / "main"
    reference.unlink()
    reference.mkdir()  # where root, too, cannot write a file
    assert get() == path


def test_missing_gated_and_unknown_revisions(hub, get):
    for name in ("zoo/absent", "absent"):
        with pytest.raises(SourceError, match=f"{name} is neither a path nor a repository of the hub"):
            get(name)
    with pytest.raises(SourceError, match="zoo/tiny has no revision v9"):
        get(revision="v9")
    hub.repositories["zoo/empty"] = {"README.md": b""}
    with pytest.raises(SourceError, match=r"^zoo/empty holds no weights"):
        get("zoo/empty")
    hub.gated.add(NAME)
    with pytest.raises(SourceError, match="zoo/tiny is gated: accept its conditions"):
        get()


def test_revisions(hub, get, offline):
    hub.tags["v1"] = {**hub.repositories[NAME], "config.json": b'{"version": 1}'}
    old, new = get(revision="v1"), get()
    assert (old / "config.json").read_bytes() == b'{"version": 1}'
    assert old != new
    assert hub.downloads().count("model.safetensors") == 1  # the same content, stored once
    assert get(revision=HubServer.commit(hub.tags["v1"])) == old
    hub.repositories[NAME]["config.json"] = b"{}"  # the branch moves on
    newest = get()
    assert (newest / "config.json").read_bytes() == b"{}"
    offline()
    assert (get(revision="v1"), get(revision=old.name), get()) == (old, old, newest)
    assert sorted(os.listdir(old.parents[1] / "refs")) == ["main", "v1"]


def test_an_interrupted_download_is_resumed(hub, get, weights, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 4096)
    hub.cut, hub.cuts = {"model.safetensors": 60_000}, 1
    path = get()
    assert (path / "model.safetensors").read_bytes() == weights
    ranges = [r for method, p, r in hub.requests if method == "GET" and p.endswith("model.safetensors")]
    assert ranges[0] is None
    assert ranges[1] == f"bytes={60_000 // 4096 * 4096}-"  # the client keeps whole pieces


def test_a_download_that_never_ends_well(hub, get, tmp_path, weights):
    hub.cut, hub.cuts = {"model.safetensors": 10}, 1000
    with pytest.raises(SourceError, match="zoo/tiny could not be downloaded, try again") as caught:
        get()
    assert "\n" not in str(caught.value)
    assert not [file for file in visible(tmp_path / "cache") if file.name == "model.safetensors"]
    hub.cuts = 0
    assert (get() / "model.safetensors").read_bytes() == weights
