"""Data: every form is found, order and position are exact, and what is broken is named and passed over."""

import dataclasses
import io
import json
import tarfile

import numpy as np
import pytest
import soundfile

from audiozoo.errors import AudioError, SourceError, UsageError
from audiozoo.training.data import Batches, Padding, Whole, collate, find_items, labels_of

RATE = 8000


def tone(seconds, pitch=440.0):
    return (0.5 * np.sin(2 * np.pi * pitch * np.arange(round(seconds * RATE)) / RATE)).astype(np.float32)


@pytest.fixture
def folder(tmp_path):
    """Twelve tones of 0.2 to 1.3 s in two folders, each with its number as text."""
    for index in range(12):
        path = tmp_path / ("high" if index % 2 else "low") / f"{index:02}.wav"
        path.parent.mkdir(exist_ok=True)
        soundfile.write(path, tone(0.2 + 0.1 * index), RATE)
        path.with_suffix(".txt").write_text(f"tone {index}\n")
    return tmp_path


def prepare(waveform, fields, rng):
    return {
        "x": waveform,
        "number": np.asarray(int(fields["text"].split()[1])),
        "draw": rng.random(),
        "length": np.asarray(len(waveform)),
    }


def batches(items, **options):
    settings = {"batch_size": 3, "sampling_rate": RATE, "padding": {"x": Padding()}, "buckets": 3} | options
    return Batches(items, prepare, **settings)


# --- the forms of data -----------------------------------------------------------------------------------------------


def test_a_folder_has_texts_labels_and_fields(folder):
    (folder / "low" / "00.json").write_text('{"speaker": "a", "duration": 0.2, "caption": "a hum"}')
    (folder / "low" / "02.txt").unlink()
    (folder / "low" / "02.json").write_text('{"caption": "a hum"}')
    (folder / ".trash").mkdir()
    for name in ("low/._00.wav", "._shard.tar", "low/._a.trans.txt", ".trash/01.wav"):
        (folder / name).write_bytes(b"\xff")
    items = find_items(folder)
    assert len(items) == 12
    assert items[0].fields == {"label": "high", "text": "tone 1"}
    zero = next(item for item in items if item.name.endswith("00.wav"))
    assert zero.seconds == 0.2
    assert zero.fields["speaker"] == "a"
    texts = {item.name[-6:]: item.fields["text"] for item in items}
    assert (texts["00.wav"], texts["02.wav"]) == ("tone 0", "a hum")


def test_librispeech_texts(folder):
    (folder / "low" / "1-2.trans.txt").write_text("00 CHAPTER ONE\n02 TWO\n")
    fields = {item.name[-6:]: item.fields for item in find_items(folder)}
    assert fields["00.wav"]["text"] == "CHAPTER ONE"
    assert fields["04.wav"]["text"] == "tone 4"


def test_manifests(folder):
    rows = [
        {"audio": "low/00.wav", "sentence": "tone 0", "duration": 0.2, "speaker_embedding": "low.npy"},
        {"path": "high/01.wav", "label": 3},
    ]
    jsonl = folder / "set.jsonl"
    jsonl.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    items = find_items(jsonl)
    assert [item.audio for item in items] == [folder / "low/00.wav", folder / "high/01.wav"]
    assert (items[0].fields["text"], items[0].seconds, items[1].fields) == ("tone 0", 0.2, {"label": 3})
    assert items[0].fields["speaker_embedding"] == str(folder / "low.npy")
    rows[0]["sentence"] = "one\u2028line, \x85 still"  # separators that end no line of a file
    jsonl.write_bytes("\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode())
    assert [item.fields.get("text") for item in find_items(jsonl)] == [rows[0]["sentence"], None]
    jsonl.write_text("\n".join(json.dumps(rows[0] | {"sentence": number}) for number in (1995, 0)))
    assert [item.fields["text"] for item in find_items(jsonl)] == ["1995", "0"]
    tsv = folder / "set.tsv"
    (folder / "clips").mkdir()
    (folder / "clips" / "a.mp3").touch()
    head = "path\tsentence\tup_votes\taccent\toffset\n"  # as Common Voice's
    tsv.write_text(f'{head}a.mp3\t"a" it says\t2\t\t0\n')
    (item,) = find_items(tsv)
    assert item.audio == folder / "clips" / "a.mp3"
    assert item.fields == {"sentence": '"a" it says', "up_votes": "2", "offset": "0", "text": '"a" it says'}
    (folder / "a.mp3").touch()
    assert find_items(tsv)[0].audio == folder / "a.mp3"
    tsv.write_text(f"{head}a.mp3\ta\n\tb\n")
    with pytest.raises(UsageError, match=r"set\.tsv:3 names no recording"):
        find_items(tsv)
    tsv.write_text(f"{folder}\nlow/00.wav\t1600\nhigh/01.wav\t2400\n")
    tsv.with_suffix(".ltr").write_text("O N E | T W O |\nT H R E E |\n")
    tsv.with_suffix(".km").write_text("1 1 2\n3 4\n")
    items = find_items(tsv)
    assert [item.fields["text"] for item in items] == ["ONE TWO", "THREE"]
    assert items[0].fields["units"] == ["1", "1", "2"]
    assert [item.fields["samples"] for item in items] == [1600, 2400]
    tsv.with_suffix(".wrd").write_text("one two\nthree\n")  # words before their letters
    assert [item.fields["text"] for item in find_items(tsv)] == ["one two", "three"]
    tsv.with_suffix(".km").write_text("1\n")
    with pytest.raises(UsageError, match=r"set\.km has 1 lines for the 2"):
        find_items(tsv)


def test_tar_shards_are_read_in_place(folder):
    for shard in range(2):
        with tarfile.open(folder / f"s{shard}.tar", "w") as file:
            folder_of_that_name = tarfile.TarInfo("album.wav")
            folder_of_that_name.type = tarfile.DIRTYPE
            file.addfile(folder_of_that_name)
            file.addfile(tarfile.TarInfo("._00.wav"))
            file.addfile(tarfile.TarInfo("notes.txt"))  # of no recording
            for index in range(shard, 12, 2):
                sound = io.BytesIO()
                soundfile.write(sound, tone(0.2 + 0.1 * index), RATE, format="WAV")
                for suffix, content in (
                    ("wav", sound.getvalue()),
                    ("txt", f"tone {index}".encode()),
                    ("cls", b"tone"),
                    *([("json", b'{"caption": "a hum", "duration": 0.3}')] if index == 1 else []),
                ):
                    info = tarfile.TarInfo(f"{index:02}.{suffix}")
                    info.size = len(content)
                    file.addfile(info, io.BytesIO(content))
    items = find_items(f"{folder}/s*.tar")
    assert len(items) == 12
    assert items[0].fields == {"text": "tone 0", "label": "tone"}
    assert items[6].fields == {"text": "tone 1", "label": "tone", "caption": "a hum", "duration": 0.3}
    assert items[6].seconds == 0.3
    whole = {
        int(n): length for b in batches(items).evaluation() for n, length in zip(b["number"], b["length"], strict=True)
    }
    assert whole == {index: len(tone(0.2 + 0.1 * index)) for index in range(12)}


def test_what_is_no_data_gets_a_sentence(tmp_path):
    with pytest.raises(SourceError, match="There is no folder"):
        find_items(tmp_path / "nowhere")
    with pytest.raises(SourceError, match="holds no recording"):
        find_items(tmp_path)
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(UsageError, match="which are the forms"):
        find_items(tmp_path / "a.csv")
    (tmp_path / "a.tar").write_text("x")
    with pytest.raises(SourceError, match="no tar file"):
        find_items(tmp_path / "a.tar")
    (tmp_path / "a.jsonl").write_text('{"audio": 3}')
    with pytest.raises(UsageError, match="names no recording"):
        find_items(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_text('{"audio": "a.wav", "offset": 1.5}')
    with pytest.raises(UsageError, match=r"a\.jsonl:1 has an offset"):
        find_items(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_text("{")
    with pytest.raises(UsageError, match=r"a\.jsonl:1 is not valid JSON"):
        find_items(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_text("[3]")
    with pytest.raises(UsageError, match=r"a\.jsonl:1 is no JSON object"):
        find_items(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_bytes('{"audio": "à.wav"}'.encode("latin-1"))
    with pytest.raises(UsageError, match=r"a\.jsonl is not UTF-8 text \(byte 11\)"):
        find_items(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_text('{"audio": "a.wav", "duration": NaN}', encoding="utf-8-sig")  # with a mark
    assert find_items(tmp_path / "a.jsonl")[0].seconds is None


# --- order -----------------------------------------------------------------------------------------------------------


def test_each_pass_holds_every_recording_once_in_an_order_of_its_own(folder):
    data = batches(find_items(folder))
    passes = [np.concatenate([data.batch(4 * p + i)["number"] for i in range(4)]) for p in range(3)]
    for numbers in passes:
        assert sorted(numbers) == list(range(12))
    assert not np.array_equal(passes[0], passes[1])
    assert len({draw for i in range(12) for draw in data.batch(i)["draw"]}) == 36
    other = batches(find_items(folder), seed=1)
    assert not np.array_equal(other.batch(0)["number"], data.batch(0)["number"])


def test_few_recordings_fill_a_batch(folder):
    data = batches(find_items(folder)[:2], batch_size=5, buckets=1)
    assert len(data) == 1
    for index in range(3):
        assert sorted(data.batch(index)["number"]) in ([1, 1, 1, 3, 3], [1, 1, 3, 3, 3])


def test_recordings_are_drawn_by_their_odds(folder):
    """Twice as often as others, or never; as many in a pass, and at the same places whenever it is read."""
    many = np.array([2.0] * 3 + [1.0] * 8 + [0.0])
    data = batches(find_items(folder), odds=lambda items: many[[int(i.fields["text"].split()[1]) for i in items]])
    assert len(data) == 4
    drawn = np.concatenate([rows for number in range(400) for _, rows in data._pass(number)])
    numbers = np.array([int(item.fields["text"].split()[1]) for item in data.items])[drawn]
    assert len(drawn) == 12 * 400
    share = np.bincount(numbers, minlength=12) / len(numbers)
    np.testing.assert_allclose(share, many / many.sum(), atol=0.02)
    again = batches(find_items(folder), odds=lambda items: many[[int(i.fields["text"].split()[1]) for i in items]])
    np.testing.assert_array_equal(again.batch(7)["number"], data.batch(7)["number"])
    assert batches(find_items(folder), odds=lambda items: None).odds is None


def test_like_lengths_share_a_batch_and_few_shapes_occur(folder):
    data = batches(find_items(folder))
    shapes = {data.batch(i)["x"].shape for i in range(24)}
    assert shapes <= {(3, edge) for edge in data.edges}
    assert 2 <= len(shapes) <= 3
    filled = np.mean([(b["x"] != 0).mean() for b in map(data.batch, range(24))])
    alone = np.mean([(b["x"] != 0).mean() for b in map(batches(find_items(folder), buckets=1).batch, range(24))])
    assert filled > alone + 0.1


def test_a_position_is_exact_whatever_the_threads(folder):
    data = batches(find_items(folder))
    wanted = [data.batch(i) for i in range(9)]
    for threads in (1, 4):
        iterator = batches(find_items(folder), threads=threads).training()
        for index in range(5):
            same(next(iterator), wanted[index])
        position = json.loads(json.dumps(iterator.get_state()))
        again = batches(find_items(folder)).training()
        again.set_state(position)
        for index in range(5, 9):
            same(next(again), wanted[index])


def same(a, b):
    assert set(a) == set(b)
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


def test_hosts_read_their_own_rows_of_the_same_batches(folder):
    items = find_items(folder)
    whole = batches(items, batch_size=4)
    parts = [batches(items, batch_size=4, process=(p, 2)) for p in range(2)]
    for name in ("high/03.wav", "low/08.wav"):
        (folder / name).write_bytes(b"RIFF")  # after its length was read
    for index in range(6):
        for name in ("number", "draw"):
            both = np.concatenate([part.batch(index)[name] for part in parts])
            np.testing.assert_array_equal(both, whole.batch(index)[name])
    with pytest.raises(UsageError, match="cannot be divided among 3 hosts"):
        batches(items, batch_size=4, process=(0, 3))


def test_long_recordings_are_cut_at_random_or_left_out_with_their_text(folder):
    data = batches(find_items(folder), seconds=0.75)
    assert len(data.items) == 6
    told = [dataclasses.replace(item, seconds=0.3) for item in find_items(folder)]  # and that is not so
    wrong = batches(told, seconds=0.75)
    assert set(np.concatenate([wrong.batch(i)["number"] for i in range(4)])) == set(range(7))  # a tenth more may be
    assert "lasts 1.3 s, not 0.3 s" in next(why for name, why in wrong.unreadable.items() if "11.wav" in name)
    assert len(data.left_out) == 6
    assert len(batches(find_items(folder), seconds=0.7, shortest=0.3).items) == 5  # 0.3 … 0.7 s, the ends included
    untold = [item.__class__(item.name, item.audio, None, {}) for item in find_items(folder)]
    cut = Batches(
        untold, lambda w, f, rng: {"x": w}, batch_size=4, sampling_rate=RATE, padding={"x": Padding()}, seconds=0.5
    )
    assert {cut.batch(i)["x"].shape[1] for i in range(6)} == {4000}
    assert len({row.tobytes() for i in range(6) for row in cut.batch(i)["x"]}) > 12


def test_what_is_cut_says_where_and_what_must_be_whole_is_left_out(folder):
    items = [i for i in find_items(folder) if "high" in i.name]  # of 0.3, 0.5 … 1.3 s
    waves = {i.name: soundfile.read(i.audio, dtype="float32")[0] for i in items}
    seen = []
    settings = {"batch_size": 4, "sampling_rate": RATE, "padding": {"x": Padding()}, "seconds": 0.6, "buckets": 1}

    def heard(waveform, fields, rng):
        seen.append((waveform, fields))
        return {"x": waveform}

    cut = Batches(items, heard, **settings, whole=False)
    assert not cut.left_out
    list(cut.evaluation())
    assert len(seen) == 6
    for waveform, fields in seen:
        wave = waves[next(i.name for i in items if i.fields["text"] == fields["text"])]
        first, last = (round(t * RATE) for t in fields.get("crop", (0, len(waveform) / RATE)))
        np.testing.assert_array_equal(waveform, wave[first:last])
        assert ("crop" in fields) == (len(wave) > 0.6 * RATE)
        assert len(waveform) == min(len(wave), 0.6 * RATE)
    assert cut.edges == [0.6 * RATE]
    assert len(Batches(items, heard, **settings, whole=True).left_out) == 4
    seen.clear()
    more = Batches(items[-1:], heard, **settings | {"seconds": 1.3 - 1 / RATE, "batch_size": 1}, whole=False)
    for index in range(20):
        more.batch(index)
    assert {round(fields["crop"][0] * RATE) for _, fields in seen} == {0, 1}


def test_evaluation_sees_every_recording_once(folder):
    seen = list(batches(find_items(folder), batch_size=5).evaluation())
    assert sorted(np.concatenate([b["number"] for b in seen])) == list(range(12))
    widths = [b["x"].shape[1] for b in seen]
    assert widths == sorted(widths)
    assert widths[0] < widths[-1]


def test_what_a_mesh_cannot_divide_is_evaluated_by_itself(folder):
    """Of batches of eight for four parts, and two hosts: eight, and a rest of three that each host has all of."""
    items = find_items(folder)[:11]
    alone = list(batches(items, batch_size=8).evaluation())
    for hosts in (1, 2):
        seen = [list(batches(items, batch_size=8, process=(p, hosts)).evaluation(parts=4)) for p in range(hosts)]
        for first, rest in seen:
            assert (len(first["number"]), len(rest["number"])) == (8 // hosts, 3)
            assert (isinstance(first, Whole), isinstance(rest, Whole)) == (False, True)
            for name in ("number", "draw"):
                np.testing.assert_array_equal(rest[name], alone[1][name])
        for name in ("number", "draw", "x"):
            together = np.concatenate([first[name] for first, _ in seen])
            np.testing.assert_array_equal(together, alone[0][name])
    *_, most, last = batches(items, batch_size=8).evaluation(parts=2)
    assert isinstance(last, Whole)
    for name in ("number", "draw"):
        np.testing.assert_array_equal(np.concatenate([most[name], last[name]]), alone[1][name])
    (only,) = batches(items[:3], batch_size=8).evaluation(parts=8)
    assert isinstance(only, Whole)


# --- what is broken --------------------------------------------------------------------------------------------------


def test_broken_recordings_are_named_and_the_next_takes_their_place(folder):
    (folder / "low" / "02.wav").write_bytes(b"not a sound")
    truncated = folder / "low" / "04.wav"
    items = find_items(folder)
    data = batches(items, batch_size=11, buckets=1)
    assert list(data.unreadable) == [str(folder / "low" / "02.wav")]
    truncated.write_bytes(b"RIFF")  # after its length was read
    batch = data.batch(0)
    assert batch["x"].shape[0] == 11
    assert sorted(batch["number"]) == [0, 1, 3, 5, 6, 6, 7, 8, 9, 10, 11]
    same(batch, data.batch(0))
    assert set(data.unreadable) == {str(folder / "low" / "02.wav"), str(truncated)}
    assert "2 unreadable" in data.report()


def test_one_of_like_length_takes_the_place_of_what_is_broken(folder):
    """Not the next one in the folder, which is the shortest of all."""
    items = find_items(folder)
    data = batches(items, batch_size=1)
    (folder / "high" / "11.wav").write_bytes(b"RIFF")  # after its length was read
    assert items[5].name.endswith("11.wav")
    numbers = np.concatenate([data.batch(i)["number"] for i in range(12)])
    assert sorted(numbers) == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 10]


def test_where_a_whole_batch_is_broken_the_next_recording_takes_its_place(folder):
    """Batches of one, and a broken recording that is a batch of the evaluation, or a host's part of one, by itself."""
    items = find_items(folder)
    for index in (4, 6):
        (folder / "low" / f"{index:02}.wav").write_bytes(b"RIFF")
    known = [dataclasses.replace(item, seconds=0.2 + 0.1 * int(item.fields["text"].split()[1])) for item in items]
    data = batches(known, batch_size=1, buckets=2)
    numbers = np.concatenate([data.batch(i)["number"] for i in range(12)])
    assert sorted(numbers) == [0, 1, 2, 3, 5, 7, 8, 8, 8, 9, 10, 11]
    assert len(data.unreadable) == 2
    assert len(list(batches(known, batch_size=1).evaluation())) == 12
    with pytest.raises(AudioError, match="Not one recording can be read"):
        batches(known[8:9], batch_size=1).batch(0)


def test_hosts_pad_to_the_longest_of_all_of_them(folder, monkeypatch):
    monkeypatch.setattr("audiozoo.training.hosts.largest", lambda numbers: [number + 3 for number in numbers])
    data = batches(find_items(folder), padding={"x": Padding(-1.0), "y": Padding()})
    alone, padded = data.batch(0), next(data.training())
    np.testing.assert_array_equal(padded["x"], np.pad(alone["x"], ((0, 0), (0, 3)), constant_values=-1))
    assert padded["x"].dtype == alone["x"].dtype
    np.testing.assert_array_equal(padded["number"], alone["number"])
    assert next(data.evaluation())["x"].shape[1] == data.edges[0] + 3


def test_too_many_broken_recordings_are_an_error(folder):
    for index in (0, 2, 4):
        (folder / "low" / f"{index:02}.wav").write_bytes(b"x")
    with pytest.raises(AudioError, match="3 recordings cannot be read, and 2 were allowed"):
        batches(find_items(folder), limit=2)
    for path in folder.rglob("*.wav"):
        path.write_bytes(b"x")
    with pytest.raises(AudioError, match="none can be used"):
        batches(find_items(folder), limit=100)


def test_collate_pads_and_stacks():
    examples = [{"a": np.arange(3), "b": np.asarray(1)}, {"a": np.arange(5), "b": np.asarray(2)}]
    batch = collate(examples, {"a": Padding(-100, 4)}, samples=0)
    np.testing.assert_array_equal(batch["a"], [[0, 1, 2, *[-100] * 5], [0, 1, 2, 3, 4, *[-100] * 3]])
    np.testing.assert_array_equal(batch["b"], [1, 2])
    assert collate([{"a": np.arange(0)}], {"a": Padding(-100, 4)}, samples=0)["a"].tolist() == [[-100] * 4]


def test_a_label_may_hold_a_comma():
    names = ["Speech", "Male speech, man speaking"]
    assert labels_of(names[1], names) == names[1:]
    assert labels_of("Speech, Music", names) == labels_of(["Speech", "Music"], names) == ["Speech", "Music"]
