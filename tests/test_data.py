"""Prompt files of every format, and what is wrong with them."""

import json

import pytest

from dancegrpo_jax.data import prompt_batches, read_prompts

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
    assert read_prompts(write(tmp_path, name)) == PROMPTS


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
    assert sorted(read_prompts(str(builder.data_path))) == sorted(PROMPTS)


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
        read_prompts(str(tmp_path / name))


def test_folders_that_are_no_datasets(tmp_path):
    with pytest.raises(ValueError, match="cannot be read as a TFDS dataset"):
        read_prompts(str(tmp_path))
    with pytest.raises(ValueError, match="nowhere.txt: cannot be read"):
        read_prompts(str(tmp_path / "nowhere.txt"))


def test_batches_are_a_shuffled_pass_over_all_prompts():
    prompts = [str(i) for i in range(12)]
    batches = prompt_batches(prompts, 4, seed=0)
    assert sorted(sum((batches[i] for i in range(3)), []), key=int) == prompts
    assert batches[0] == prompt_batches(prompts, 4, seed=0)[0] != prompt_batches(prompts, 4, seed=1)[0]
    with pytest.raises(ValueError, match="prompts_per_step=13 exceeds the 12"):
        prompt_batches(prompts, 13, seed=0)


def test_shipped_prompts():
    train, heldout = (read_prompts(f"dancegrpo_jax/prompts/{name}.txt") for name in ("train", "heldout"))
    assert len(set(train)) == 128 and len(set(heldout)) == 32 and not set(train) & set(heldout)
