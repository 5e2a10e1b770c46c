"""Corpora: what becomes a document, what is held out, and one clear message for what is not there."""

import gzip
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_emulator import Hub, write_dataset

from dsl import pydocs
from dsl.corpora import StreamError, digest, ngram_overlap, open_corpus
from dsl.settings import DataConfig
from dsl.tables import File, Tables

ROOT = Path(__file__).parents[1]
SOURCE = '''
"""The module.

    Kept as it stands."""
class Shape(Base):
    "A shape."
    def area(self, unit: str = "cm", *, exact=False) -> float:
        """Area of it.

        Shared paragraph, in two
        files.
        """
        def inner():
            "Not of the interface."
def silent():
    pass
'''


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    monkeypatch.setenv("DSL_SMOKE", "1")
    monkeypatch.setenv("DSL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with Hub(tmp_path / "hub") as served:
        served.use(monkeypatch)
        yield served


def settings(corpus: str, **changes) -> DataConfig:
    return DataConfig(corpus=corpus, **{"retry_first_wait": 0.001, "retry_longest_wait": 0.002} | changes)


def numbered(count: int, shard: int = 0) -> list[str]:
    return [f"Document {i} of shard {shard}: " + "some words " * (i % 7) for i in range(count)]


def training(corpus) -> list[str]:
    return list(corpus.sample(10**9))


def test_a_source_file_becomes_its_heads_and_docstrings(tmp_path):
    (tmp_path / "a.py").write_text(SOURCE)
    (tmp_path / "broken.py").write_text("def (:\n")
    first, broken = pydocs._extract([str(tmp_path / "a.py"), str(tmp_path / "broken.py")])
    area = "def area(self, unit='cm', *, exact=False):"
    assert [head for head, _ in first] == ["", "class Shape:", area, "def inner():"]
    assert first[0][1] == "The module.\n\nKept as it stands."
    assert first[2][1] == "Area of it.\n\nShared paragraph, in two\nfiles."
    assert broken == []


def test_worker_processes_read_what_one_process_reads_and_no_paragraph_stays_twice(tmp_path, monkeypatch):
    names = [f"f{i:03d}.py" for i in range(205)]
    for i, name in enumerate(names):
        (tmp_path / name).write_text(SOURCE.replace("A shape.", f"Shape é number {i}. " + "Round and large. " * 15))
    monkeypatch.setattr(pydocs, "files", lambda small: [(name, str(tmp_path / name)) for name in names])
    alone, together = (pydocs.documents(processes=n) for n in (1, 2))
    assert alone == together and list(alone) == list(together) == names
    assert sum("Shared paragraph, in two\nfiles." in text for text in alone.values()) == 1
    assert "Shape é number 204." in alone["f204.py"]


def test_pydocs_is_read_once_and_is_the_same_for_every_process(tmp_path):
    code = (
        "from dsl.corpora import open_corpus; from dsl.settings import DataConfig; c = open_corpus(DataConfig());"
        "print(c.name, c.fingerprint, len(c.texts))"
    )
    both = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE) for _ in range(2)]
    said = {process.communicate()[0].decode() for process in both}
    corpus = open_corpus(DataConfig())
    assert said == {f"pydocs-smoke {corpus.fingerprint} {len(corpus.texts)}\n"}
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [f"pydocs-smoke-{pydocs.key(small=True)}.json"]
    assert len(corpus.texts) > 20 and sum(map(len, corpus.texts)) > 150_000


def test_topics_of_the_language_are_documents():
    name, path = next(f for f in pydocs.files() if f[0] == "python/pydoc_data/topics.py")
    topics = dict(pydocs._extract([path])[0])
    assert name and 'The "assert" statement' in topics["assert"]


def test_held_out_documents_do_not_move_and_overlap_is_measured():
    corpus, half = (
        open_corpus(settings("pydocs", held_out=0.1)),
        open_corpus(settings("pydocs", held_out=0.1, fraction=0.5)),
    )
    kept = corpus.held_out_documents()
    assert kept == half.held_out_documents() and not set(kept) & set(corpus.texts)
    assert half.texts == corpus.texts[: round(len(corpus.texts) / 2)]
    assert half.fingerprint != corpus.fingerprint
    assert (
        corpus.overlap
        == open_corpus(settings("pydocs", held_out=0.1)).overlap
        == pytest.approx(ngram_overlap(kept, corpus.texts))
    )
    short = open_corpus(settings("pydocs", held_out=0.1, held_out_bytes=1000)).held_out_documents()
    assert sum(len(text.encode()) for text in short) <= 1000 and "".join(kept).startswith("".join(short))


def test_ngram_overlap_of_known_texts():
    words = [f"w{i}" for i in range(40)]
    whole, other = " ".join(words), " ".join(reversed(words))
    assert ngram_overlap([whole], [other]) == 0.0
    assert ngram_overlap([" ".join(words[5:30])], [other, whole]) == 1.0
    assert ngram_overlap([" ".join(words[:20] + ["new"] * 20)], [whole]) == pytest.approx(8 / 28)  # 8 of its 28 fit
    assert ngram_overlap(["too short"], [whole]) == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parquet", "json"])
def test_rows_are_those_that_the_library_datasets_reads(tmp_path, monkeypatch, kind):
    """The oracle of our reader: the same shards, the same values, in the same order, and from a row on as after it."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    import datasets

    (tmp_path / "data").mkdir()
    for shard in range(3):
        table = pa.table({"text": [*numbered(130, shard), "é\n", ""], "other": range(132)})
        path = tmp_path / "data" / f"{shard}.{kind}"
        if kind == "parquet":
            pq.write_table(table, path, row_group_size=50)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    files = sorted(map(str, (tmp_path / "data").iterdir()))
    theirs = datasets.load_dataset(kind, data_files=files, split="train", streaming=True)
    expected = [row["text"] for row in theirs]
    tables = open_corpus(settings(f"local:{tmp_path / 'data'}", block_size=40))._tables
    ours = [text for shard in range(3) for row in range(0, 132, 40) for text in tables.block(shard, row)[0]]
    assert ours == expected and len(ours) == 396
    assert tables.block(1, 101) == (expected[132 + 101 :][:31], 132)
    tables.close()


def test_a_text_file_is_cut_at_empty_lines_and_nothing_is_lost(tmp_path):
    text = "".join(f"Paragraph {i} of it.\n" * (i % 9 + 1) + "\n" for i in range(900))
    (tmp_path / "book.txt").write_text(text)
    corpus = open_corpus(settings(f"local:{tmp_path / 'book.txt'}", held_out=0.2))
    pieces = training(corpus) + corpus.held_out_documents()
    assert len(pieces) > 9 and sum(map(len, pieces)) == len(text) and all(piece in text for piece in pieces)
    assert all(piece.startswith("Paragraph ") and piece.endswith("\n\n") for piece in pieces)


def test_a_folder_of_texts(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.md").write_text("# First\n")
    (tmp_path / "b.py").write_text("second = 2\n")
    (tmp_path / "c.bin").write_bytes(b"\xff\xfe")
    corpus = open_corpus(settings(str(tmp_path)))
    assert sorted(training(corpus) + corpus.held_out_documents()) == ["# First\n", "second = 2\n"]


def write_table(path: Path, texts: list[str]) -> None:
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"n": range(len(texts)), "body": texts}), path, row_group_size=7)
        return
    rows = [{"n": n, "body": text} for n, text in enumerate(texts)]
    lines = json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.json", "a.jsonl.gz"])
def test_tables_give_the_same_documents_from_any_row(tmp_path, name):
    texts = numbered(100)
    write_table(tmp_path / name, texts)

    def at(row: int) -> int:
        lines = (tmp_path / name).read_bytes().splitlines(keepends=True)
        return sum(map(len, lines[:row])) if name.endswith(".jsonl") else row

    data = settings(f"local:{tmp_path / name}", column="body", held_out=0.1, block_size=16)
    corpus = open_corpus(data)
    kept = corpus.held_out_documents()
    assert 0 < len(kept) < 30 and sorted(training(corpus) + kept) == sorted(texts)
    again = open_corpus(data)
    for row in (48, 0, 99, 33, 7, 100):
        expected = None if row == 100 else [text for text in texts[row : row + 16] if text not in kept]
        found = again.block(0, at(row))
        assert found == (expected and (expected, at(min(row + 16, 100))))


def test_fraction_is_the_first_share_of_the_shards_and_of_the_rows_in_the_last(tmp_path):
    for i in range(4):
        write_table(tmp_path / f"{i}.parquet", numbered(50, i))
    corpus = open_corpus(settings(str(tmp_path), column="body", fraction=0.6, held_out=0.02))
    kept = [text for text in numbered(50, 0) + numbered(50, 1) + numbered(50, 2)[:20] if text in training(corpus)]
    assert corpus.shards == 3 and training(corpus) == kept and len(kept) > 100


def test_a_fraction_of_files_is_not_rounded_to_one_more():
    file, data = File("a.json", 0, "", None), settings("pydocs")
    for percent, count in itertools.product(range(1, 101), range(1, 200)):
        shares = Tables("a", [file] * count, "text", data.model_copy(update={"fraction": percent / 100})).shares
        assert len(shares) == -(-percent * count // 100) and sum(shares) == pytest.approx(percent * count / 100)
        assert set(shares[:-1]) <= {1.0} and (percent * count % 100 or shares[-1] == 1)
    assert len(Tables("a", [file], "text", data.model_copy(update={"fraction": 1e-15})).shares) == 1


@pytest.mark.parametrize("where", ["local", "hub"])
def test_an_edited_shard_of_the_same_size_is_another_corpus(hub, where):
    """And its held-out documents are read anew; one that is only written again is the same."""
    path = hub.folder / "some" / "body" / "data.jsonl"
    path.parent.mkdir(parents=True)
    (path.parent / "card.json").write_text(json.dumps({"configs": [{"data_files": "data.jsonl"}]}))
    data = settings("hf:some/body" if where == "hub" else f"local:{path}", held_out=0.2)
    found = []
    for word in ("first", "first", "other"):
        path.write_text("".join(json.dumps({"text": f"The {word} text, {i}."}) + "\n" for i in range(50)))
        corpus = open_corpus(data)
        found.append((path.stat().st_size, corpus.fingerprint, *corpus.held_out_documents()))
    assert found[0] == found[1] and found[2][0] == found[0][0] and found[2][1] != found[0][1]
    assert found[0][2].startswith("The first") and found[2][2].startswith("The other")


@pytest.mark.parametrize(
    ("corpus", "column"), [("cosmopedia", "text"), ("hf:HuggingFaceTB/cosmopedia:web_samples_v2:prompt", "prompt")]
)
def test_a_hub_data_set_is_the_training_split_of_its_configuration(hub, corpus, column):
    shards = [numbered(60, 0), numbered(60, 1)]
    configs = {"stories": [["Not this."]], "web_samples_v2": shards}
    write_dataset(hub.folder, "HuggingFaceTB/cosmopedia", configs, rows_per_group=25)
    found = open_corpus(settings(corpus, held_out=0.1, block_size=16))
    kept = found.held_out_documents()
    expected = shards[0] + shards[1] if column == "text" else [f"Write number {i}." for i in range(60)] * 2
    assert sorted(training(found) + kept) == sorted(expected)
    assert found.tokenizer == "gpt2" and found.overlap is None


def test_wikitext_lines_become_articles(hub):
    parts = ("", " = Title {} = \n", " Text of {} . \n", " = = Part = = \n", " More . \n")
    lines = [part.format(i) for i in range(60) for part in parts]
    write_dataset(hub.folder, "Salesforce/wikitext", {"wikitext-2-raw-v1": [["no"]], "wikitext-103-raw-v1": [lines]})
    corpus = open_corpus(settings("wikitext", held_out=0.1))
    articles = training(corpus) + corpus.held_out_documents()
    expected = {f" = Title {i} = \n Text of {i} . \n = = Part = = \n More . \n" for i in range(60)}
    assert len(articles) == 60 and set(articles) == expected


@pytest.mark.parametrize("size", [1, 7, 16, 1000])
def test_no_article_is_cut_at_the_border_of_a_block(hub, size):
    expected = [f" = Title {i} = \n" + f" Line of {i} . \n" * (i % 23) for i in range(60)]
    lines = [line for article in expected for line in ("", *article.splitlines(keepends=True))]
    write_dataset(hub.folder, "Salesforce/wikitext", {"wikitext-103-raw-v1": [lines]}, rows_per_group=25)
    corpus = open_corpus(settings("wikitext", held_out=0.1, block_size=size))
    articles = training(corpus) + corpus.held_out_documents()
    assert sorted(articles) == sorted(expected)
    _, row = corpus.block(0, 0)
    assert corpus.block(0, row) == open_corpus(settings("wikitext", held_out=0.1, block_size=size)).block(0, row)


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"data_files": {"train": "a.jsonl", "test": "b.jsonl"}}, ["a.jsonl"]),
        ({"data_files": [{"split": "train", "path": ["a.jsonl", "b.jsonl"]}]}, ["a.jsonl", "b.jsonl"]),
        ({"data_files": "./a.jsonl"}, ["a.jsonl"]),
        ({"data_files": "*.jsonl"}, ["a.jsonl", "b.jsonl"]),  # and none of a folder
        ({"data_files": "**/*.jsonl"}, ["a.jsonl", "b.jsonl", "train/c.jsonl"]),
        ({"data_dir": "train", "data_files": "*.jsonl"}, ["train/c.jsonl"]),
        (None, ["train/c.jsonl"]),  # no card, and not converted
    ],
    ids=str,
)
def test_a_card_names_its_training_files_in_many_ways(hub, entry, expected):
    folder = hub.folder / "some" / "body"
    (folder / "train").mkdir(parents=True)
    for name in ("a.jsonl", "b.jsonl", "train/c.jsonl"):
        (folder / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in numbered(9)))
    (folder / "card.json").write_text(json.dumps({"configs": [entry]} if entry else {}))
    assert [file.name for file in open_corpus(settings("hf:some/body"))._tables.files] == expected
    if entry is None:
        with pytest.raises(ValueError, match=r"no training files .* for configuration 'mine'"):
            open_corpus(settings("hf:some/body:mine"))


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("**/train-*.jsonl", [f"{folder}train-0.jsonl" for folder in ("data/en/", "data/", "data2/", "")]),
        ("**/data/**/train-*.jsonl", ["data/en/train-0.jsonl", "data/train-0.jsonl"]),
        ("data/**/train-?.jsonl", ["data/en/train-0.jsonl", "data/train-0.jsonl"]),
        ("data/**", ["data/en/pretrain-0.jsonl", "data/en/train-0.jsonl", "data/train-0.jsonl"]),
        ("**/data/*", ["data/train-0.jsonl"]),
        ("data/train-*", ["data/train-0.jsonl"]),
        ("data*/train-[0-9].jsonl", ["data/train-0.jsonl", "data2/train-0.jsonl"]),
        ("*.jsonl", ["train-0.jsonl"]),
    ],
)
def test_a_star_stays_in_its_folder_and_two_stand_for_whole_ones(hub, pattern, expected):
    folder = hub.folder / "some" / "body"
    for name in ("train-0", "data/train-0", "data2/train-0", "data/en/train-0", "data/en/pretrain-0"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.jsonl").write_text(LINES)
    files = [{"split": "test", "path": "**"}, {"split": "train", "path": [pattern]}]
    (folder / "card.json").write_text(json.dumps({"configs": [{"data_files": files}]}))
    assert [file.name for file in open_corpus(settings("hf:some/body"))._tables.files] == expected


def test_a_resume_amid_json_lines_reads_no_more_than_what_follows(hub, monkeypatch):
    monkeypatch.setattr("dsl.tables._PART", 1000)
    (hub.folder / "some" / "body").mkdir(parents=True)
    (hub.folder / "some" / "body" / "train.jsonl").write_text(LINES * 40)
    data = settings("hf:some/body", block_size=100)
    whole, row = open_corpus(data), 0
    for _ in range(15):
        _, row = whole.block(0, row)
    expected, before = whole.block(0, row), len(hub.requests)
    assert open_corpus(data).block(0, row) == expected
    spans = [span.removeprefix("bytes=").split("-") for _, span in hub.requests[before:] if span]
    assert sum(int(last) + 1 - int(first) for first, last in spans) < 12_000 < row


def test_a_row_that_an_older_checkpoint_counted_is_taken_for_no_byte(tmp_path):
    """Where the place in a shard is a byte, the fingerprint says so; elsewhere it is what it always was."""
    for name in ("a.parquet", "a.json", "a.jsonl.gz", "a.jsonl"):
        write_table(tmp_path / name, numbered(9))
        corpus = open_corpus(settings(f"local:{tmp_path / name}", column="body"))
        shards = [(file.name, file.size, file.content) for file in corpus._tables.files]
        counted = digest(name, shards, "body", 0.01, 1.0, 1024)
        assert (corpus.fingerprint == counted) == (name != "a.jsonl")


def test_a_data_set_without_a_card_is_read_as_the_hub_converted_it(hub):
    (hub.folder / "some" / "body").mkdir(parents=True)
    (hub.folder / "some" / "body" / "data.csv").write_text("text\nnot read\n")
    for i, config in enumerate(("default", "other")):
        target = hub.folder / "some" / "body" / ".converted" / config / "train"
        target.mkdir(parents=True)
        pq.write_table(pa.table({"text": numbered(40, i)}), target / "0000.parquet")
        (target.parent / "test").mkdir()
        pq.write_table(pa.table({"text": ["wrong"]}), target.parent / "test" / "0000.parquet")
    for config, i in ((":other", 1), ("", 0)):
        corpus = open_corpus(settings("hf:some/body" + config, held_out=0.1))
        assert sorted(training(corpus) + corpus.held_out_documents()) == sorted(numbered(40, i))


def test_held_out_documents_of_a_stream_are_read_once(hub):
    write_dataset(hub.folder, "some/body", {"default": [numbered(400), numbered(400, 1)]}, rows_per_group=20)
    data = settings("hf:some/body", held_out=0.05, held_out_bytes=300, block_size=10)
    kept = open_corpus(data).held_out_documents()
    assert 0 < sum(len(text.encode()) for text in kept) <= 300
    read = len(hub.requests)
    again = open_corpus(data)
    assert again.held_out_documents() == kept and len(hub.requests) == read + 1  # the list of files, and no more
    assert not set(kept[:-1]) & set(training(again))


def test_hf_endpoint_is_all_that_another_hub_needs(hub, tmp_path):
    write_dataset(hub.folder, "HuggingFaceTB/cosmopedia", {"web_samples_v2": [numbered(60)]})
    code = (
        "from dsl.corpora import open_corpus; from dsl.settings import DataConfig;"
        "print(len(list(open_corpus(DataConfig(corpus='cosmopedia', held_out=0.1)).sample(10**9))))"
    )
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "DSL_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 40 < int(done.stdout) < 60


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        ("local:nowhere", "must name a file or folder that exists, got 'nowhere'"),
        ("not/here.txt", "must name a file or folder that exists"),
        ("hf:onlyname", "must be hf:owner/name:config:column, got 'hf:onlyname'"),
        ("hf:no/body", "got 'no/body': not there, or `hf auth login`"),
        ("hf:some/body:defalt", "has no configuration 'defalt', did you mean 'default'"),
        ("hf:csv/only", "csv/only has no training files in parquet or JSON"),
        ("hf:some/body:default:txt", "must be one of those of .*did you mean 'text'.*, got 'txt'"),
    ],
)
def test_what_does_not_exist_is_named(hub, corpus, message):
    write_dataset(hub.folder, "some/body", {"default": [numbered(30)]})
    (hub.folder / "csv" / "only").mkdir(parents=True)
    with pytest.raises(ValueError, match=message):
        open_corpus(settings(corpus)).held_out_documents()


def test_unknown_names_get_the_nearest_known_one():
    with pytest.raises(ValueError, match="did you mean 'pydocs'"):
        settings("pydoc")


def test_unusable_local_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="must hold files"):
        open_corpus(settings(str(tmp_path)))
    (tmp_path / "a.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(ValueError, match=r"must be text in UTF-8.*a\.txt"):
        open_corpus(settings(str(tmp_path)))
    (tmp_path / "a.txt").write_text("One paragraph only.")
    with pytest.raises(ValueError, match="must hold 2 documents or more, got 1"):
        open_corpus(settings(str(tmp_path)))
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"corpus must hold more text, or held_out be larger than 0\.01"):
        open_corpus(settings(str(tmp_path))).held_out_documents()


LINES = "".join(json.dumps({"text": text}) + "\n" for text in numbered(50))
BYTE = sum(map(len, LINES.splitlines(keepends=True)[:48]))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", LINES.replace("\n", "\n\n")),
        ("a.jsonl", "\ufeff" + LINES.replace("\n", "\r\n")),
        ("a.json", "\ufeff\n" + json.dumps([json.loads(line) for line in LINES.splitlines()])),
        ("a.jsonl", LINES + '{"other": 1}\n{"text": null}\n{"text": 1}\n'),
    ],
    ids=["empty lines", "BOM and CRLF", "BOM and a list", "rows without text"],
)
def test_json_as_it_is_found(tmp_path, name, text):
    (tmp_path / name).write_bytes(text.encode())
    corpus = open_corpus(settings(str(tmp_path), held_out=0.1, block_size=16))
    assert sorted(training(corpus) + corpus.held_out_documents()) == sorted(numbered(50))
    row = corpus.block(0, 0)[1]
    assert corpus.block(0, row) == open_corpus(settings(str(tmp_path), held_out=0.1, block_size=16)).block(0, row)


def test_half_of_a_surrogate_pair_is_read_as_a_question_mark(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "cut \\ud83d {i} 😀"}}\n' for i in range(50)))
    assert set(training(open_corpus(settings(str(tmp_path))))) <= {f"cut ? {i} 😀" for i in range(50)}


@pytest.mark.parametrize(
    ("name", "raw", "error", "message"),
    [
        ("a.jsonl", (LINES + '{"text": "unfin').encode(), StreamError, rf"a\.jsonl\), byte {BYTE}: JSONDecodeError"),
        ("a.jsonl.gz", gzip.compress(LINES.encode())[:-20], StreamError, r"a\.jsonl\.gz\), row 0: EOFError"),
        ("a.parquet", b"", StreamError, r"a\.parquet\), row 0: ArrowInvalid: .*Mend it"),
        ("a.json", b'["a text", "another"]', ValueError, r"a\.json must hold JSON objects, got str in row 0"),
        ("a.jsonl", b'{"text": 1}\n' * 9, ValueError, "column must hold text, got int in 'text'"),
    ],
)
def test_a_table_that_cannot_be_read_is_named(tmp_path, name, raw, error, message):
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(error, match=message):
        training(open_corpus(settings(str(tmp_path), block_size=16)))


@pytest.mark.parametrize("size", [16, 17])
def test_a_row_of_another_kind_is_left_out_wherever_a_block_ends(tmp_path, size):
    (tmp_path / "a.jsonl").write_text(LINES + '{"text": 1}\n')
    corpus = open_corpus(settings(str(tmp_path), held_out=0.2, block_size=size))
    assert len(training(corpus)) + len(corpus.held_out_documents()) == LINES.count("\n")


def test_a_text_of_lines_without_an_empty_one_is_cut_at_lines(tmp_path):
    text = "".join(f"Sentence {i} of it.\n" for i in range(3000))
    (tmp_path / "lines.txt").write_text(text)
    corpus = open_corpus(settings(str(tmp_path), held_out=0.2))
    pieces = training(corpus) + corpus.held_out_documents()
    assert len(pieces) > 5 and sum(map(len, pieces)) == len(text)
    assert all(piece.startswith("Sentence ") and piece.endswith("\n") for piece in pieces)


def test_a_spoilt_cache_is_made_anew(tmp_path):
    texts = open_corpus(DataConfig()).texts
    (file,) = (tmp_path / "cache").iterdir()
    file.write_bytes(b"")
    assert open_corpus(DataConfig()).texts == texts and file.stat().st_size > 0


def test_without_a_network_one_message_says_what_to_do(tmp_path, monkeypatch):
    with Hub(tmp_path) as gone:
        gone.use(monkeypatch)
    with pytest.raises(StreamError, match=r"attempts made: 2.*corpus=pydocs or local:FOLDER"):
        open_corpus(settings("cosmopedia"))


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("DSL_CACHE", str(tmp_path / "file" / "cache"))
    assert len(open_corpus(DataConfig()).texts) > 20
    assert "cannot keep" in caplog.text
