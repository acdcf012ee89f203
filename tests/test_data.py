"""Prompt files of every format, and what is wrong with them."""

import json

import pytest

from dancegrpo_jax.data import Row, read_rows, row_batches, rows_of

PROMPTS = ["a red circle", 'two "blue" squares, one big', "ein grüner Stern 🌟"]


def write(path, name):
    file = path / name
    if name.endswith(".jsonl"):
        file.write_text("\n".join([json.dumps({"id": 1, "prompt": p}) for p in PROMPTS]) + "\n\n", encoding="utf-8")
    elif name.endswith(".csv"):
        import csv
        with file.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerows([["id", "caption"], *([str(i), p] for i, p in enumerate(PROMPTS))])
    else:
        file.write_text("# ours\n\n" + "\n  \n".join(PROMPTS) + "\n", encoding="utf-8")
    return str(file)


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl", "p.csv"])
def test_formats(tmp_path, name):
    rows = read_rows(write(tmp_path, name))
    assert [row.prompt for row in rows] == PROMPTS and [row.index for row in rows] == [0, 1, 2]


def test_tfds(tmp_path):
    """A dataset in array_record format, written without TensorFlow."""
    tfds = pytest.importorskip("tensorflow_datasets")

    class Prompts(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({"text": tfds.features.Text()}))

        def _split_generators(self, manager):
            return {"train": ((i, {"text": prompt}) for i, prompt in enumerate(PROMPTS))}

        def _generate_examples(self):
            raise NotImplementedError

    builder = Prompts(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    assert sorted(row.prompt for row in read_rows(str(builder.data_path))) == sorted(PROMPTS)


@pytest.mark.parametrize(("name", "content", "message"), [
    ("p.txt", "# nothing\n\n", "p.txt: no prompts"),
    ("p.txt", b"\xff\xfe", "p.txt: cannot be read as UTF-8"),
    ("p.jsonl", '{"prompt": "a"}\n{"prompt": ', r"p.jsonl:2: not JSON"),
    ("p.jsonl", '{"title": "a"}\n', r"p.jsonl:1: none of the fields prompt, caption, text"),
    ("p.jsonl", '{"prompt": 3}\n', r"p.jsonl:1: prompt is 3, not text"),
    ("p.csv", "id,title\n1,a\n", r"p.csv:2: none of the fields"),
])
def test_bad_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        read_rows(str(tmp_path / name))


def test_folders_that_are_no_datasets(tmp_path):
    with pytest.raises(ValueError, match="cannot be read as a TFDS dataset"):
        read_rows(str(tmp_path))
    with pytest.raises(ValueError, match="nowhere.txt: cannot be read"):
        read_rows(str(tmp_path / "nowhere.txt"))


def test_batches_are_a_shuffled_pass_over_all_prompts():
    prompts = [str(i) for i in range(12)]
    batches = row_batches(rows_of(prompts), 4, seed=0)
    assert sorted((row.prompt for i in range(3) for row in batches[i]), key=int) == prompts
    assert batches[0] == row_batches(rows_of(prompts), 4, seed=0)[0] != row_batches(rows_of(prompts), 4, seed=1)[0]
    with pytest.raises(ValueError, match="prompts_per_step=13 exceeds the 12"):
        row_batches(rows_of(prompts), 13, seed=0)


def test_shipped_prompts():
    train, heldout = ([row.prompt for row in read_rows(f"dancegrpo_jax/prompts/{name}.txt")] for name in ("train", "heldout"))
    assert len(set(train)) == 128 and len(set(heldout)) == 32 and not set(train) & set(heldout)


def test_all_other_fields_arrive(tmp_path):
    """Numbers and lists from jsonl, text from csv; blank prompts are skipped, equal ones are rows of their own."""
    lines = [{"caption": "a", "fps": 8, "boxes": [[1, 2]]}, {"caption": "  ", "fps": 1}, {"caption": " a ", "chosen": "x.png"}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    rows = read_rows(str(tmp_path / "p.jsonl"))
    assert rows == [Row(0, "a", {"fps": 8, "boxes": [[1, 2]]}), Row(1, "a", {"chosen": "x.png"})]
    (tmp_path / "p.csv").write_text("id,prompt,image\n7,a,x.png\n8,b,y.png,more\n")
    rows = read_rows(str(tmp_path / "p.csv"))
    assert rows == [Row(0, "a", {"id": "7", "image": "x.png"}), Row(1, "b", {"id": "8", "image": "y.png"})]
    assert read_rows(write(tmp_path, "p.txt"))[0] == Row(0, PROMPTS[0], {})


def test_fields_of_a_dataset_are_decoded():
    import numpy as np

    from dancegrpo_jax.data import _split
    row = {"prompt": b"a", "id": b"x", "tags": np.array([b"p", b"q"], object), "nested": {"name": "ü".encode()},
           "file": b"\xff\xd8", "size": np.int64(3)}
    prompt, fields = _split(row, "here")
    assert prompt == "a"
    assert fields == {"id": "x", "tags": ["p", "q"], "nested": {"name": "ü"}, "file": b"\xff\xd8", "size": 3}


def test_the_same_seed_gives_the_same_prompts_as_before():
    """A run that is resumed with rows sees the prompts that it would have seen with strings."""
    import grain
    prompts = [str(i) for i in range(12)]
    plain = grain.MapDataset.source(prompts).seed(3).shuffle().repeat().batch(4, batch_fn=list)
    rows = row_batches(rows_of(prompts), 4, seed=3)
    for i in range(7):
        assert [row.prompt for row in rows[i]] == plain[i]
