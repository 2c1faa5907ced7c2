"""The configuration: strict YAML, every fault at once with its line, overrides, origins, and the way back to a file."""

from __future__ import annotations

import itertools
import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from lorica.config import DataConfig, ModelConfig, RunConfig, dump_yaml, load_config, sections, values
from lorica.errors import ConfigError
from lorica.strict_yaml import MAX_BYTES, dump_value, parse

Write = Callable[..., str]
SMALLEST = ("model.base=embedded", "data.train=rows.jsonl")


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write run.yaml into the current (temporary) folder and give its path, relative, as a user would."""
    monkeypatch.chdir(tmp_path)

    def make(content: str | bytes, name: str = "run.yaml") -> str:
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return name

    return make


def faults_of(path: str | None, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert caught.value.exit_code == 2
    return str(caught.value).splitlines()


# YAML itself


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        (".5", 0.5),
        ("3.", 3.0),
        ("-3", -3),
        ("010", 10),
        ("no", "no"),
        ("off", "off"),
        ("yes", "yes"),
        ("on", "on"),
        ("y", "y"),
        ("true", True),
        ("False", False),
        ("~", None),
        ("null", None),
        ("0x10", "0x10"),
        ("1_000", "1_000"),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("'1e-4'", "1e-4"),
        ('"true"', "true"),
        ("1e", "1e"),
        ("e5", "e5"),
        ("中文", "中文"),
    ],
)
def test_scalars_mean_what_they_say(text: str, value: object) -> None:
    document = parse(f"key: {text}")
    assert document.faults == []
    assert document.value == {"key": value} and type(document.value["key"]) is type(value)


def test_our_reading_agrees_with_pyyaml_where_both_mean_the_same() -> None:
    text = "a: {b: [1, 2.5, x], c: 'q'}\nd:\n- e: |\n    long\n    text\n- null\n"
    assert parse(text).value == yaml.safe_load(text)


def test_duplicate_keys_name_both_lines() -> None:
    (fault,) = parse("train:\n  lr: 1\n  seed: 0\n  lr: 2\n").faults
    assert (fault.line, fault.key) == (4, "train.lr")
    assert "lines 2 and 4" in fault.reason


def test_tags_cannot_construct_anything(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    document = parse(f"a: 1\nb: !!python/object/apply:os.system ['touch {trace}']\nc: !x {{}}\n")
    assert [(fault.line, fault.key) for fault in document.faults] == [(2, "b"), (3, "c")]
    assert "!!python/object/apply:os.system" in document.faults[0].reason
    assert not trace.exists()


def test_an_anchor_bomb_dies_fast() -> None:
    names = [f"k{i}" for i in range(40)]
    bomb = "k0: &k0 [x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in itertools.pairwise(names))
    start = time.perf_counter()
    document = parse(bomb)
    assert time.perf_counter() - start < 2
    assert "anchor &k0" in document.faults[0].reason and document.faults[0].line == 1
    assert any("alias *k0" in fault.reason for fault in document.faults)


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("a: " + "[" * 10_000, 1, "nested deeper"),
        ("a:\n" + "{b: " * 100, 2, "nested deeper"),
        ("? " * 10_000, 1, "nested deeper"),
        ("a: [" + "1, " * 100_000 + "]", 1, "20,000 values"),
        ("a: 1\nb:\n\tc: 1\n", 3, "a tab stands"),
        ("a: 1\nb:\tc\n", 2, "a tab stands"),
        ("a: 1\nb: x\0y\n", 2, "U+0000"),
        ("a: 1\n---\nb: 1\n", 2, "second document"),
        ("a: 1\nb: [1,\n", 3, "no valid YAML"),
        ("a: b: c\n", 1, "no valid YAML"),
        ("a: 'x\n", 2, "no valid YAML"),
        ("? [a]\n: 1\n", 1, "key must be text"),
        (f"a: {'9' * 5000}\n", 1, "5000 characters"),
    ],
)
def test_what_cannot_be_read_says_where(text: str, line: int, words: str) -> None:
    start = time.perf_counter()
    faults = parse(text).faults
    assert time.perf_counter() - start < 5
    assert any(fault.line == line and words in fault.reason for fault in faults), faults


def test_dumped_values_are_read_back() -> None:
    """Random text of YAML's troublesome characters, and PyYAML as the second reader where it has the same rules."""
    rng = random.Random(0)
    alphabet = "ab1e-. :#'\"\\[]{},&*!|>%@`?~\t\n\r\x7f\x85\u2028\ufeff中😀0_/yn"
    texts = ["".join(rng.choices(alphabet, k=rng.randrange(1, 8))) for _ in range(1500)]
    texts += [
        "no",
        "null",
        "1e-4",
        "010",
        "...",
        "---",
        "",
        " a",
        "a ",
        "true",
        "x; touch /tmp/p",
        "C:\\data",
        "9" * 99,
    ]
    for text in texts:
        for value in (text, [text, 1.5], {text: text}):
            document = parse(f"key: {dump_value(value)}\n")
            assert (document.faults, document.value) == ([], {"key": value}), repr(text)
        assert yaml.safe_load(f'key: "x"\nother: {dump_value("q" + text)}')["other"] == "q" + text


# Reading a file


def test_every_field_has_a_description_and_a_checked_default() -> None:
    for section in sections().values():
        assert section.__doc__
        for key, info in section.model_fields.items():
            assert info.description and not info.description.endswith("."), key
    config = load_config(None, SMALLEST).config
    again = values(config)
    assert RunConfig.model_validate(again) == config, "the defaults pass their own checks"
    assert RunConfig(model=ModelConfig(base="embedded"), data=DataConfig(train="rows.jsonl")) == config


def test_a_whole_file(write: Write) -> None:
    path = write(
        "model:  {base: ./base, dtype: bfloat16}\n"
        "method: {name: lora, rank: 8, alpha: 32, targets: [q_proj, v_proj]}\n"
        "data:\n  train: rows.jsonl\n  eval: test.jsonl\n"
        "train:  {output: runs/first, epochs: 1, lr: 1e-4, warmup: 10}\n"
        "eval:\n"
    )
    resolved = load_config(path, ["train.lr=3e-4", "method.rank=4"])
    config = resolved.config
    assert (config.model.base, config.model.dtype) == ("./base", "bfloat16")
    assert config.method.targets == ("q_proj", "v_proj")
    assert config.method.rank == 4 and config.method.alpha == 32.0 and config.train.lr == 3e-4
    assert config.data.eval == "test.jsonl" and config.eval.max_new_tokens == 64
    assert resolved.origin["data.eval"] == "run.yaml:5"
    assert resolved.origin["train.epochs"] == "run.yaml:6"
    assert resolved.origin["train.lr"] == "command line"
    assert resolved.origin["train.clip"] == "default"
    assert {row.key for row in resolved.describe()} == set(resolved.origin)


def test_crlf_and_bom_are_fine(write: Write) -> None:
    path = write(b"\xef\xbb\xbfmodel: {base: x}\r\ndata:\r\n  train: y\r\n")
    assert load_config(path).origin["data.train"] == "run.yaml:3"


def test_all_faults_of_file_and_command_line_at_once(write: Write) -> None:
    path = write(
        "model:\n"
        "  base: embedded\n"
        "  dtyp: auto\n"
        "method: {rank: -1, dropout: 1.5, init: normal}\n"
        "data:\n"
        "  train: rows.jsonl\n"
        "  max_length: 9000\n"
        "  train: other.jsonl\n"
        "train:\n"
        "  lr: .nan\n"
        "  seed: 1.5\n"
        "  schedule: [cosine]\n"
        "  clip: .inf\n"
    )
    faults = faults_of(path, "train.epochs=-1", "data.evil=0.1")
    assert [fault.split(": ")[:2] for fault in faults] == [
        ["run.yaml:3", "model.dtyp"],
        ["run.yaml:4", "method.rank"],
        ["run.yaml:4", "method.dropout"],
        ["run.yaml:4", "method.init"],
        ["run.yaml:7", "data.max_length"],
        ["run.yaml:8", "data.train"],
        ["run.yaml:10", "train.lr"],
        ["run.yaml:11", "train.seed"],
        ["run.yaml:12", "train.schedule"],
        ["run.yaml:13", "train.clip"],
        ["command line", "data.evil"],
        ["command line", "train.epochs"],
    ]
    text = "\n".join(faults)
    assert "did you mean 'dtype'?" in text and "did you mean 'eval'?" in text
    assert "must be at least 1, got -1" in text and "must be a finite number, got .nan" in text
    assert "must be one of kaiming, gaussian, pissa, olora" in text and "got text 'normal'" in text


def test_choices_beside_null_are_named_as_yaml_has_them() -> None:
    with pytest.raises(ConfigError, match=r"model\.quant: must be one of nf4, fp4, null, got text 'nf5'; did you"):
        load_config(None, ["model.base=base", "data.train=rows.jsonl", "model.quant=nf5"])


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("train.lrr", "'lr'"),
        ("lr", "train.lr"),
        ("train.learning_rate", "train.lr"),
        ("method.r", "method.rank"),
        ("train.rank", "method.rank"),
        ("method.lora_alpha", "method.alpha"),
        ("data.cutoff_len", "data.max_length"),
        ("modle.base", "model.base"),
        ("trian", "'train'"),
        ("seed", "train.seed"),
        ("data.maxlength", "'max_length'"),
        ("train.max_lenght", "data.max_length"),
        ("rank", "method.rank"),
        ("model.rank", "method.rank"),
        ("method.ranks", "'rank'"),
        ("data.warm", "train.warmup"),
        ("train.save", "'save_every'"),
    ],
)
def test_did_you_mean(key: str, meant: str) -> None:
    (fault,) = faults_of(None, *SMALLEST, f"{key}=1")
    assert f"command line: {key}: unknown key; did you mean {meant}?" == fault


def test_a_key_of_another_method_is_no_typing_error(write: Write) -> None:
    """`rank` is nearer to `train` than to any other key where the method has none."""
    path = write("model: {base: a}\ndata: {train: b}\nrank: 8\nmethod:\n  name: ia3\n  rank: 8\n")
    top, inner = faults_of(path)
    assert top == "run.yaml:3: rank: unknown section; the file has model, method, data, train, eval"
    assert inner.startswith("run.yaml:6: method.rank: unknown key for this method, which has name, targets, ")
    assert "; it belongs to adalora, dora, hydra, " in inner
    (given,) = faults_of(None, *SMALLEST, "method.name=ia3", "method.rank=8")
    assert given == inner.replace("run.yaml:6", "command line")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("method.rank=0", "at least 1"),
        ("method.rank=65537", "at most 65536"),
        ("method.rank=1e3", "a whole number, got 1000.0"),
        ("method.rank='8'", "a whole number, got text '8'"),
        ("method.rank=true", "a whole number, got true"),
        ("method.alpha=0", "above 0"),
        ("method.alpha=true", "a number, got true"),
        ("method.dropout=1", "below 1"),
        ("method.dropout=-0.1", "at least 0"),
        ("method.targets=[]", "list of module names"),
        ("method.targets=[q_proj, 3]", "list of module names"),
        ("method.targets='[q'", "no valid regular expression"),
        ("method.targets=5", "list of module names"),
        ("method.rank_pattern.q_proj=0", "at least 1"),
        ("method.rank_pattern=3", "a mapping"),
        ("data.eval=0", "between 0 and 1"),
        ("data.eval=1", "between 0 and 1"),
        ("data.eval=.nan", "between 0 and 1"),
        ("data.eval=true", "between 0 and 1"),
        ("data.train=''", "must not be empty"),
        ("data.train=5", "must be text, got 5"),
        ("data.train=[a, b]", "must be text"),
        ("data.columns.prompt=3", "must be text"),
        ("data.packing=yes", "true or false, got text 'yes'"),
        ("data.max_length=1", "at least 2"),
        ("data.max_length=5000", "train.batch_tokens = 4096"),
        ("train.micro_batch_tokens=512", "data.max_length = 1024"),
        ("train.micro_batch_tokens=8192", "more than the 4096"),
        ("train.lr=0", "above 0"),
        ("train.lr=-1e-4", "above 0"),
        ("train.lr=.inf", "finite"),
        ("train.lr=nan", "a number, got text 'nan'"),
        ("train.lr=", "a number, got null"),
        ("train.min_lr=1.1", "at most 1"),
        ("train.warmup=-1", "at least 0"),
        ("train.warmup=2.5", "whole number of steps"),
        ("train.epochs=0", "above 0"),
        ("train.max_steps=0", "at least 1"),
        ("train.seed=-1", "at least 0"),
        ("train.beta2=1.0", "below 1"),
        ("train.threads=0", "at least 1"),
        ("train.on_nan=ignore", "one of stop, skip"),
        ("train.optimizer_memory=0", "an amount of memory such as 8GiB"),
        ("train.optimizer_memory=-1GiB", "an amount of memory such as 8GiB"),
        ("train.optimizer_host_memory=lots", "an amount of memory such as 8GiB"),
        ("train.optimizer_memory=true", "whole number"),
        ("train.optimizer_bits=16", "one of 32, 8"),
        ("eval.batch_size=99999999999999999999", "below"),
        ("model.dtype=bf16", "did you mean bfloat16?"),
        ("model.base=!!python/name:os.system", "the tag !!python/name:os.system is not allowed"),
        ("model.base=*x", "the alias *x"),
        ("train.lr.x=1", "a single value"),
        ("train=1", "is a section"),
        ("train.lr", "is no override"),
        ("=1", "unknown key"),
    ],
)
def test_values_that_cannot_be_meant(override: str, words: str) -> None:
    faults = faults_of(None, *SMALLEST, override)
    assert len(faults) == 1, faults
    assert faults[0].startswith("command line: ") and words in faults[0]


@pytest.mark.parametrize(("text", "num_bytes"), [("2GiB", 2 << 30), ("1.5 M", 3 << 19), ("4096", 4096), ("null", None)])
def test_an_amount_of_memory_is_read_as_bytes(text: str, num_bytes: int | None) -> None:
    resolved = load_config(None, [*SMALLEST, f"train.optimizer_memory={text}"])
    assert resolved.config.train.optimizer_memory == num_bytes


def test_values_that_disagree_are_found_beside_other_faults() -> None:
    faults = faults_of(None, *SMALLEST, "train.warmup=20", "train.max_steps=10", "method.rank=0")
    assert any("20 warm-up steps are more than train.max_steps = 10" in fault for fault in faults) and len(faults) == 2
    (fault,) = faults_of(None, *SMALLEST, "data.eval=null", "train.early_stopping=2")
    assert "data.eval = null" in fault
    with pytest.raises(ValueError, match=r"data\.max_length"):
        RunConfig(model=ModelConfig(base="x"), data=DataConfig(train="y", max_length=100_000))


def test_overrides_follow_the_rules_of_the_file() -> None:
    overrides = [
        "train.lr=1",
        "train.lr=3e-4",
        "method.targets=[q_proj,v_proj]",
        "data.eval=null",
        "data.columns={prompt: q, response: 'a b'}",
        "data.columns.text=body",
        "method.rank_pattern.layers.0.q_proj=010",
        "train.output=x; touch /tmp/p # no: comment",
        "model.base = embedded",
    ]
    resolved = load_config(None, [*SMALLEST, *overrides])
    config = resolved.config
    assert config.train.lr == 3e-4 and config.method.targets == ("q_proj", "v_proj") and config.data.eval is None
    assert config.data.columns == {"prompt": "q", "response": "a b", "text": "body"}
    assert config.method.rank_pattern == {"layers.0.q_proj": 10}
    assert config.train.output == "x; touch /tmp/p # no: comment"
    regex = r"method.targets=.*\.(q|v)_proj$"
    assert load_config(None, [*SMALLEST, regex]).config.method.targets == r".*\.(q|v)_proj$"


def test_values_are_literal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "1")
    config = load_config(None, ["model.base=embedded", "data.train=$SECRET/{x}/~/${SECRET}.jsonl"]).config
    assert config.data.train == "$SECRET/{x}/~/${SECRET}.jsonl"


def test_missing_sections_and_keys(write: Write) -> None:
    assert faults_of(write("")) == [
        "run.yaml: model.base: missing, and it has no default",
        "run.yaml: data.train: missing, and it has no default",
    ]
    assert faults_of(write("train: {}\nmodel:\n"))[1].startswith("run.yaml:2: model.base: missing")
    assert faults_of(write("- 1\n"))[0].startswith("run.yaml:1: must hold the sections model, method")
    assert len(faults_of(write("model: {\n"))) == 1, "a syntax error brings no further ones"
    faults = faults_of(write("model: 3\ndata: {train: x}\n"))
    assert faults == ["run.yaml:1: model: must be a section of keys, got 3"]


def test_what_is_no_configuration_file(write: Write, tmp_path: Path) -> None:
    assert "does not exist; `lorica init` writes one" in faults_of("nowhere.yaml")[0]
    assert "is no file" in faults_of(str(tmp_path))[0]
    assert "is no file" in faults_of("/dev/zero")[0]
    assert re.match(r"run.yaml:2: is not UTF-8: the byte 0xe9", faults_of(write(b"a: 1\nb: caf\xe9\n"))[0])
    assert "not UTF-8" in faults_of(write("model: {}".encode("utf-16")))[0]
    assert "larger than 1,048,576 bytes" in faults_of(write(b"#" * (MAX_BYTES + 1)))[0]


def test_a_run_folder_serves_as_its_configuration(write: Write) -> None:
    resolved = load_config(None, [*SMALLEST, "train.output='1e-4'", "data.template=no", "train.epsilon=1e-9"])
    Path("run").mkdir()
    write(resolved.dump_yaml(), "run/config.yaml")
    again = load_config("run", ["train.lr=1"])
    assert again.origin["train.output"].startswith("run/config.yaml:")
    assert load_config("run").config == resolved.config
    assert dump_yaml(resolved.config).count("#") == 0 and resolved.dump_yaml().count("# command line") == 5


def test_origins_cannot_break_out_of_their_comment(write: Write) -> None:
    path = write("model: {base: a}\ndata: {train: b}\n", "a\n  rank: 3.yaml")
    resolved = load_config(path)
    assert load_config(write(resolved.dump_yaml())).config == resolved.config


def test_no_model_and_no_data_is_loaded(write: Write) -> None:
    path = write("model: {base: hub/does-not-exist}\ndata: {train: x}\ntrain: {lrr: 1}\n")
    program = (
        "import json, sys\n"
        "from lorica.config import load_config\n"
        "from lorica.errors import ConfigError\n"
        f"try: load_config({path!r})\n"
        "except ConfigError as error: message = str(error)\n"
        "heavy = {'pyarrow', 'matplotlib', 'rich', 'typer', 'lorica.models'} & set(sys.modules)\n"
        "print(json.dumps([message, sorted(heavy)]))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(result.stdout) == ["run.yaml:3: train.lrr: unknown key; did you mean 'lr'?", []]
